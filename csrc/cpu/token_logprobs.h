// rlkern::token_logprobs on the CPU; the schemas stand in rlkern/_schema.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace rlkern {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor> token_logprobs_cpu(Tensor logits, Tensor token_ids,
                                                      std::optional<Tensor> mask,
                                                      std::optional<Tensor> token_temperature,
                                                      double temperature,
                                                      std::optional<double> softcap,
                                                      bool return_entropy);

std::tuple<Tensor, Tensor, Tensor, Tensor> token_logprobs_outputs_cpu(
    Tensor logits, Tensor token_ids, std::optional<Tensor> mask,
    std::optional<Tensor> token_temperature, double temperature, std::optional<double> softcap,
    bool return_entropy);

Tensor token_logprobs_bwd_cpu(std::optional<Tensor> grad_logprobs,
                              std::optional<Tensor> grad_entropy, Tensor logits, Tensor token_ids,
                              std::optional<Tensor> mask, std::optional<Tensor> token_temperature,
                              double temperature, std::optional<double> softcap, Tensor logprobs,
                              Tensor entropy, Tensor state);

void token_logprobs_bwd_inplace_cpu(std::optional<Tensor> grad_logprobs,
                                    std::optional<Tensor> grad_entropy, Tensor logits,
                                    Tensor token_ids, std::optional<Tensor> mask,
                                    std::optional<Tensor> token_temperature, double temperature,
                                    std::optional<double> softcap, Tensor logprobs, Tensor entropy,
                                    Tensor state);

}  // namespace rlkern

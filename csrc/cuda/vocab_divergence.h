// rlkern::vocab_divergence on a GPU; the schemas stand in rlkern/_schema.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace rlkern {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> vocab_divergence_cuda(Tensor logits, Tensor ref_logits,
                                                 std::optional<Tensor> mask,
                                                 std::optional<Tensor> token_temperature,
                                                 double temperature, std::optional<double> softcap,
                                                 int64_t divergence, double beta);

Tensor vocab_divergence_bwd_cuda(Tensor grad_value, Tensor logits, Tensor ref_logits,
                                 std::optional<Tensor> mask,
                                 std::optional<Tensor> token_temperature, double temperature,
                                 std::optional<double> softcap, int64_t divergence, double beta,
                                 Tensor state);

void vocab_divergence_bwd_into_cuda(Tensor grad_value, Tensor grad, Tensor logits,
                                    Tensor ref_logits, std::optional<Tensor> mask,
                                    std::optional<Tensor> token_temperature, double temperature,
                                    std::optional<double> softcap, int64_t divergence, double beta,
                                    Tensor state);

}  // namespace rlkern

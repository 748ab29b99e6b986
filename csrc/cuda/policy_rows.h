// rlkern::policy_rows on a GPU; the schemas stand in rlkern/_schema.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace rlkern {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor> policy_rows_cuda(
    Tensor logits, Tensor grad, Tensor token_ids, std::optional<Tensor> mask,
    std::optional<Tensor> token_temperature, double temperature, std::optional<double> softcap,
    Tensor advantages, std::optional<Tensor> old_logprobs, std::optional<Tensor> ref_logprobs,
    std::optional<Tensor> rollout_logprobs, std::optional<Tensor> token_weights,
    std::optional<Tensor> entropy_mask, Tensor scales, std::vector<double> options,
    bool return_entropy);

}  // namespace rlkern

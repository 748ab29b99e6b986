// rlkern::policy_loss on a GPU; the schemas stand in rlkern/_schema.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace rlkern {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> policy_loss_cuda(
    Tensor logprobs, Tensor advantages, std::optional<Tensor> mask,
    std::optional<Tensor> old_logprobs, std::optional<Tensor> ref_logprobs,
    std::optional<Tensor> rollout_logprobs, std::optional<Tensor> entropy,
    std::optional<Tensor> token_weights, std::optional<Tensor> entropy_mask,
    std::optional<Tensor> offsets, std::optional<Tensor> normalizer,
    std::optional<Tensor> num_sequences, std::optional<Tensor> entropy_normalizer,
    std::vector<double> options, bool grad_logprobs, bool grad_entropy);

std::tuple<Tensor, Tensor> policy_loss_bwd_cuda(Tensor grad_loss, Tensor grad_logprobs,
                                                Tensor grad_entropy, Tensor scale);

}  // namespace rlkern

// The value loss and the KL penalty on a GPU, as rlkern/_schema.py defines them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace rlkern {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor> value_loss_cuda(
    Tensor values, Tensor returns, std::optional<Tensor> mask, std::optional<Tensor> old_values,
    std::optional<Tensor> offsets, std::optional<Tensor> normalizer,
    std::optional<Tensor> num_sequences, std::vector<double> options, bool grad_values);

Tensor value_loss_bwd_cuda(Tensor grad_loss, Tensor grad_values, Tensor scale);

Tensor kl_penalty_cuda(Tensor logprobs, Tensor ref_logprobs, std::optional<Tensor> mask,
                       int64_t estimator, int64_t clamp);

Tensor kl_penalty_bwd_cuda(Tensor grad, Tensor logprobs, Tensor ref_logprobs,
                           std::optional<Tensor> mask, int64_t estimator, int64_t clamp);

}  // namespace rlkern

// masked_moments and whiten on a GPU, as rlkern/_schema.py defines them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

namespace rlkern {

using torch::stable::Tensor;

Tensor masked_moments_cuda(Tensor x, std::optional<Tensor> mask);

Tensor whiten_cuda(Tensor x, std::optional<Tensor> mask, Tensor moments,
                   std::vector<double> options);

}  // namespace rlkern

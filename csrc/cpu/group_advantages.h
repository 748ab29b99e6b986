// group_advantages on the CPU, as rlkern/_schema.py defines it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

namespace rlkern {

using torch::stable::Tensor;

Tensor group_advantages_cpu(Tensor rewards, int64_t group_size, std::optional<Tensor> group_ids,
                            std::optional<Tensor> lengths, std::optional<Tensor> given,
                            std::optional<Tensor> weights, std::vector<double> options);

}  // namespace rlkern

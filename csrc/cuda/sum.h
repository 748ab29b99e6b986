// add_widened_ on a GPU, as rlkern/_schema.py defines it.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace rlkern {

void add_widened_cuda(torch::stable::Tensor sum, torch::stable::Tensor part);

}  // namespace rlkern

// add_widened_ on the CPU, as rlkern/_schema.py defines it.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace rlkern {

void add_widened_cpu(torch::stable::Tensor sum, torch::stable::Tensor part);

}  // namespace rlkern

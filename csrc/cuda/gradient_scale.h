// rlkern::scale_ on a GPU; the schemas stand in rlkern/_schema.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace rlkern {

using torch::stable::Tensor;

void scale_cuda(Tensor x, Tensor factor);

}  // namespace rlkern

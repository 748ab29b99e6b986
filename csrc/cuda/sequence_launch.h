// What the launchers of the losses over sequences share.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>

#include "../common/sequence_view.h"

namespace rlkern {

// A number in a tensor on the GPU, which only the kernel reads; null where it was not given.
inline const double* given_tensor(const std::optional<Tensor>& tensor, const Tensor& like,
                                  const char* name) {
  if (!tensor.has_value()) return nullptr;
  check(tensor->numel() == 1 && tensor->scalar_type() == ScalarType::Double, name,
        ": expected one float64");
  check(tensor->is_cuda() && tensor->get_device_index() == like.get_device_index(), name,
        ": expected the device of the others");
  return static_cast<const double*>(tensor->data_ptr());
}

// Two gradients times the upstream gradient and their scales, in one launch; either may be empty.
std::array<Tensor, 2> scaled_gradients(const Tensor& grad_loss, const Tensor& scale,
                                       const std::array<Tensor, 2>& grads);

}  // namespace rlkern

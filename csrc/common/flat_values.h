// Tensors whose values lie one after another, in the size and on the device of another tensor.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "checks.h"

namespace rlkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
const T* flat_values(const Tensor& tensor, int64_t size, const Tensor& like, ScalarType dtype,
                     const char* name) {
  check(tensor.scalar_type() == dtype && tensor.is_contiguous() && tensor.numel() == size, name,
        ": expected a contiguous tensor of ", size, " values");
  check(tensor.is_cuda() == like.is_cuda() && tensor.get_device_index() == like.get_device_index(),
        name, ": expected the device of the others");
  return static_cast<const T*>(tensor.data_ptr());
}

// As many as `like` has.
template <typename T>
const T* flat_values(const Tensor& tensor, const Tensor& like, ScalarType dtype, const char* name) {
  return flat_values<T>(tensor, like.numel(), like, dtype, name);
}

// Null where it is not given.
template <typename T>
const T* flat_values(const std::optional<Tensor>& tensor, int64_t size, const Tensor& like,
                     ScalarType dtype, const char* name) {
  return tensor.has_value() ? flat_values<T>(*tensor, size, like, dtype, name) : nullptr;
}

}  // namespace rlkern

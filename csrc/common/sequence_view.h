// Views of token-level tensors, [B, T] or packed [total] with offsets [B + 1].
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "checks.h"
#include "sequence_grid.h"

namespace rlkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline SequenceGrid sequence_grid(const Tensor& values, const std::optional<Tensor>& offsets) {
  SequenceGrid grid;
  if (!offsets.has_value()) {
    check(values.dim() == 2, "expected values [B, T], got ", values.dim(), " dimensions");
    grid.sequences = values.size(0);
    grid.length = values.size(1);
    return grid;
  }
  check(values.dim() == 1, "expected packed values [total], got ", values.dim(), " dimensions");
  check(offsets->dim() == 1 && offsets->size(0) >= 1 && offsets->is_contiguous() &&
            offsets->scalar_type() == ScalarType::Long,
        "offsets: expected contiguous int64 [B + 1]");
  check(offsets->is_cuda() == values.is_cuda() &&
            offsets->get_device_index() == values.get_device_index(),
        "offsets: expected the device of the others");
  grid.sequences = offsets->size(0) - 1;
  grid.length = values.size(0);
  grid.offsets = static_cast<const int64_t*>(offsets->data_ptr());
  return grid;
}

// A tensor in the shape of `values`, consecutive along a sequence; empty where it is not given.
template <typename T>
TokenRows<T> token_rows(const std::optional<Tensor>& tensor, const Tensor& values, ScalarType dtype,
                        const char* name) {
  TokenRows<T> rows;
  if (!tensor.has_value()) return rows;
  check(tensor->scalar_type() == dtype, name, ": unexpected dtype");
  check(tensor->dim() == values.dim(), name, ": expected ", values.dim(), " dimensions, got ",
        tensor->dim());
  for (int64_t d = 0; d < values.dim(); ++d) {
    check(tensor->size(d) == values.size(d), name, ": expected size ", values.size(d),
          " at dimension ", d, ", got ", tensor->size(d));
  }
  const int64_t last = values.dim() - 1;
  check(tensor->size(last) <= 1 || tensor->stride(last) == 1, name,
        ": expected values consecutive along a sequence, got a stride of ", tensor->stride(last));
  check(tensor->get_device_index() == values.get_device_index() &&
            tensor->is_cuda() == values.is_cuda(),
        name, ": expected the device of the others");
  rows.data = static_cast<T*>(tensor->data_ptr());
  rows.row_stride = last == 1 ? tensor->stride(0) : 0;
  return rows;
}

}  // namespace rlkern

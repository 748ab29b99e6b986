// Strided views of the operators' tensors: rows of logits, and one value per token.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "checks.h"
#include "token_grid.h"

namespace rlkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The grid of the first `dims` dimensions of a tensor.
inline TokenGrid token_grid(const Tensor& tensor, int64_t dims, const char* name) {
  check(dims <= 2, name, ": expected at most 2 dimensions of tokens, got ", dims);
  TokenGrid grid;
  if (dims >= 1) {
    grid.inner = tensor.size(dims - 1);
    grid.inner_stride = tensor.stride(dims - 1);
  }
  if (dims == 2) {
    grid.outer = tensor.size(0);
    grid.outer_stride = tensor.stride(0);
  }
  return grid;
}

// A TokenSpan over a tensor in the shape of the logits without their last dimension.
template <typename T>
class TokenView : public TokenSpan<T> {
 public:
  TokenView() = default;
  TokenView(const Tensor& tensor, const Tensor& logits, ScalarType dtype, const char* name) {
    this->grid = token_grid(tensor, tensor.dim(), name);
    this->data = static_cast<T*>(tensor.data_ptr());
    check(tensor.scalar_type() == dtype, name, ": unexpected dtype");
    check(tensor.dim() == logits.dim() - 1, name, ": expected ", logits.dim() - 1,
          " dimensions (the logits' without the vocabulary), got ", tensor.dim());
    for (int64_t d = 0; d < tensor.dim(); ++d) {
      check(tensor.size(d) == logits.size(d), name, ": expected size ", logits.size(d),
            " at dimension ", d, ", got ", tensor.size(d));
    }
    check(tensor.get_device_index() == logits.get_device_index() &&
              tensor.is_cuda() == logits.is_cuda(),
          name, ": expected the logits' device");
  }
  TokenView(const std::optional<Tensor>& tensor, const Tensor& logits, ScalarType dtype,
            const char* name) {
    if (tensor.has_value()) *this = TokenView(*tensor, logits, dtype, name);
  }
};

}  // namespace rlkern

// Strided views of the operators' tensors: rows of logits, and one value per token.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <optional>

#include "checks.h"

namespace rlkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Leading dimensions as [outer, inner], each with a stride: enough for [V], [N, V] and a sliced
// [B, T, V], read in place.
struct TokenGrid {
  int64_t outer = 1;
  int64_t inner = 1;
  int64_t outer_stride = 0;
  int64_t inner_stride = 0;

  int64_t size() const { return outer * inner; }
  int64_t offset(int64_t token) const {
    return token / inner * outer_stride + token % inner * inner_stride;
  }
};

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

// One value of type T per token, in the shape of the logits without their last dimension.
template <typename T>
class TokenView {
 public:
  TokenView() = default;
  TokenView(const Tensor& tensor, const Tensor& logits, ScalarType dtype, const char* name)
      : grid_(token_grid(tensor, tensor.dim(), name)),
        data_(static_cast<T*>(tensor.data_ptr())) {
    check(tensor.scalar_type() == dtype, name, ": unexpected dtype");
    check(tensor.dim() == logits.dim() - 1, name, ": expected ", logits.dim() - 1,
          " dimensions (the logits' without the vocabulary), got ", tensor.dim());
    for (int64_t d = 0; d < tensor.dim(); ++d) {
      check(tensor.size(d) == logits.size(d), name, ": expected size ", logits.size(d),
            " at dimension ", d, ", got ", tensor.size(d));
    }
  }
  TokenView(const std::optional<Tensor>& tensor, const Tensor& logits, ScalarType dtype,
            const char* name) {
    if (tensor.has_value()) *this = TokenView(*tensor, logits, dtype, name);
  }

  explicit operator bool() const { return data_ != nullptr; }
  T& operator[](int64_t token) const { return data_[grid_.offset(token)]; }

 private:
  TokenGrid grid_;
  T* data_ = nullptr;
};

}  // namespace rlkern

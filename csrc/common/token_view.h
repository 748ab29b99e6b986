// Strided views of the operators' tensors: rows of logits, and one value per token.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <limits>
#include <optional>

#include "checks.h"
#include "token_grid.h"

namespace rlkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The dimensions of tokens of logits [..., V]. Asked for before any size: torch's own error for a
// dimension that is not there shows a path of the build machine.
inline int64_t token_dims(const Tensor& logits) {
  check(logits.dim() >= 1, "logits: expected shape [..., V], got no dimensions");
  return logits.dim() - 1;
}

// The softcap in the kernels' fp32, in which 0 stands for none: one that is 0 there would be left
// out in silence.
inline float softcap_or_none(std::optional<double> softcap) {
  if (!softcap.has_value()) return 0.0f;
  const float value = static_cast<float>(*softcap);
  check(value > 0 && value < std::numeric_limits<float>::infinity(),
        "softcap: expected a positive finite number in fp32, got ", *softcap);
  return value;
}

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
    const int64_t dims = token_dims(logits);
    this->grid = token_grid(tensor, tensor.dim(), name);
    this->data = static_cast<T*>(tensor.data_ptr());
    check(tensor.scalar_type() == dtype, name, ": unexpected dtype");
    check(tensor.dim() == dims, name, ": expected ", dims,
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

// The tensors of masked_moments and whiten, checked once for CPU and CUDA.
#pragma once

#include <optional>
#include <vector>

#include "flat_values.h"
#include "whitening.h"

namespace rlkern {

struct WhitenArguments {
  int64_t size;
  const float* x;
  const bool* mask;  // null where not given
};

inline WhitenArguments whiten_arguments(const Tensor& x, const std::optional<Tensor>& mask) {
  return {x.numel(), flat_values<float>(x, x, ScalarType::Float, "x"),
          flat_values<bool>(mask, x.numel(), x, ScalarType::Bool, "mask")};
}

// Count, mean and sum of squared deviations, as masked_moments returns them.
inline const double* moments_argument(const Tensor& moments, const Tensor& x) {
  return flat_values<double>(moments, 3, x, ScalarType::Double, "moments");
}

inline WhitenOptions checked_whiten_options(const std::vector<double>& options) {
  check(options.size() == kWhitenOptionCount, "options: expected ", kWhitenOptionCount,
        " numbers, got ", options.size());
  return whiten_options(options.data());
}

}  // namespace rlkern

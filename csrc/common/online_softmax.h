// The state of a streaming softmax over a row of values z: (max, sum of e, sum of (z - max) * e),
// e = exp(z - max). Sums relative to the maximum never overflow, and their entropy never cancels.
#pragma once

#include "macros.h"

namespace rlkern {

template <typename T>
struct SoftmaxState {
  T max;       // -inf while nothing was folded
  T sum;       // sum of exp(z - max)
  T weighted;  // sum of (z - max) * exp(z - max), never positive
};

template <typename T>
RLKERN_INLINE SoftmaxState<T> softmax_empty() {
  return {-static_cast<T>(__builtin_inf()), T(0), T(0)};
}

// Moves a state to a maximum that is not below its own. A state may be kept in units of a y with
// z = y * scale, so that differences are taken before they are scaled.
template <typename T>
RLKERN_INLINE SoftmaxState<T> softmax_rebase(SoftmaxState<T> s, T max, T scale = T(1)) {
  // An empty sum has nothing to move, and its -inf maximum would make 0 * inf below. A NaN sum
  // is moved: it must stay visible.
  if (s.sum == T(0) || s.max == max) return {max, s.sum, s.weighted};
  const T shift = s.max - max;
  const T factor = rl_exp(shift * scale);
  if (factor == T(0)) return {max, s.sum * T(0), T(0)};
  return {max, s.sum * factor, (s.weighted + shift * s.sum) * factor};
}

template <typename T>
RLKERN_INLINE SoftmaxState<T> softmax_merge(SoftmaxState<T> a, SoftmaxState<T> b, T scale = T(1)) {
  const T max = a.max > b.max ? a.max : b.max;
  a = softmax_rebase(a, max, scale);
  b = softmax_rebase(b, max, scale);
  return {max, a.sum + b.sum, a.weighted + b.weighted};
}

template <typename T>
RLKERN_INLINE SoftmaxState<T> softmax_fold(SoftmaxState<T> s, T z) {
  // exp(-inf - max) is 0 and weighs nothing; a NaN takes this path too, as one of the sum.
  const T inf = static_cast<T>(__builtin_inf());
  if (z == -inf) return s;
  return softmax_merge(s, SoftmaxState<T>{z, z - z + T(1), T(0)});
}

}  // namespace rlkern

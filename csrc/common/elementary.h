// Elementary functions without cancellation, for host and device, and for vectors of floats: T is
// float, or a vector type whose comparisons give a mask that `? :` selects by.
#pragma once

#include "macros.h"

namespace rlkern {

template <typename T>
RLKERN_INLINE T magnitude(T x) {
  return x < 0.0f ? -x : x;
}

// expm1(x) - x as its series, where |x| is below kExpm1Series: the first term left out is 1e-7 of
// the sum there.
constexpr float kExpm1Series = 0.35f;
template <typename T>
RLKERN_INLINE T expm1_less_series(T x) {
  T p = x * (1.0f / 5040.0f) + 1.0f / 720.0f;
  p = x * p + 1.0f / 120.0f;
  p = x * p + 1.0f / 24.0f;
  p = x * p + 1.0f / 6.0f;
  p = x * p + 0.5f;
  return x * x * p;
}

// expm1(x) - x without its cancellation.
template <typename T>
RLKERN_INLINE T expm1_less(T x, T expm1_x) {
  return magnitude(x) < kExpm1Series ? expm1_less_series(x) : expm1_x - x;
}

// log1p(w) = 2 atanh(s) with s = w / (2 + w): what lies between it and 2 s, for w in
// [sqrt(1/2) - 1, sqrt(2) - 1], with an error of 1e-9 of the sum.
template <typename T>
RLKERN_INLINE T atanh_tail(T s) {
  const T square = s * s;
  const T high = square * (2.0f / 9.0f) + 2.0f / 7.0f;
  return s * square * (square * (square * high + 2.0f / 5.0f) + 2.0f / 3.0f);
}

// w - log1p(w) without its cancellation.
template <typename T>
RLKERN_INLINE T less_log1p(T w, T log1p_w) {
  const T s = w / (w + 2.0f);
  return ((w > -0.29f) & (w < 0.41f)) ? w * s - atanh_tail(s) : w - log1p_w;
}

}  // namespace rlkern

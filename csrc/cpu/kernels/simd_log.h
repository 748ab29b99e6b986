// The logarithm of vectors of floats. Included before what asks for it by name.
#pragma once

#include "simd.h"

// After simd.h, whose overloads it is to find.
#include "../../common/elementary.h"

// 1 + w = 2^k m with m in [sqrt(1/2), sqrt(2)): log1p(w) = k log 2 + 2 atanh(f / (2 + f)), f = m -
// 1, which is w itself where k is 0, so that a small one loses nothing. For w above -1.
RLKERN_INLINE rlkern::vfloat rl_log1p(rlkern::vfloat w) {
  using namespace rlkern;
  const vint bits = (vint)(w + 1.0f);
  const vint k = (bits - 0x3f3504f3) >> 23;
  const vfloat f = k == 0 ? w : (vfloat)(bits - (k << 23)) - 1.0f;
  const vfloat s = f / (f + 2.0f);
  return __builtin_convertvector(k, vfloat) * 0.693147181f + (2.0f * s + atanh_tail(s));
}

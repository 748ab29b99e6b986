// How the row passes take the values of a row: a softcap, and vectors that a row does not fill.
#pragma once

#include "simd.h"

namespace rlkern {
namespace {

constexpr float kLog2e = 1.4426950408889634f;

// y = c * tanh(x / c) and its derivative. With e = exp(-2 |u|): tanh |u| = (1 - e) / (1 + e) and
// 1 - tanh^2 = 4 e / (1 + e)^2, neither of which cancels.
struct Cap {
  float cap;
  Exp2Scale scale;
  explicit __attribute__((always_inline)) Cap(float softcap)
      : cap(softcap), scale(softcap > 0 ? 2 * kLog2e / softcap : 1.0f) {}

  __attribute__((always_inline)) Exp2 exp_of(vfloat x) const {
    return exp2_scaled<true>((vfloat)((vuint)x | 0x80000000u), scale);
  }
  __attribute__((always_inline)) vfloat value(vfloat x) const {
    const vfloat minus = exp_of(x).minus_one();
    const vfloat magnitude = cap * (-minus / (minus + 2.0f));
    return (vfloat)((vuint)magnitude | ((vuint)x & 0x80000000u));
  }
  __attribute__((always_inline)) vfloat derivative(vfloat x) const {
    const vfloat e = exp_of(x).value();
    return 4.0f * e / ((1.0f + e) * (1.0f + e));
  }
};

// Values that do not fill what they are loaded into, with zeros behind them.
template <typename Type, int kValues>
struct Padded {
  typename Type::Scalar values[kValues] = {};
  __attribute__((always_inline)) Padded() {}
  __attribute__((always_inline)) Padded(const typename Type::Scalar* x, long long count) {
    __builtin_memcpy(values, x, count * sizeof(typename Type::Scalar));
  }
  __attribute__((always_inline)) void write(typename Type::Scalar* x, long long count) const {
    __builtin_memcpy(x, values, count * sizeof(typename Type::Scalar));
  }
};

template <typename Type>
RLKERN_INLINE vfloat load_partial(const typename Type::Scalar* x, long long count) {
  return Type::load(Padded<Type, kLanes>(x, count).values);
}

template <typename Type>
RLKERN_INLINE VectorPair load_partial_pair(const typename Type::Scalar* x, long long count) {
  return Type::load_pair(Padded<Type, kPair>(x, count).values);
}

template <typename Type>
RLKERN_INLINE void store_partial(typename Type::Scalar* x, vfloat v, long long count) {
  Padded<Type, kLanes> padded;
  Type::store(padded.values, v);
  padded.write(x, count);
}

template <typename Type>
RLKERN_INLINE void store_partial_pair(typename Type::Scalar* x, const VectorPair& v,
                                      long long count) {
  Padded<Type, kPair> padded;
  Type::store_pair(padded.values, v);
  padded.write(x, count);
}

// A NaN without a payload, which survives the rounding to bfloat16 as NaN.
RLKERN_INLINE float plain_nan(float x) { return x != x ? __builtin_nanf("") : x; }

}  // namespace
}  // namespace rlkern

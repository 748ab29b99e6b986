// x_t = a_t + g x_{t+1} over the lanes of one vector of doubles, the last lane's successor being
// given: log2(lanes) steps instead of a chain as long as the vector.
#pragma once

#include "simd.h"

namespace rlkern {
namespace {

constexpr int kSteps = RLKERN_VECTOR_BYTES / 8;

typedef double vdouble __attribute__((vector_size(RLKERN_VECTOR_BYTES)));
typedef float vsingle __attribute__((vector_size(RLKERN_VECTOR_BYTES / 2)));

RLKERN_INLINE vdouble load_widened(const float* p) {
  vsingle v;
  __builtin_memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, vdouble);
}

RLKERN_INLINE void store_narrowed(float* p, vdouble x) {
  const vsingle v = __builtin_convertvector(x, vsingle);
  __builtin_memcpy(p, &v, sizeof v);
}

// Lane i takes what lane i + kBy holds, the last ones what `fill` holds in all its lanes.
template <int kBy>
RLKERN_INLINE vdouble shifted(vdouble v, double fill) {
  const vdouble filled = fill - vdouble{};
#if RLKERN_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return (vdouble)_mm512_alignr_epi64((__m512i)filled, (__m512i)v, kBy);
#elif RLKERN_VECTOR_BYTES == 32 && defined(__AVX2__)
  const __m256d upper = _mm256_permute2f128_pd((__m256d)v, (__m256d)filled, 0x21);
  if (kBy == 2) return (vdouble)upper;
  return (vdouble)_mm256_shuffle_pd((__m256d)v, upper, 0x5);
#else
  vdouble out = filled;
  for (int i = 0; i + kBy < kSteps; ++i) out[i] = v[i + kBy];
  return out;
#endif
}

struct BlockScan {
  double g, g2, g4;
  vdouble to_end;  // g^(kSteps - lane)

  explicit __attribute__((always_inline)) BlockScan(double factor)
      : g(factor), g2(g * g), g4(g2 * g2) {
    double power = 1;
    for (int i = kSteps - 1; i >= 0; --i) to_end[i] = power *= g;
  }
  // Zeros are shifted in rather than terms multiplied by 0: a NaN reaches the lanes before it, and
  // none after.
  __attribute__((always_inline)) vdouble operator()(vdouble a, double next) const {
    a += g * shifted<1>(a, 0);
    if (kSteps > 2) a += g2 * shifted<2>(a, 0);
    if (kSteps > 4) a += g4 * shifted<4>(a, 0);
    return a + to_end * next;
  }
};

}  // namespace
}  // namespace rlkern

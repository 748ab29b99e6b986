// Vectors of doubles, as wide as those of floats in simd.h.
#pragma once

#include "simd.h"

namespace rlkern {
namespace {

constexpr int kDoubles = RLKERN_VECTOR_BYTES / 8;

typedef double vdouble __attribute__((vector_size(RLKERN_VECTOR_BYTES)));
typedef long long vlong __attribute__((vector_size(RLKERN_VECTOR_BYTES)));
RLKERN_INLINE vdouble broadcast_double(double x) { return x - vdouble{}; }

// Converted by instruction: through vectors of half the width the compiler goes in parts.
RLKERN_INLINE vdouble load_widened(const float* p) {
#if RLKERN_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return (vdouble)_mm512_cvtps_pd(_mm256_loadu_ps(p));
#elif RLKERN_VECTOR_BYTES == 32 && defined(__AVX2__)
  return (vdouble)_mm256_cvtps_pd(_mm_loadu_ps(p));
#else
  vdouble v;
  for (int i = 0; i < kDoubles; ++i) v[i] = p[i];
  return v;
#endif
}

RLKERN_INLINE void store_narrowed(float* p, vdouble x) {
#if RLKERN_VECTOR_BYTES == 64 && defined(__AVX512F__)
  _mm256_storeu_ps(p, _mm512_cvtpd_ps((__m512d)x));
#elif RLKERN_VECTOR_BYTES == 32 && defined(__AVX2__)
  _mm_storeu_ps(p, _mm256_cvtpd_ps((__m256d)x));
#else
  for (int i = 0; i < kDoubles; ++i) p[i] = (float)x[i];
#endif
}

// As many bytes as a vector has doubles.
typedef unsigned char vflag __attribute__((vector_size(RLKERN_VECTOR_BYTES / 8)));

RLKERN_INLINE vlong flags(const unsigned char* p) {
  vflag v;
  __builtin_memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, vlong) != 0;
}

// True in the first `count` lanes.
RLKERN_INLINE vlong lanes_under(long long count) {
  vlong lane;
  for (int i = 0; i < kDoubles; ++i) lane[i] = i;
  return lane < count;
}

RLKERN_INLINE double lane_sum(vdouble v) {
#if RLKERN_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return _mm512_reduce_add_pd((__m512d)v);
#else
  double sum = 0;
  for (int i = 0; i < kDoubles; ++i) sum += v[i];
  return sum;
#endif
}

// Lane i takes what lane i + kBy holds, the last ones take `fill`.
template <int kBy>
RLKERN_INLINE vdouble shifted(vdouble v, double fill) {
  const vdouble filled = broadcast_double(fill);
#if RLKERN_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return (vdouble)_mm512_alignr_epi64((__m512i)filled, (__m512i)v, kBy);
#elif RLKERN_VECTOR_BYTES == 32 && defined(__AVX2__)
  const __m256d upper = _mm256_permute2f128_pd((__m256d)v, (__m256d)filled, 0x21);
  if (kBy == 2) return (vdouble)upper;
  return (vdouble)_mm256_shuffle_pd((__m256d)v, upper, 0x5);
#else
  vdouble out = filled;
  for (int i = 0; i + kBy < kDoubles; ++i) out[i] = v[i + kBy];
  return out;
#endif
}

RLKERN_INLINE vdouble at_most(vdouble x, double bound) {
  return x > bound ? broadcast_double(bound) : x;
}

// False where a lane is NaN.
RLKERN_INLINE bool all_within(vdouble x, double bound) {
#if RLKERN_VECTOR_BYTES == 64 && defined(__AVX512F__)
  const __m512d size = _mm512_abs_pd((__m512d)x);
  return _mm512_cmp_pd_mask(size, _mm512_set1_pd(bound), _CMP_LE_OQ) == 0xff;
#else
  bool all = true;
  for (int i = 0; i < kDoubles; ++i) all &= x[i] >= -bound && x[i] <= bound;
  return all;
#endif
}

// e^x for |x| of at most some 700, to 3 ulp.
RLKERN_INLINE vdouble exp_moderate(vdouble x) {
  // Adding 1.5 * 2^52 rounds to an integer in the low bits; 1023 more makes it an exponent.
  constexpr double kMagic = 6755399441055744.0 + 1023.0;
  // ln 2 in two parts, the first so short that its product with an exponent is exact.
  constexpr double kHigh = 6.93147180369123816490e-01, kLow = 1.90821492927058770002e-10;
  const vdouble shifted = x * 1.4426950408889634 + kMagic;
  const vdouble n = shifted - kMagic;
  const vdouble f = (x - n * kHigh) - n * kLow;
  // Taylor's terms up to f^12 / 12!: for |f| <= ln 2 / 2 the next one is 1.7e-16.
  vdouble sum = broadcast_double(1.0 / 479001600);
  constexpr double kInverse[] = {1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320,
                                 1.0 / 5040,     1.0 / 720,     1.0 / 120,    1.0 / 24,
                                 1.0 / 6,        0.5,           1.0,          1.0};
  for (const double term : kInverse) sum = sum * f + term;
  return sum * (vdouble)((vlong)shifted << 52);
}

}  // namespace
}  // namespace rlkern

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

RLKERN_INLINE vlong lane_numbers() {
  vlong lane;
  for (int i = 0; i < kDoubles; ++i) lane[i] = i;
  return lane;
}

// True in the first `count` lanes.
RLKERN_INLINE vlong lanes_under(long long count) { return lane_numbers() < count; }

// Writes those lanes of `v` that `selected` names, in order, and says how many; what is behind them
// is written over, up to a vector's length.
RLKERN_INLINE int store_selected(long long* p, vlong v, vlong selected) {
#if RLKERN_VECTOR_BYTES == 64 && defined(__AVX512F__)
  const __mmask8 mask = _mm512_movepi64_mask((__m512i)selected);
  _mm512_storeu_si512(p, _mm512_maskz_compress_epi64(mask, (__m512i)v));
  return __builtin_popcount(mask);
#else
  int count = 0;
  for (int i = 0; i < kDoubles; ++i) {
    p[count] = v[i];
    count += selected[i] != 0;
  }
  return count;
#endif
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

RLKERN_INLINE void lane_sums(vdouble a, vdouble b, double* sum_a, double* sum_b) {
#if RLKERN_VECTOR_BYTES == 64 && defined(__AVX512F__)
  // Both at once: neighbours first, then halves.
  const __m512d pairs =
      _mm512_unpacklo_pd((__m512d)a, (__m512d)b) + _mm512_unpackhi_pd((__m512d)a, (__m512d)b);
  const __m256d four = _mm512_castpd512_pd256(pairs) + _mm512_extractf64x4_pd(pairs, 1);
  const __m128d two = _mm256_castpd256_pd128(four) + _mm256_extractf128_pd(four, 1);
  *sum_a = two[0];
  *sum_b = two[1];
#else
  *sum_a = lane_sum(a);
  *sum_b = lane_sum(b);
#endif
}

// Records of four doubles, one a lane.
struct Columns {
  vdouble x[4];
};

RLKERN_INLINE Columns load_columns(const double (*records)[4]) {
  Columns c;
#if RLKERN_VECTOR_BYTES == 64 && defined(__AVX512F__)
  const __m512i low = _mm512_setr_epi64(0, 4, 8, 12, 1, 5, 9, 13);
  const __m512i high = _mm512_setr_epi64(2, 6, 10, 14, 3, 7, 11, 15);
  const __m512d r01 = _mm512_loadu_pd(records[0]), r23 = _mm512_loadu_pd(records[2]);
  const __m512d r45 = _mm512_loadu_pd(records[4]), r67 = _mm512_loadu_pd(records[6]);
  const __m512d low03 = _mm512_permutex2var_pd(r01, low, r23);
  const __m512d low47 = _mm512_permutex2var_pd(r45, low, r67);
  const __m512d high03 = _mm512_permutex2var_pd(r01, high, r23);
  const __m512d high47 = _mm512_permutex2var_pd(r45, high, r67);
  c.x[0] = (vdouble)_mm512_shuffle_f64x2(low03, low47, 0x44);
  c.x[1] = (vdouble)_mm512_shuffle_f64x2(low03, low47, 0xee);
  c.x[2] = (vdouble)_mm512_shuffle_f64x2(high03, high47, 0x44);
  c.x[3] = (vdouble)_mm512_shuffle_f64x2(high03, high47, 0xee);
#else
  for (int k = 0; k < 4; ++k) {
    for (int i = 0; i < kDoubles; ++i) c.x[k][i] = records[i][k];
  }
#endif
  return c;
}

// Records of two doubles, one a lane: those at `at` less `base`. A gather would take them one by
// one as well, and twice as many.
RLKERN_INLINE void gather_pairs(const double (*records)[2], const long long* at, long long base,
                                vdouble* first, vdouble* second) {
#if RLKERN_VECTOR_BYTES == 64 && defined(__AVX512F__)
  const auto one = [records, at, base](int i) __attribute__((always_inline)) {
    return _mm_loadu_pd(records[at[i] - base]);
  };
  const auto four = [one](int i) __attribute__((always_inline)) {
    const __m256d a = _mm256_insertf128_pd(_mm256_castpd128_pd256(one(i)), one(i + 2), 1);
    const __m256d b = _mm256_insertf128_pd(_mm256_castpd128_pd256(one(i + 4)), one(i + 6), 1);
    return _mm512_insertf64x4(_mm512_castpd256_pd512(a), b, 1);
  };
  const __m512d even = four(0), odd = four(1);
  *first = (vdouble)_mm512_unpacklo_pd(even, odd);
  *second = (vdouble)_mm512_unpackhi_pd(even, odd);
#else
  for (int i = 0; i < kDoubles; ++i) {
    (*first)[i] = records[at[i] - base][0];
    (*second)[i] = records[at[i] - base][1];
  }
#endif
}

// The same in a row, written.
RLKERN_INLINE void store_pairs(double (*records)[2], vdouble first, vdouble second) {
#if RLKERN_VECTOR_BYTES == 64 && defined(__AVX512F__)
  const __m512i low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  const __m512i high = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  _mm512_storeu_pd(records[0], _mm512_permutex2var_pd((__m512d)first, low, (__m512d)second));
  _mm512_storeu_pd(records[4], _mm512_permutex2var_pd((__m512d)first, high, (__m512d)second));
#else
  for (int i = 0; i < kDoubles; ++i) {
    records[i][0] = first[i];
    records[i][1] = second[i];
  }
#endif
}

RLKERN_INLINE vdouble square_root(vdouble x) {
#if RLKERN_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return (vdouble)_mm512_sqrt_pd((__m512d)x);
#elif RLKERN_VECTOR_BYTES == 32 && defined(__AVX2__)
  return (vdouble)_mm256_sqrt_pd((__m256d)x);
#else
  for (int i = 0; i < kDoubles; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
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

RLKERN_INLINE bool has_nan(vdouble x) {
#if RLKERN_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return _mm512_cmp_pd_mask((__m512d)x, (__m512d)x, _CMP_UNORD_Q) != 0;
#else
  bool any = false;
  for (int i = 0; i < kDoubles; ++i) any |= x[i] != x[i];
  return any;
#endif
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

// Vectors of doubles and of 64-bit integers, in the width of simd.h's floats.
#pragma once

#include "simd.h"

namespace rlkern {
namespace {

constexpr int kWide = RLKERN_VECTOR_BYTES / 8;

typedef double vdouble __attribute__((vector_size(RLKERN_VECTOR_BYTES)));
typedef long long vlong __attribute__((vector_size(RLKERN_VECTOR_BYTES)));
// As many floats and bytes as a vector has doubles.
typedef float vsingle __attribute__((vector_size(RLKERN_VECTOR_BYTES / 2)));
typedef unsigned char vflag __attribute__((vector_size(RLKERN_VECTOR_BYTES / 8)));

RLKERN_INLINE vdouble widened(const float* p) {
  vsingle v;
  __builtin_memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, vdouble);
}

RLKERN_INLINE void narrowed(float* p, vdouble v) {
  const vsingle narrow = __builtin_convertvector(v, vsingle);
  __builtin_memcpy(p, &narrow, sizeof narrow);
}

RLKERN_INLINE vlong flags(const unsigned char* p) {
  vflag v;
  __builtin_memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, vlong) != 0;
}

// True in the first `count` lanes.
RLKERN_INLINE vlong lanes_under(long long count) {
  vlong lane;
  for (int i = 0; i < kWide; ++i) lane[i] = i;
  return lane < count;
}

RLKERN_INLINE double lane_sum(vdouble v) {
#if RLKERN_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return _mm512_reduce_add_pd((__m512d)v);
#else
  double sum = 0;
  for (int i = 0; i < kWide; ++i) sum += v[i];
  return sum;
#endif
}

}  // namespace
}  // namespace rlkern

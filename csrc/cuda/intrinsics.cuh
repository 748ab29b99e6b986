// The instructions that kernels use by name. Each has a plain C++ form, so that kernel bodies run
// on a CPU in the tests (tests/cuda/shim.h brings threads, barriers and shuffles).
#pragma once

#include <cstdint>
#include <cstring>

#include "../common/macros.h"

namespace rlkern {

// 16 bytes, as one load or store moves them.
struct alignas(16) Pack {
  uint32_t word[4];
};

RLKERN_INLINE float bits_to_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

RLKERN_INLINE uint32_t float_to_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

RLKERN_INLINE double bits_to_double(uint64_t bits) {
#if defined(__CUDA_ARCH__)
  return __longlong_as_double(static_cast<long long>(bits));
#else
  double x;
  memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

RLKERN_INLINE uint64_t double_to_bits(double x) {
#if defined(__CUDA_ARCH__)
  return static_cast<uint64_t>(__double_as_longlong(x));
#else
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

// ---- memory -----------------------------------------------------------------------------------

// Read once: it need not stay in the first-level cache; the second level may keep it for a second
// walk. Not ld.global.nc, since a kernel may write over what all its threads have read.
RLKERN_INLINE Pack load_pack_streamed(const void* aligned) {
  Pack p;
#if defined(__CUDA_ARCH__)
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(p.word[0]), "=r"(p.word[1]), "=r"(p.word[2]), "=r"(p.word[3])
               : "l"(aligned));
#else
  memcpy(&p, aligned, sizeof p);
#endif
  return p;
}

// Memory that neighbouring threads read as well, or that the block keeps.
RLKERN_INLINE Pack load_pack(const void* aligned) {
  Pack p;
#if defined(__CUDA_ARCH__)
  const uint4 v = *static_cast<const uint4*>(aligned);
  p = {{v.x, v.y, v.z, v.w}};
#else
  memcpy(&p, aligned, sizeof p);
#endif
  return p;
}

RLKERN_INLINE uint32_t load_word(const void* aligned) {
#if defined(__CUDA_ARCH__)
  return *static_cast<const uint32_t*>(aligned);
#else
  uint32_t word;
  memcpy(&word, aligned, sizeof word);
  return word;
#endif
}

RLKERN_INLINE void store_pack(void* aligned, const Pack& p) {
#if defined(__CUDA_ARCH__)
  *static_cast<uint4*>(aligned) = make_uint4(p.word[0], p.word[1], p.word[2], p.word[3]);
#else
  memcpy(aligned, &p, sizeof p);
#endif
}

// The low word of (high : low) shifted right by `bits` < 32.
RLKERN_INLINE uint32_t funnel_shift(uint32_t low, uint32_t high, unsigned bits) {
#if defined(__CUDA_ARCH__)
  return __funnelshift_r(low, high, bits);
#else
  return static_cast<uint32_t>(((static_cast<uint64_t>(high) << 32) | low) >> bits);
#endif
}

// ---- arithmetic -------------------------------------------------------------------------------
//
// Products and sums that the compiler must not contract: a value that is computed in two places
// has to come out the same in both.

RLKERN_INLINE float mul(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

RLKERN_INLINE float add(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

RLKERN_INLINE float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

// The larger of both, dropping a NaN.
RLKERN_INLINE float larger(float a, float b) {
#if defined(__CUDA_ARCH__)
  return fmaxf(a, b);
#else
  return __builtin_fmaxf(a, b);
#endif
}

// 2^x to 2 ulp; 0 below the normal numbers.
RLKERN_INLINE float exp2_fast(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return x < -126.0f ? 0.0f : __builtin_exp2f(x);
#endif
}

// 1 / x to 1 ulp, for x in [1, 2].
RLKERN_INLINE float reciprocal_fast(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

}  // namespace rlkern

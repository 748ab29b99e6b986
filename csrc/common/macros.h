// What lets one header serve the host compilers, the per-instruction-set leaf files and nvcc.
#pragma once

// Always inlined, and static: the leaf files are compiled once per instruction set, and a weak
// symbol of an inline function would be merged across them, so that an AVX-512 copy could end up
// running on a machine without AVX-512.
#if defined(__CUDACC__)
#define RLKERN_INLINE static __host__ __device__ __forceinline__
// For members of structs that kernels use.
#define RLKERN_HD __host__ __device__ __forceinline__
// What uses the threads of a block.
#define RLKERN_DEVICE static __device__ __forceinline__
#else
// Always, for the reason above: a member that is not inlined would be a weak symbol too.
#define RLKERN_HD inline __attribute__((always_inline))
#define RLKERN_DEVICE static inline
#define RLKERN_INLINE static inline __attribute__((always_inline))
#endif

// The elementary functions without <cmath>, whose overloads are such weak symbols.
#if defined(__CUDA_ARCH__)
RLKERN_INLINE float rl_exp(float x) { return ::expf(x); }
RLKERN_INLINE float rl_expm1(float x) { return ::expm1f(x); }
RLKERN_INLINE float rl_log(float x) { return ::logf(x); }
RLKERN_INLINE float rl_log1p(float x) { return ::log1pf(x); }
RLKERN_INLINE double rl_exp(double x) { return ::exp(x); }
RLKERN_INLINE double rl_expm1(double x) { return ::expm1(x); }
RLKERN_INLINE double rl_log(double x) { return ::log(x); }
RLKERN_INLINE double rl_log1p(double x) { return ::log1p(x); }
RLKERN_INLINE float rl_rint(float x) { return ::rintf(x); }
#else
RLKERN_INLINE float rl_exp(float x) { return __builtin_expf(x); }
RLKERN_INLINE float rl_expm1(float x) { return __builtin_expm1f(x); }
RLKERN_INLINE float rl_log(float x) { return __builtin_logf(x); }
RLKERN_INLINE float rl_log1p(float x) { return __builtin_log1pf(x); }
RLKERN_INLINE double rl_exp(double x) { return __builtin_exp(x); }
RLKERN_INLINE double rl_expm1(double x) { return __builtin_expm1(x); }
RLKERN_INLINE double rl_log(double x) { return __builtin_log(x); }
RLKERN_INLINE double rl_log1p(double x) { return __builtin_log1p(x); }
RLKERN_INLINE float rl_rint(float x) { return __builtin_rintf(x); }
#endif

// exp(x), and exp(x) - 1 without cancellation.
RLKERN_INLINE float rl_exp_expm1(float x, float* expm1_x) {
  *expm1_x = rl_expm1(x);
  return rl_exp(x);
}

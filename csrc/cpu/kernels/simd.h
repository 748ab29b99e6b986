// Vectors of floats by the compiler's vector extension: one source for every instruction set,
// whose register width comes from the build as RLKERN_VECTOR_BYTES. Intrinsics stand only where
// the compiler does not find the instruction by itself.
#pragma once

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "../../common/macros.h"

namespace rlkern {
namespace {

constexpr int kLanes = RLKERN_VECTOR_BYTES / 4;

typedef float vfloat __attribute__((vector_size(RLKERN_VECTOR_BYTES)));
typedef int vint __attribute__((vector_size(RLKERN_VECTOR_BYTES)));
typedef unsigned vuint __attribute__((vector_size(RLKERN_VECTOR_BYTES)));
typedef unsigned short vhalf __attribute__((vector_size(RLKERN_VECTOR_BYTES / 2)));

constexpr float kInf = __builtin_inff();

RLKERN_INLINE vfloat broadcast(float x) { return x - vfloat{}; }

// The larger of both, and `x` where x is NaN: so a NaN passes a clamp from below.
RLKERN_INLINE vfloat max_keep_nan(float low, vfloat x) {
#if RLKERN_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return (vfloat)_mm512_max_ps((__m512)broadcast(low), (__m512)x);
#elif RLKERN_VECTOR_BYTES == 32 && defined(__AVX2__)
  return (vfloat)_mm256_max_ps((__m256)broadcast(low), (__m256)x);
#else
  return x < low ? broadcast(low) : x;
#endif
}

// The smaller of both, and `x` where x is NaN.
RLKERN_INLINE vfloat min_keep_nan(float high, vfloat x) {
#if RLKERN_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return (vfloat)_mm512_min_ps((__m512)broadcast(high), (__m512)x);
#elif RLKERN_VECTOR_BYTES == 32 && defined(__AVX2__)
  return (vfloat)_mm256_min_ps((__m256)broadcast(high), (__m256)x);
#else
  return x > high ? broadcast(high) : x;
#endif
}

// What csrc/common has for any type, in fewer instructions.
RLKERN_INLINE vfloat magnitude(vfloat x) { return (vfloat)((vuint)x & 0x7fffffffu); }
RLKERN_INLINE vfloat clamped(vfloat x, float low, float high) {
  return min_keep_nan(high, max_keep_nan(low, x));
}

// The larger of both, and `a` where b is NaN: so a NaN never becomes a maximum.
RLKERN_INLINE vfloat max_drop_nan(vfloat a, vfloat b) {
#if RLKERN_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return (vfloat)_mm512_max_ps((__m512)b, (__m512)a);
#elif RLKERN_VECTOR_BYTES == 32 && defined(__AVX2__)
  return (vfloat)_mm256_max_ps((__m256)b, (__m256)a);
#else
  return b > a ? b : a;
#endif
}

RLKERN_INLINE float reduce_max(vfloat v) {
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

RLKERN_INLINE float reduce_sum(vfloat v) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

// 16-bit values widened, and narrowed where they fit. Left to itself the compiler shuffles for
// long.
RLKERN_INLINE vuint widen(vhalf h) {
#if RLKERN_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return (vuint)_mm512_cvtepu16_epi32((__m256i)h);
#elif RLKERN_VECTOR_BYTES == 32 && defined(__AVX2__)
  return (vuint)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, vuint);
#endif
}

RLKERN_INLINE vint widen_bytes(const unsigned char* p) {
#if RLKERN_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return (vint)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif RLKERN_VECTOR_BYTES == 32 && defined(__AVX2__)
  return (vint)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  vint v;
  for (int i = 0; i < kLanes; ++i) v[i] = p[i];
  return v;
#endif
}

RLKERN_INLINE vhalf narrow(vuint v) {
#if RLKERN_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return (vhalf)_mm512_cvtepi32_epi16((__m512i)v);
#elif RLKERN_VECTOR_BYTES == 32 && defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)v, (__m256i)v);
  return (vhalf)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(v, vhalf);
#endif
}

// 2^t as scale * (1 + fraction), for t = d * k with k > 0 and t at most about 0. Below -126.5 the
// scale, and so the result, is exactly 0 (d = -inf included); NaN gives NaN. The fraction's
// polynomials are minimax on [-1/2, 1/2], with an error relative to 2^t of 9.2e-8, and of 2.0e-9
// where the fraction itself, 2^t - 1 near t = 0, has to be good to fp32.
struct Exp2 {
  vfloat clamped;  // d, no lower than where the result is 0: finite for d = -inf
  vfloat scale;
  vfloat fraction;

  vfloat __attribute__((always_inline)) value() const { return scale + scale * fraction; }
  // 2^t - 1 without cancellation.
  vfloat __attribute__((always_inline)) minus_one() const {
    return scale * fraction + (scale - 1.0f);
  }
};

struct Exp2Scale {
  float k;
  float low;
  // The clamp keeps a margin of 1/2: t is then at least -127.49, which still rounds to -127.
  explicit __attribute__((always_inline)) Exp2Scale(float k_) : k(k_) {
    low = -127.25f / k;
    if (low < -3.0e38f) low = -3.0e38f;
  }
};

template <bool kFraction = false>
RLKERN_INLINE Exp2 exp2_scaled(vfloat d, Exp2Scale scale) {
  // Adding 1.5 * 2^23 rounds t to an integer in the low bits; 127 more makes it an exponent.
  constexpr float kMagic = 12582912.0f + 127.0f;
  Exp2 e;
  e.clamped = max_keep_nan(scale.low, d);
  const vfloat shifted = e.clamped * scale.k + kMagic;
  const vfloat f = e.clamped * scale.k - (shifted - kMagic);
  e.scale = (vfloat)((vuint)shifted << 23);
  if (kFraction) {
    const vfloat high = 0.009618437f + f * (0.0013398875f + f * 0.00015353362f);
    e.fraction = f * (0.6931472f + f * (0.24022648f + f * (0.055503324f + f * high)));
  } else {
    const vfloat high = 0.009671513f + f * 0.0013264727f;
    e.fraction = f * (0.693147f + f * (0.24022242f + f * (0.055507336f + f * high)));
  }
  return e;
}

// e^x for any x, as 2^n (1 + fraction) halved, so that neither part overflows before the whole.
struct Exp {
  vfloat half_scale;
  vfloat fraction;

  vfloat __attribute__((always_inline)) value() const {
    return 2.0f * (half_scale + half_scale * fraction);
  }
  vfloat __attribute__((always_inline)) minus_one() const {
    return 2.0f * (half_scale * fraction + (half_scale - 0.5f));
  }
};

// Relative error of e^x 1.3e-7, of e^x - 1 near 0 the same. Below e^-86.9 the result is 0, from
// 2^128 on infinity; a NaN stays.
RLKERN_INLINE Exp exp_parts(vfloat x) {
  constexpr float kMagic = 12582912.0f + 126.0f;  // see exp2_scaled; one less halves the scale
  constexpr float kHigh = 1.44269502f, kLow = 1.92596299e-8f;  // log2(e) in two parts
  x = clamped(x, -87.6f, 88.7228394f);  // up to 2^128, whose fraction is 0 or more
  const vfloat shifted = x * kHigh + kMagic;
  const vfloat f = (x * kHigh - (shifted - kMagic)) + x * kLow;
  const vfloat high = 0.009618437f + f * (0.0013398875f + f * 0.00015353362f);
  Exp e;
  e.half_scale = (vfloat)((vuint)shifted << 23);
  e.fraction = f * (0.6931472f + f * (0.24022648f + f * (0.055503324f + f * high)));
  return e;
}

// ---- loads and stores -----------------------------------------------------------------------

// Two vectors of consecutive values, for passes that do not ask which value stands in which lane.
constexpr int kPair = 2 * kLanes;
struct VectorPair {
  vfloat first, second;
};

// Where value i of a row stands among values that were stored pair by pair.
template <typename Type>
RLKERN_INLINE long long slot(long long i) {
  return i / kPair * kPair + Type::lane(static_cast<int>(i % kPair));
}

// A pair in the order of its values.
template <typename Type>
struct InOrder {
  template <typename Scalar>
  RLKERN_INLINE VectorPair load_pair(const Scalar* p) {
    return {Type::load(p), Type::load(p + kLanes)};
  }
  template <typename Scalar>
  RLKERN_INLINE void store_pair(Scalar* p, const VectorPair& v) {
    Type::store(p, v.first);
    Type::store(p + kLanes, v.second);
  }
  RLKERN_INLINE int lane(int i) { return i; }
};

struct FloatType : InOrder<FloatType> {
  typedef float Scalar;
  RLKERN_INLINE vfloat load(const Scalar* p) {
    vfloat v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  RLKERN_INLINE void store(Scalar* p, vfloat v) { __builtin_memcpy(p, &v, sizeof v); }
};

struct BFloat16Type {
  typedef unsigned short Scalar;
  RLKERN_INLINE vfloat load(const Scalar* p) {
    vhalf h;
    __builtin_memcpy(&h, p, sizeof h);
    return (vfloat)(widen(h) << 16);
  }
  // To nearest, ties to even. A NaN must have its low 15 bits 0 (row_kernels.cpp sees to it), or
  // the rounding could carry it over to another number.
  RLKERN_INLINE void store(Scalar* p, vfloat v) {
    const vhalf h = narrow(rounded(v) >> 16);
    __builtin_memcpy(p, &h, sizeof h);
  }
  // In the upper half of each lane; what is below it is of no meaning.
  RLKERN_INLINE vuint rounded(vfloat v) {
    const vuint bits = (vuint)v;
    return bits + 0x7fffu + ((bits >> 16) & 1u);
  }

  // Values of even places in the first vector, of odd ones in the second: a shift and a mask take
  // the place of the shuffles that widen and narrow.
  RLKERN_INLINE VectorPair load_pair(const Scalar* p) {
    vuint both;
    __builtin_memcpy(&both, p, sizeof both);
    return {(vfloat)(both << 16), (vfloat)(both & 0xffff0000u)};
  }
  RLKERN_INLINE void store_pair(Scalar* p, const VectorPair& v) {
    const vuint both = (rounded(v.first) >> 16) | (rounded(v.second) & 0xffff0000u);
    __builtin_memcpy(p, &both, sizeof both);
  }
  RLKERN_INLINE int lane(int i) { return i / 2 + i % 2 * kLanes; }
};

struct HalfType : InOrder<HalfType> {
  typedef unsigned short Scalar;
  RLKERN_INLINE vfloat load(const Scalar* p) {
    vhalf h;
    __builtin_memcpy(&h, p, sizeof h);
#if RLKERN_VECTOR_BYTES == 64 && defined(__AVX512F__)
    return (vfloat)_mm512_cvtph_ps((__m256i)h);
#elif RLKERN_VECTOR_BYTES == 32 && defined(__F16C__)
    return (vfloat)_mm256_cvtph_ps((__m128i)h);
#else
    const vuint wide = widen(h);
    // The bits moved into place have an exponent too low by 112, which a product mends, for
    // subnormals too; infinity and NaN then get the exponent they need.
    const vfloat magnitude = (vfloat)((wide & 0x7fffu) << 13) * 0x1p112f;
    const vuint special = (vuint)((vint)(wide & 0x7c00u) == 0x7c00);
    return (vfloat)((vuint)magnitude | (special & 0x7f800000u) | ((wide & 0x8000u) << 16));
#endif
  }
  RLKERN_INLINE void store(Scalar* p, vfloat v) {
#if RLKERN_VECTOR_BYTES == 64 && defined(__AVX512F__)
    const vhalf h = (vhalf)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif RLKERN_VECTOR_BYTES == 32 && defined(__F16C__)
    const vhalf h = (vhalf)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
    const vuint bits = (vuint)v;
    const vuint magnitude = bits & 0x7fffffffu;
    // Subnormal results: adding 0.5 puts their last bit at the last bit of a float, rounded.
    const vuint subnormal = (vuint)((vfloat)magnitude + 0.5f) - 0x3f000000u;
    const vuint normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
    const vuint is_small = (vuint)((vint)magnitude < 0x38800000);
    const vuint is_large = (vuint)((vint)magnitude >= 0x477ff000);
    const vuint is_nan = (vuint)((vint)magnitude > 0x7f800000);
    vuint out = (subnormal & is_small) | (normal & ~is_small);
    out = (out & ~is_large) | (0x7c00u & is_large) | (0x0200u & is_nan);
    const vhalf h = narrow(out | ((bits >> 16) & 0x8000u));
#endif
    __builtin_memcpy(p, &h, sizeof h);
  }
};

}  // namespace
}  // namespace rlkern

// What csrc/common asks for by name, beside its forms for one float (macros.h).
RLKERN_INLINE rlkern::vfloat rl_exp(rlkern::vfloat x) { return rlkern::exp_parts(x).value(); }
RLKERN_INLINE rlkern::vfloat rl_expm1(rlkern::vfloat x) { return rlkern::exp_parts(x).minus_one(); }
RLKERN_INLINE rlkern::vfloat rl_exp_expm1(rlkern::vfloat x, rlkern::vfloat* expm1_x) {
  const rlkern::Exp e = rlkern::exp_parts(x);
  *expm1_x = e.minus_one();
  return e.value();
}
// Lane by lane: no loss that runs often asks for it.
RLKERN_INLINE rlkern::vfloat rl_log(rlkern::vfloat x) {
  for (int i = 0; i < rlkern::kLanes; ++i) x[i] = rl_log(x[i]);
  return x;
}

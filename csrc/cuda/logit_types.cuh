// The element types of logits: how 16 bytes of them become floats and back, and how the largest of
// many is found without widening.
#pragma once

#include "intrinsics.cuh"

namespace rlkern {

struct Float32 {
  using Scalar = uint32_t;
  static constexpr int kLanes = 4;
  static constexpr uint32_t kMinusInfinity = 0xff800000u;  // as every word of a Pack

  RLKERN_HD static float widen(Scalar bits) { return bits_to_float(bits); }
  RLKERN_HD static Scalar narrow(float x) { return float_to_bits(x); }
  RLKERN_HD static void widen(const Pack& p, float* x) {
    for (int i = 0; i < 4; ++i) x[i] = bits_to_float(p.word[i]);
  }
  RLKERN_HD static Pack narrow(const float* x) {
    return {{float_to_bits(x[0]), float_to_bits(x[1]), float_to_bits(x[2]), float_to_bits(x[3])}};
  }
  RLKERN_HD static uint32_t larger_word(uint32_t a, uint32_t b) {
    return float_to_bits(larger(bits_to_float(a), bits_to_float(b)));
  }
  RLKERN_HD static float largest_of_word(uint32_t word) { return bits_to_float(word); }
};

// What both 16-bit types share; Type widens the low 16 bits of a word and narrows two floats.
template <typename Type>
struct Packed16 {
  using Scalar = uint16_t;
  static constexpr int kLanes = 8;

  RLKERN_HD static float widen(Scalar bits) { return Type::widen_low(bits); }
  RLKERN_HD static Scalar narrow(float x) { return static_cast<Scalar>(Type::narrow2(x, 0.0f)); }
  RLKERN_HD static void widen(const Pack& p, float* x) {
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = Type::widen_low(p.word[i]);
      x[2 * i + 1] = Type::widen_high(p.word[i]);
    }
  }
  RLKERN_HD static Pack narrow(const float* x) {
    return {{Type::narrow2(x[0], x[1]), Type::narrow2(x[2], x[3]), Type::narrow2(x[4], x[5]),
             Type::narrow2(x[6], x[7])}};
  }
  RLKERN_HD static float largest_of_word(uint32_t word) {
    return larger(Type::widen_low(word), Type::widen_high(word));
  }
  // For a host: one float at a time.
  RLKERN_HD static uint32_t larger_by_float(uint32_t a, uint32_t b) {
    return Type::narrow2(larger(Type::widen_low(a), Type::widen_low(b)),
                         larger(Type::widen_high(a), Type::widen_high(b)));
  }
};

struct BFloat16 : Packed16<BFloat16> {
  static constexpr uint32_t kMinusInfinity = 0xff80ff80u;

  RLKERN_HD static float widen_low(uint32_t word) { return bits_to_float(word << 16); }
  RLKERN_HD static float widen_high(uint32_t word) { return bits_to_float(word & 0xffff0000u); }

  // To nearest, ties to even; a NaN stays one.
  RLKERN_HD static uint32_t narrow2(float low, float high) {
#if defined(__CUDA_ARCH__)
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
#else
    return narrow_one(low) | narrow_one(high) << 16;
#endif
  }
  RLKERN_HD static uint32_t larger_word(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
    uint32_t word;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
    return word;
#else
    return larger_by_float(a, b);
#endif
  }
  RLKERN_HD static uint32_t narrow_one(float x) {
    if (x != x) return 0x7fffu;
    const uint32_t bits = float_to_bits(x);
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  }
};

struct Float16 : Packed16<Float16> {
  static constexpr uint32_t kMinusInfinity = 0xfc00fc00u;

  RLKERN_HD static float widen_low(uint32_t word) {
#if defined(__CUDA_ARCH__)
    float x;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low;}"
        : "=f"(x)
        : "r"(word));
    return x;
#else
    return widen_one(word & 0xffffu);
#endif
  }
  RLKERN_HD static float widen_high(uint32_t word) {
#if defined(__CUDA_ARCH__)
    float x;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high;}"
        : "=f"(x)
        : "r"(word));
    return x;
#else
    return widen_one(word >> 16);
#endif
  }
  RLKERN_HD static uint32_t narrow2(float low, float high) {
#if defined(__CUDA_ARCH__)
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
#else
    return narrow_one(low) | narrow_one(high) << 16;
#endif
  }
  RLKERN_HD static uint32_t larger_word(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
    uint32_t word;
    asm("max.f16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
    return word;
#else
    return larger_by_float(a, b);
#endif
  }

  // The bits moved into place have an exponent too low by 112, which a product mends, for
  // subnormals too; infinity and NaN get the exponent they need.
  RLKERN_HD static float widen_one(uint32_t half) {
    const float magnitude = bits_to_float((half & 0x7fffu) << 13) * 0x1p112f;
    const uint32_t special = (half & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
    return bits_to_float(float_to_bits(magnitude) | special | (half & 0x8000u) << 16);
  }
  RLKERN_HD static uint32_t narrow_one(float x) {
    if (x != x) return 0x7fffu;
    const uint32_t sign = float_to_bits(x) >> 16 & 0x8000u;
    const uint32_t bits = float_to_bits(x) & 0x7fffffffu;
    if (bits >= 0x477ff000u) return sign | 0x7c00u;
    // Adding 0.5 puts the last bit of a subnormal at the last bit of a float, rounded.
    if (bits < 0x38800000u) return sign | (float_to_bits(bits_to_float(bits) + 0.5f) - 0x3f000000u);
    return sign | (bits + 0xfffu + ((bits >> 13) & 1u) - 0x38000000u) >> 13;
  }
};

template <typename Type>
RLKERN_INLINE Pack minus_infinity_pack() {
  const uint32_t word = Type::kMinusInfinity;
  return {{word, word, word, word}};
}

// NaN where only NaN was seen; a NaN beside numbers is dropped (the sums show it).
template <typename Type, int kCount>
RLKERN_INLINE float largest(const Pack (&packs)[kCount]) {
  uint32_t word[4];
  for (int i = 0; i < 4; ++i) word[i] = packs[0].word[i];
#pragma unroll
  for (int u = 1; u < kCount; ++u) {
#pragma unroll
    for (int i = 0; i < 4; ++i) word[i] = Type::larger_word(word[i], packs[u].word[i]);
  }
  return Type::largest_of_word(
      Type::larger_word(Type::larger_word(word[0], word[1]), Type::larger_word(word[2], word[3])));
}

}  // namespace rlkern

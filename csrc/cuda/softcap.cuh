// y = c * tanh(x / c) and its derivative on a GPU, from one exponential.
#pragma once

#include "intrinsics.cuh"

namespace rlkern {

constexpr float kLog2e = 1.4426950408889634f;

struct Softcap {
  float cap;
  float inverse;
  float exponent;

  RLKERN_HD explicit Softcap(float softcap)
      : cap(softcap), inverse(1.0f / softcap), exponent(-2.0f * kLog2e / softcap) {}

  // exp(-2 |x / c|), in [0, 1].
  RLKERN_HD float decay(float x) const {
    return exp2_fast(mul(bits_to_float(float_to_bits(x) & 0x7fffffffu), exponent));
  }

  // tanh |u| = (1 - e) / (1 + e), which cancels near 0: there tanh(u) / u is a polynomial in u^2,
  // minimax on |u| <= 0.6 with a relative error of 2.5e-9. A NaN takes the first form.
  RLKERN_HD float value(float x, float e) const {
    const float u = mul(x, inverse);
    const float w = mul(u, u);
    float p = -0.0058496439f;
    p = fused(p, w, 0.0207513491f);
    p = fused(p, w, -0.0537679835f);
    p = fused(p, w, 0.1333167963f);
    p = fused(p, w, -0.3333328283f);
    p = fused(p, w, 1.0f);
    const float near = mul(u, p);
    const float magnitude = mul(1.0f - e, reciprocal_fast(1.0f + e));
    const float far = bits_to_float(float_to_bits(magnitude) | (float_to_bits(x) & 0x80000000u));
    return mul(cap, w <= 0.36f ? near : far);
  }
  RLKERN_HD float value(float x) const { return value(x, decay(x)); }

  // 1 - tanh^2 = 4 e / (1 + e)^2 does not cancel where the cap saturates.
  RLKERN_HD float derivative(float e) const {
    const float r = reciprocal_fast(1.0f + e);
    return mul(mul(4.0f * e, r), r);
  }
};

}  // namespace rlkern

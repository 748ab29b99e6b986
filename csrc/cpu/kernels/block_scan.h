// x_t = a_t + g_t x_{t+1} over the lanes of one vector, what follows the last lane being given:
// log2(lanes) steps instead of a chain as long as the vector.
#pragma once

#include "simd_double.h"

namespace rlkern {
namespace {

// One factor for all. Zeros are shifted in rather than terms multiplied by 0: a NaN reaches the
// lanes before it, and none after.
struct BlockScan {
  vdouble g, g2, g4;
  vdouble to_end;  // g^(kDoubles - lane)

  explicit __attribute__((always_inline)) BlockScan(double factor)
      : g(broadcast_double(factor)), g2(g * g), g4(g2 * g2) {
    double power = 1;
    for (int i = kDoubles - 1; i >= 0; --i) to_end[i] = power *= factor;
  }
  __attribute__((always_inline)) vdouble operator()(vdouble a, double next) const {
    a += g * shifted<1>(a, 0);
    if constexpr (kDoubles > 2) a += g2 * shifted<2>(a, 0);
    if constexpr (kDoubles > 4) a += g4 * shifted<4>(a, 0);
    return a + to_end * next;
  }
};

template <int kBy>
RLKERN_INLINE void fold(vdouble* a, vdouble* g) {
  *a += *g * shifted<kBy>(*a, 0);
  *g *= shifted<kBy>(*g, 1);
}

// A finite factor for each.
RLKERN_INLINE vdouble block_scan(vdouble a, vdouble g, double next) {
  fold<1>(&a, &g);
  if constexpr (kDoubles > 2) fold<2>(&a, &g);
  if constexpr (kDoubles > 4) fold<4>(&a, &g);
  return a + g * next;
}

}  // namespace
}  // namespace rlkern

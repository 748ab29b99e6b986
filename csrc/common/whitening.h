// Masked whitening from the moments of what counts (the definition: rlkern/reference/whiten.py),
// for host and device.
#pragma once

#include "group_advantages.h"

namespace rlkern {

struct WhitenOptions {
  bool shift_mean;
  bool scale;
  bool unbiased;
  double eps;
  bool clamps;  // max(var, eps), else var + eps
};

constexpr int kWhitenOptionCount = 5;

inline WhitenOptions whiten_options(const double* v) {
  return {v[0] != 0, v[1] != 0, v[2] != 0, v[3], v[4] != 0};
}

// Count, mean and sum of squared deviations.
struct Moments {
  double count;
  double mean;
  double squares;
};

// Those of two batches joined (Chan, Golub and LeVeque, 1979).
RLKERN_INLINE Moments merged(const Moments& a, const Moments& b) {
  const double count = a.count + b.count;
  if (count == 0) return {0, 0, 0};
  const double step = b.mean - a.mean, share = b.count / count;
  return {count, a.mean + step * share, a.squares + b.squares + step * step * a.count * share};
}

// x -> (x - mean) * factor + offset.
struct Whitening {
  double mean;
  double factor;
  double offset;
};

// NaN where an unbiased variance of one value is asked for.
RLKERN_INLINE Whitening whitening(const WhitenOptions& o, const Moments& m) {
  if (!o.scale) return {m.mean, 1, 0};
  const double variance = m.squares / (o.unbiased ? m.count - 1 : m.count);
  const double spread = o.clamps ? (variance < o.eps ? o.eps : variance) : variance + o.eps;
  return {m.mean, 1 / square_root(spread), o.shift_mean ? 0 : m.mean};
}

RLKERN_INLINE float whitened(const Whitening& w, float x) {
  return static_cast<float>((static_cast<double>(x) - w.mean) * w.factor + w.offset);
}

}  // namespace rlkern

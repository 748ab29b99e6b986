// Moments and whitening of consecutive values, compiled once per instruction set (see
// CMakeLists.txt).

#include "whiten_kernels.h"

#include "leaf.h"
#include "simd_double.h"

namespace rlkern {
namespace {

// Sums that run side by side, so that none waits for the addition before it.
constexpr int kStreams = 4;

struct Tokens {
  const float* x;
  const unsigned char* mask;
  long long size;
};

// The sum of term(x) over the values that count, whatever the others hold.
template <bool kMasked, typename Term>
RLKERN_INLINE double sum(const Tokens& t, Term term) {
  vdouble streams[kStreams] = {};
  long long i = 0;
  for (; i + kStreams * kDoubles <= t.size; i += kStreams * kDoubles) {
    for (int s = 0; s < kStreams; ++s) {
      const long long at = i + s * kDoubles;
      const vdouble value = term(load_widened(t.x + at));
      streams[s] += kMasked ? (flags(t.mask + at) ? value : vdouble{}) : value;
    }
  }
  double total = lane_sum((streams[0] + streams[1]) + (streams[2] + streams[3]));
  for (; i < t.size; ++i) {
    if (!kMasked || t.mask[i] != 0) total += term(vdouble{} + (double)t.x[i])[0];
  }
  return total;
}

template <bool kMasked>
RLKERN_INLINE Moments moments_of(const Tokens& t) {
  long long count = t.size;
  if (kMasked) {
    count = 0;
    for (long long i = 0; i < t.size; ++i) count += t.mask[i] != 0;
  }
  if (count == 0) return {0, 0, 0};
  const double total = sum<kMasked>(t, [](vdouble x) __attribute__((always_inline)) { return x; });
  const double mean = total / (double)count;
  const double squares = sum<kMasked>(
      t, [mean](vdouble x) __attribute__((always_inline)) { return (x - mean) * (x - mean); });
  return {(double)count, mean, squares};
}

Moments moments(const float* x, const unsigned char* mask, long long size) {
  const Tokens t = {x, mask, size};
  return mask == nullptr ? moments_of<false>(t) : moments_of<true>(t);
}

template <bool kMasked>
RLKERN_INLINE void whiten_all(const Whitening& w, const Tokens& t, float* out) {
  long long i = 0;
  for (; i + kDoubles <= t.size; i += kDoubles) {
    const vdouble value = (load_widened(t.x + i) - w.mean) * w.factor + w.offset;
    store_narrowed(out + i, kMasked ? (flags(t.mask + i) ? value : vdouble{}) : value);
  }
  for (; i < t.size; ++i) out[i] = !kMasked || t.mask[i] != 0 ? whitened(w, t.x[i]) : 0;
}

void whiten(const Whitening& w, const float* x, const unsigned char* mask, long long size,
            float* out) {
  const Tokens t = {x, mask, size};
  mask == nullptr ? whiten_all<false>(w, t, out) : whiten_all<true>(w, t, out);
}

}  // namespace
}  // namespace rlkern

extern "C" const rlkern::WhitenKernels RLKERN_LEAF(rlkern_whiten_kernels) = {
    rlkern::moments,
    rlkern::whiten,
};

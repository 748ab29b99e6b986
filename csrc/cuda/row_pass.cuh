// The row pass over logits, forward: the state of every value of a row but the target's.
//
// A block reads one slice of one row. Each thread takes batches of kUnroll vectors: it loads them
// all, finds their maximum on the packed values, moves its sums to the new maximum, and adds one
// exponential an element. Threads, warps and slices are then merged in a fixed order.
#pragma once

#include "../common/formulas.h"
#include "../common/token_grid.h"
#include "row_slice.cuh"
#include "softcap.cuh"

namespace rlkern {

constexpr float kMinusInf = -__builtin_inff();

// Rows of logits and the values that belong to each.
template <typename Type>
struct LogitRows {
  const typename Type::Scalar* x;
  TokenGrid grid;
  int64_t vocab;
  TokenSpan<const int64_t> ids;
  TokenSpan<const bool> mask;
  TokenSpan<const float> token_temperature;
  float inv_temperature;
  float softcap;  // 0: none

  RLKERN_HD const typename Type::Scalar* row(TokenIndex token) const {
    return x + grid.offset(token);
  }
  RLKERN_HD bool counts(TokenIndex token) const { return !mask || mask[token]; }
  // NaN where the temperature is not a positive finite number.
  RLKERN_HD float scale(TokenIndex token) const {
    const float inv = token_temperature ? 1.0f / token_temperature[token] : inv_temperature;
    return inv > 0 && inv < -kMinusInf ? inv : __builtin_nanf("");
  }
};

// The element that a row's sums leave out: as the reference does, the first one for an id outside,
// whose result is NaN.
RLKERN_INLINE bool is_inside(int64_t id, int64_t vocab) { return id >= 0 && id < vocab; }
RLKERN_INLINE int64_t left_out(int64_t id, int64_t vocab) { return is_inside(id, vocab) ? id : 0; }

// The rounding of z = y * scale and of its exponential, the same in every place.
struct Exponent {
  float k;
  float low;  // a difference at which the exponential is 0, finite: 0 * inf never happens

  RLKERN_HD explicit Exponent(float scale) : k(kLog2e * scale), low(larger(-127.25f / k, -3e38f)) {}
  RLKERN_HD float of(float difference) const { return exp2_fast(mul(difference, k)); }
  RLKERN_HD float clamped(float difference) const { return larger(difference, low); }
};

template <int kCount>
RLKERN_INLINE float tree_sum(const float (&x)[kCount]) {
  float s[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) s[i] = x[i];
#pragma unroll
  for (int width = kCount / 2; width > 0; width /= 2) {
#pragma unroll
    for (int i = 0; i < width; ++i) s[i] = add(s[i], s[i + width]);
  }
  return s[0];
}

// Folds kUnroll vectors, of which the u-th is vector v + u * stride of the slice, into a state in
// units of y. `target` is the element of the slice to leave out.
template <typename Type, bool kCapped, bool kEntropy>
RLKERN_INLINE SoftmaxState<float> fold_batch(SoftmaxState<float> state, const Pack (&raw)[kUnroll],
                                             int v, int stride, int count, int target, float scale,
                                             const Exponent& exponent, const Softcap& cap) {
  constexpr int kLanes = Type::kLanes;
  float top = largest<Type>(raw);
  if (kCapped) top = cap.value(top);  // rises with x
  state = softmax_rebase(state, larger(state.max, top), scale);
  // Of a maximum of -inf no difference may be taken: the exponentials are 0 all the same.
  const float base = state.max == kMinusInf ? 0.0f : state.max;
  float sums[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    float y[kLanes];
    Type::widen(raw[u], y);
    if (kCapped) {
#pragma unroll
      for (int i = 0; i < kLanes; ++i) y[i] = cap.value(y[i]);
    }
    const int begin = (v + u * stride) * kLanes;
    if (static_cast<unsigned>(target - begin) < static_cast<unsigned>(kLanes) ||
        begin + kLanes > count) {
#pragma unroll
      for (int i = 0; i < kLanes; ++i) {
        if (begin + i == target || begin + i >= count) y[i] = kMinusInf;
      }
    }
    float weighted = 0;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const float d = add(y[i], -base);
      y[i] = exponent.of(d);
      if (kEntropy) weighted = fused(exponent.clamped(d), y[i], weighted);
    }
    sums[u] = tree_sum(y);
    if (kEntropy) state.weighted = add(state.weighted, weighted);
  }
  state.sum = add(state.sum, tree_sum(sums));
  return state;
}

// For a pass that does nothing but fold.
struct NotKept {
  RLKERN_HD void operator()(int, const Pack&) const {}
};

// Folds a thread's vectors of a slice into its state, and gives keep(v, vector) each of them.
template <typename Type, bool kCapped, bool kEntropy, typename Keep = NotKept>
RLKERN_INLINE SoftmaxState<float> fold_slice(SoftmaxState<float> state, const Slice<Type>& slice,
                                             int target, float scale, float softcap, int thread,
                                             int threads, const Keep& keep = Keep()) {
  const Exponent exponent(scale);
  const Softcap cap(kCapped ? softcap : 1.0f);
  const int vectors = (slice.count + Type::kLanes - 1) / Type::kLanes;
  for (int v = thread; v < vectors; v += kUnroll * threads) {
    Pack raw[kUnroll];
    // The common case apart, so that its loads stand together.
    if (slice.shift == 0 && (v + (kUnroll - 1) * threads + 1) * Type::kLanes <= slice.count) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        raw[u] = load_pack_streamed(slice.x + (v + u * threads) * Type::kLanes);
      }
    } else {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) raw[u] = load_vector<Type, true>(slice, v + u * threads);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (v + u * threads < vectors) keep(v + u * threads, raw[u]);
    }
    state = fold_batch<Type, kCapped, kEntropy>(state, raw, v, threads, slice.count, target, scale,
                                                exponent, cap);
  }
  return state;
}

// ---- merging ----------------------------------------------------------------------------------

template <bool kEntropy>
RLKERN_DEVICE SoftmaxState<float> merge_warp(SoftmaxState<float> state, float scale) {
  float max = state.max;
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    max = larger(max, __shfl_xor_sync(0xffffffffu, max, lanes));
  }
  state = softmax_rebase(state, max, scale);
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    state.sum = add(state.sum, __shfl_xor_sync(0xffffffffu, state.sum, lanes));
    if (kEntropy) {
      state.weighted = add(state.weighted, __shfl_xor_sync(0xffffffffu, state.weighted, lanes));
    }
  }
  return state;
}

// The merged state, in the first thread of the block.
template <bool kEntropy>
RLKERN_DEVICE SoftmaxState<float> merge_block(SoftmaxState<float> state, float scale) {
  __shared__ SoftmaxState<float> of_warp[32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  state = merge_warp<kEntropy>(state, scale);
  if (warps == 1) return state;
  if (lane == 0) of_warp[warp] = state;
  // Every warp has written its state before the first one reads them.
  __syncthreads();
  if (warp == 0) {
    state = merge_warp<kEntropy>(lane < warps ? of_warp[lane] : softmax_empty<float>(), scale);
  }
  return state;
}

// ---- one row ----------------------------------------------------------------------------------

// What a row that counts comes to; NaN throughout under a scale that is none.
struct RowResult {
  float logprob;
  float entropy;
  float max;
  float log_sum;  // relative to the maximum

  RLKERN_HD static RowResult filled(float value) { return {value, value, value, value}; }
};

// `target`: the chosen logit, whose y is not in the state `others`.
RLKERN_INLINE RowResult row_result(SoftmaxState<float> others, float target, float softcap,
                                   float scale, bool inside) {
  const float y = softcap > 0 ? Softcap(softcap).value(target) : target;
  const float max = larger(others.max, y);
  others = softmax_rebase(others, max, scale);
  // A maximum drops a NaN, and the target stands in no sum.
  if (y != y) others.sum = y;
  const TokenLogprob<float> result = token_logprob(
      SoftmaxState<float>{max, others.sum, others.weighted * scale}, mul(add(y, -max), scale));
  return {inside ? result.logprob : __builtin_nanf(""), result.entropy, max, result.log_sum};
}

}  // namespace rlkern

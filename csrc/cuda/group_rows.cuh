// What the kernels of group_advantages share: the rewards and what belongs to them, sums over the
// whole batch, and where an advantage goes.
#pragma once

#include "../common/group_advantages.h"
#include "block_sums.cuh"

namespace rlkern {

struct GroupRows {
  GroupOptions options;
  int64_t rows;
  int64_t columns;
  const float* rewards;  // [rows, columns]
  const float* lengths;  // [rows]; null where not given, as the next ones
  const float* given;    // [rows, columns]
  const float* weights;  // [columns]
  double* totals;        // [rows], what the columns add up to; null where there is one column
  float* out;            // [rows]

  RLKERN_HD double reward(int64_t i, int64_t k) const { return rewards[i * columns + k]; }
  RLKERN_HD double given_reward(int64_t i, int64_t k) const {
    return given != nullptr ? given[i * columns + k] : 0;
  }
  RLKERN_HD double length(int64_t i) const { return lengths != nullptr ? lengths[i] : 0; }
  RLKERN_HD bool leads() const { return options.baseline == GroupBaseline::kPassAtK; }
  // The advantages need more than their group.
  RLKERN_HD bool is_whole() const { return options.uses_batch() || options.normalized; }
};

// An advantage of column k, from the thread that has row i in every column.
RLKERN_DEVICE void give(const GroupRows& r, int64_t i, int64_t k, double advantage) {
  if (!r.options.joined) {
    r.out[i] = static_cast<float>(advantage);
    return;
  }
  const double weight = r.weights != nullptr ? r.weights[k] : 1;
  const double total = (k > 0 ? r.totals[i] : 0) + weight * advantage;
  r.totals[i] = total;
  if (k + 1 == r.columns) r.out[i] = static_cast<float>(total);
}

// ---- sums in a fixed order --------------------------------------------------------------------

struct Sum {
  RLKERN_HD double operator()(double a, double b) const { return a + b; }
};
struct Least {
  RLKERN_HD double operator()(double a, double b) const { return b < a ? b : a; }
};
struct Most {
  RLKERN_HD double operator()(double a, double b) const { return b > a ? b : a; }
};

// Over `lanes` neighbouring lanes, a power of two; the same in each of them.
template <typename T, typename Combine>
RLKERN_DEVICE T over_lanes(T value, int lanes, const Combine& combine) {
  for (int apart = lanes / 2; apart > 0; apart /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, apart));
  }
  return value;
}

using OfWarp = double[kFinishThreads / kLanes];

template <typename Combine>
RLKERN_DEVICE double over_block(double value, OfWarp& of_warp, const Combine& combine) {
  value = over_lanes(value, kLanes, combine);
  if (threadIdx.x % kLanes == 0) of_warp[threadIdx.x / kLanes] = value;
  __syncthreads();
  value = of_warp[0];
  for (unsigned w = 1; w < blockDim.x / kLanes; ++w) value = combine(value, of_warp[w]);
  __syncthreads();  // all have read it
  return value;
}

// Of value(i) for every row i by one block, NaN where it is left out.
template <typename Value>
RLKERN_DEVICE GroupSums batch_sums(int64_t rows, OfWarp& of_warp, const Value& value) {
  GroupSums s = {0, __builtin_inf(), 0, 0, 0, 0};
  for (int64_t i = threadIdx.x; i < rows; i += blockDim.x) {
    const double x = value(i);
    if (x == x) s.size += 1;
    s.shift = Least()(s.shift, x);
  }
  s.size = over_block(s.size, of_warp, Sum());
  s.shift = over_block(s.shift, of_warp, Least());
  for (int64_t i = threadIdx.x; i < rows; i += blockDim.x) {
    const double x = value(i);
    if (x != x) continue;
    const double rise = x - s.shift;
    s.rise += rise;
    s.rise_squared += rise * rise;
  }
  s.rise = over_block(s.rise, of_warp, Sum());
  s.rise_squared = over_block(s.rise_squared, of_warp, Sum());
  return s;
}

// Of one column, where the advantages ask for it.
RLKERN_DEVICE GroupSummary batch_summary(const GroupRows& r, int64_t k, OfWarp& of_warp) {
  if (!r.options.uses_batch()) return {};
  return group_summary(r.options,
                       batch_sums(r.rows, of_warp, [&](int64_t i) { return r.reward(i, k); }));
}

// The sum of several rewards over the batch, in place of what give() wrote. A row without any
// reward is left out of it.
RLKERN_DEVICE void normalize_totals(const GroupRows& r, OfWarp& of_warp) {
  __syncthreads();  // all columns of all rows
  const auto total = [&](int64_t i) {
    bool scored = false;
    for (int64_t k = 0; k < r.columns; ++k) scored |= r.reward(i, k) == r.reward(i, k);
    if (!scored) return __builtin_nan("");
    // NaN says that the row is left out; a sum that is NaN counts, and spoils the batch.
    return r.totals[i] == r.totals[i] ? r.totals[i] : __builtin_inf();
  };
  const GroupOptions o = over_batch(r.options);
  const GroupSummary all = group_summary(o, batch_sums(r.rows, of_warp, total));
  const GroupForm form = group_form(o, all, all);
  for (int64_t i = threadIdx.x; i < r.rows; i += blockDim.x) {
    const double x = total(i);
    r.out[i] = x == x ? static_cast<float>(form.advantage(x)) : 0.0f;
  }
}

}  // namespace rlkern

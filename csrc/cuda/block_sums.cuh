// Sums over the tokens of a sequence by one block.
//
// They run in floats over chains of at most kTokenChain tokens of a thread, then in doubles, one
// slot a thread in shared memory; the threads' slots are added in a fixed order. So a sum of n
// terms x_i is wrong by at most (kTokenChain - 1) 2^-24 sum |x_i| from the chains, and by less
// than n 2^-53 sum |x_i| from the rest, and which token enters where is decided by its place in its
// sequence alone.
#pragma once

#include <cstdint>

#include "../common/macros.h"

namespace rlkern {

constexpr int kTokenThreads = 256;
constexpr int kTokenChain = 32;

using Slot = double[kTokenThreads];

// Calls body(i) for every token of this thread, and flush() after each chain of them.
template <typename Body, typename Flush>
RLKERN_DEVICE void for_tokens(int64_t size, const Body& body, const Flush& flush) {
  const int64_t chain = static_cast<int64_t>(kTokenChain) * blockDim.x;
  int64_t i = threadIdx.x;
  for (int64_t end = 0; end < size;) {
    end = size - end < chain ? size : end + chain;
    for (; i < end; i += blockDim.x) body(i);
    flush();
  }
}

RLKERN_DEVICE void clear_slots(Slot* slots, int count, double value) {
  for (int i = 0; i < count; ++i) slots[i][threadIdx.x] = value;
}

template <int kCount>
RLKERN_DEVICE void flush_chain(Slot* slots, float (&chain)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    slots[i][threadIdx.x] += chain[i];
    chain[i] = 0;
  }
}

RLKERN_INLINE double combined(bool is_max, double a, double b) {
  if (is_max) return b > a ? b : a;
  return a + b;
}

// Combines each slot over the threads into its first place, the first `sums` by sums, the others by
// maxima. Sixteen threads to a slot, each a fixed share of it; then one.
RLKERN_DEVICE void reduce_slots(Slot* slots, int sums, int count) {
  constexpr unsigned kShares = 16;
  __syncthreads();
  for (unsigned p = threadIdx.x; p < count * kShares; p += blockDim.x) {
    const int i = p / kShares;
    const unsigned share = p % kShares;
    double value = slots[i][share];
    for (unsigned t = share + kShares; t < blockDim.x; t += kShares) {
      value = combined(i >= sums, value, slots[i][t]);
    }
    slots[i][share] = value;
  }
  __syncthreads();
  if (threadIdx.x < static_cast<unsigned>(count)) {
    const int i = threadIdx.x;
    double value = slots[i][0];
    for (unsigned k = 1; k < kShares; ++k) value = combined(i >= sums, value, slots[i][k]);
    slots[i][0] = value;
  }
  __syncthreads();
}

// ---- sums over all sequences ------------------------------------------------------------------

constexpr int kFinishThreads = 1024;
constexpr int kLanes = 32;

using WarpSums = double[kFinishThreads / kLanes][kLanes];

// Combines the rows of totals, each of `values` doubles of which those from `first_maximum` on are
// maxima, into `out`, by one block of whole warps. A lane takes one value of every so many-th row,
// so that a warp reads a row together; then the first warp takes the warps' results.
RLKERN_DEVICE void combine_rows(const double* rows, int64_t count, int values, int first_maximum,
                                WarpSums& of_warp, double* out) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes;
  const bool is_max = lane >= first_maximum;
  double value = is_max ? -__builtin_inf() : 0;
  if (lane < values) {
#pragma unroll 8
    for (int64_t i = warp; i < count; i += warps) {
      value = combined(is_max, value, rows[i * values + lane]);
    }
  }
  of_warp[warp][lane] = value;
  __syncthreads();
  if (warp == 0 && lane < values) {
    for (int w = 1; w < warps; ++w) value = combined(is_max, value, of_warp[w][lane]);
    out[lane] = value;
  }
  __syncthreads();
}

RLKERN_DEVICE double given_or(const double* tensor, double number) {
  return tensor != nullptr ? *tensor : number;
}

}  // namespace rlkern

// A block's walk along one sequence with the recurrence of csrc/common/return_scan.h, in parallel
// over time.
//
// A tile of tokens goes through shared memory, so that neighbouring lanes touch neighbouring
// addresses, while each thread composes and applies the maps of kScanItems consecutive tokens. Of a
// tile's maps a warp scans one per lane; the warps' totals are applied to the carried state one
// after another. So which products are taken, and in which order, is decided by a token's place in
// its sequence alone: results do not depend on the size of the block.
//
// For 9 tokens a thread: 3 barriers for a tile of 288 tokens a warp, 60 shuffles (6 of 5 doubles, 2
// words each), or 6.7 a token; one token a thread would take 60 a token and the 3 barriers for 32
// tokens a warp.
#pragma once

#include "../common/return_scan.h"
#include "block_sums.cuh"

namespace rlkern {

// Odd, so that threads that read each its own run of 4-byte words meet no bank conflicts.
constexpr int kScanItems = 9;

// That must fit on a multiprocessor: 64 registers a thread.
constexpr int kScanThreadsOfMultiprocessor = 1024;

RLKERN_DEVICE PairMap from_lane_before(const PairMap& m, int lanes) {
  constexpr unsigned kAll = 0xffffffffu;
  return {__shfl_up_sync(kAll, m.n, lanes), __shfl_up_sync(kAll, m.q, lanes),
          __shfl_up_sync(kAll, m.a, lanes), __shfl_up_sync(kAll, m.b, lanes),
          __shfl_up_sync(kAll, m.k, lanes)};
}

// The maps of all lanes before this one as one map; of all lanes in `total`.
RLKERN_DEVICE PairMap scan_warp(PairMap m, PairMap* total) {
  const int lane = threadIdx.x % kLanes;
#pragma unroll
  for (int lanes = 1; lanes < kLanes; lanes *= 2) {
    const PairMap before = from_lane_before(m, lanes);
    if (lane >= lanes) m = then(before, m);
  }
  if (lane == kLanes - 1) *total = m;
  const PairMap before = from_lane_before(m, 1);
  return lane == 0 ? identity_map() : before;
}

// Brings one value per token of a tile into shared memory. All loads are issued before the first
// one is needed.
template <int kThreads, typename T, typename Place>
RLKERN_DEVICE void stage_tokens(T* tile, const T* tokens, int count, const Place& place) {
  T held[kScanItems];
#pragma unroll
  for (int j = 0; j < kScanItems; ++j) {
    const int p = j * kThreads + static_cast<int>(threadIdx.x);
    held[j] = p < count ? tokens[place(p)] : T{};
  }
#pragma unroll
  for (int j = 0; j < kScanItems; ++j) tile[j * kThreads + threadIdx.x] = held[j];
}

// From the last token (kFromEnd) or the first one, starting in `state`; returns the state after
// all tokens, the same in every thread. Calls, with p a token's place in the tile and i in the
// sequence:
//   load(count, place)      brings a tile's tokens p < count, i = place(p), into shared memory
//   map(p, i) -> PairMap
//   step(p, i, state) -> Pair   the state after a token; keeps its results in shared memory, where
//                               only this thread looks until they are stored
//   store(p, i)
template <int kThreads, bool kFromEnd, typename Load, typename Map, typename Step, typename Store>
RLKERN_DEVICE Pair walk_tokens(int64_t size, Pair state, PairMap (&of_warp)[kThreads / kLanes],
                               const Load& load, const Map& map, const Step& step,
                               const Store& store) {
  constexpr int kTile = kThreads * kScanItems;
  const int begin = static_cast<int>(threadIdx.x) * kScanItems;
  const int warp = threadIdx.x / kLanes;
  for (int64_t base = 0; base < size; base += kTile) {
    const int count = static_cast<int>(size - base < kTile ? size - base : kTile);
    const int end = begin + kScanItems < count ? begin + kScanItems : count;
    const auto place = [&](int p) { return kFromEnd ? size - 1 - base - p : base + p; };
    load(count, place);
    __syncthreads();  // others' loads

    PairMap run = identity_map();
    for (int p = begin; p < end; ++p) run = then(run, map(p, place(p)));
    const PairMap before = scan_warp(run, &of_warp[warp]);
    __syncthreads();  // the other warps' totals

    Pair here = state;
#pragma unroll 1  // the totals of all warps at once do not fit into the registers
    for (int w = 0; w < kThreads / kLanes; ++w) {
      if (w == warp) here = state;
      state = applied(of_warp[w], state);
    }
    here = applied(before, here);
    for (int p = begin; p < end; ++p) here = step(p, place(p), here);
    __syncthreads();  // others' results

    // The next tile's loads overwrite what this same thread reads here; its totals come after
    // another barrier.
    for (int p = threadIdx.x; p < count; p += kThreads) store(p, place(p));
  }
  return state;
}

// ---- where the tokens are ---------------------------------------------------------------------

// The last token that counts, -1 where none does; the same in every thread. Each thread goes back
// from the end until it meets one, so that what is read is the padding and little more.
RLKERN_DEVICE int64_t last_counting(const unsigned char* mask, int64_t size, long long* shared) {
  if (threadIdx.x == 0) *shared = -1;
  __syncthreads();
  int64_t i = size - 1 - threadIdx.x;
  while (i >= 0 && mask[i] == 0) i -= blockDim.x;
  if (i >= 0) atomicMax(shared, static_cast<long long>(i));
  __syncthreads();
  return *shared;
}

// Whether the offsets of a sequence and of those beside it are as they must be: where they fall,
// the tokens between are in two sequences, and both shall show it.
RLKERN_DEVICE bool is_sound_around(const SequenceGrid& grid, int64_t i) {
  return grid.is_sound(i) && (i == 0 || grid.is_sound(i - 1)) &&
         (i + 1 == grid.sequences || grid.is_sound(i + 1));
}

// Writes NaN over all that the offsets around sequence i enclose, whichever is the larger one, and
// beyond the first and the last sequence over what no sequence holds. Where offsets fall so
// far that a sound sequence lies there too, its block's numbers may come before or after.
RLKERN_DEVICE void poison(const SequenceGrid& grid, int64_t i, const TokenRows<float>& out) {
  if (out.data == nullptr) return;
  const int64_t a = grid.offsets[i], b = grid.offsets[i + 1];
  int64_t low = i == 0 ? 0 : (a < b ? a : b);
  int64_t high = i + 1 == grid.sequences ? grid.length : (a < b ? b : a);
  if (low < 0) low = 0;
  if (high > grid.length) high = grid.length;
  for (int64_t t = low + threadIdx.x; t < high; t += blockDim.x) {
    out.data[t] = static_cast<float>(__builtin_nan(""));
  }
}

}  // namespace rlkern

// The kernels of gae, discounted_returns, vtrace and of the backward of the first two: one block a
// sequence, which walks along it in tiles (pair_scan.cuh).
#pragma once

#include "../common/return_rows.h"
#include "pair_scan.cuh"

namespace rlkern {

// A warp's tile holds a sequence of 288 tokens. Of packed sequences the mean length decides, since
// nobody knows the longest one; longer ones take more tiles.
inline int scan_threads(const SequenceGrid& grid) {
  const int64_t sequences = grid.sequences > 0 ? grid.sequences : 1;
  const int64_t length = grid.offsets == nullptr ? grid.length : grid.length / sequences;
  if (length <= 32 * kScanItems) return 32;
  return length <= 128 * kScanItems ? 128 : 256;
}

template <int kThreads, bool kThird>
struct ScanTile {
  static constexpr int kTokens = kThreads * kScanItems;
  float first[kTokens];
  float second[kTokens];
  float third[kThird ? kTokens : 1];
  unsigned char mask[kTokens];
  unsigned char dones[kTokens];
  PairMap of_warp[kThreads / kLanes];
  long long last;
};

struct ReturnScanArgs {
  ReturnOptions options;
  ReturnRows rows;
};

template <int kThreads, bool kTrace>
__global__ void __launch_bounds__(kThreads, kScanThreadsOfMultiprocessor / kThreads)
    return_scan_forward(const __grid_constant__ ReturnScanArgs args, int64_t first_sequence) {
  __shared__ ScanTile<kThreads, kTrace> tile;
  const ReturnOptions& o = args.options;
  const int64_t index = first_sequence + blockIdx.x;
  if (!is_sound_around(args.rows.grid, index)) {
    poison(args.rows.grid, index, args.rows.first);
    poison(args.rows.grid, index, args.rows.second);
    return;
  }
  const ReturnSequence s = return_sequence(args.rows, o.lam, index);
  // Masked tokens before it enter where they break.
  const int64_t last =
      o.breaks && s.mask != nullptr ? last_counting(s.mask, s.size, &tile.last) : -1;

  const auto token = [&](int p) -> ReturnToken {
    return {tile.first[p], s.values != nullptr ? tile.second[p] : 0.0, kTrace ? tile.third[p] : 0.0,
            s.dones != nullptr && tile.dones[p] != 0};
  };
  const auto counts = [&](int p) { return s.mask == nullptr || tile.mask[p] != 0; };
  walk_tokens<kThreads, true>(
      s.size, {s.bootstrap_value, 0}, tile.of_warp,
      [&](int count, const auto& place) {
        stage_tokens<kThreads>(tile.first, s.rewards, count, place);
        if (s.values != nullptr) stage_tokens<kThreads>(tile.second, s.values, count, place);
        if (kTrace) stage_tokens<kThreads>(tile.third, s.log_ratios, count, place);
        if (s.mask != nullptr) stage_tokens<kThreads>(tile.mask, s.mask, count, place);
        if (s.dones != nullptr) stage_tokens<kThreads>(tile.dones, s.dones, count, place);
      },
      [&](int p, int64_t i) {
        if (counts(p)) return token_map(o, s.lam, token(p));
        return i < last ? masked_map(o, s.lam) : identity_map();
      },
      [&](int p, int64_t i, const Pair& next) {
        Pair here = next;
        float first = 0, second = 0;
        if (counts(p)) {
          const ReturnToken t = token(p);
          here = before_token(o, s.lam, t, next);
          const float x = static_cast<float>(here.w), sum = static_cast<float>(here.w + here.u);
          first = kTrace ? sum : x;
          second = kTrace ? static_cast<float>(trace_advantage(o, s.lam, t, next)) : sum;
        } else if (i < last) {
          here = applied(masked_map(o, s.lam), next);
        }
        tile.first[p] = first;
        tile.second[p] = second;
        return here;
      },
      [&](int p, int64_t i) {
        s.first[i] = tile.first[p];
        if (s.second != nullptr) s.second[i] = tile.second[p];
      });
}

// ---- backward ---------------------------------------------------------------------------------

struct ReturnScanGradArgs {
  ReturnOptions options;
  ReturnGradRows rows;
};

template <int kThreads>
__global__ void __launch_bounds__(kThreads, kScanThreadsOfMultiprocessor / kThreads)
    return_scan_backward(const __grid_constant__ ReturnScanGradArgs args, int64_t first_sequence) {
  __shared__ ScanTile<kThreads, false> tile;
  const ReturnOptions& o = args.options;
  const int64_t index = first_sequence + blockIdx.x;
  if (!is_sound_around(args.rows.grid, index)) {
    poison(args.rows.grid, index, args.rows.grad_rewards);
    poison(args.rows.grid, index, args.rows.grad_values);
    if (threadIdx.x == 0) {
      args.rows.grad_bootstrap[index] = static_cast<float>(__builtin_nan(""));
    }
    return;
  }
  const ReturnGradSequence s = return_grad_sequence(args.rows, o.lam, index);
  const int64_t last =
      o.breaks && s.mask != nullptr ? last_counting(s.mask, s.size, &tile.last) : -1;

  const auto counts = [&](int p) { return s.mask == nullptr || tile.mask[p] != 0; };
  const auto done = [&](int p) { return s.dones != nullptr && tile.dones[p] != 0; };
  const auto of_returns = [&](int p) {
    return s.grad_second != nullptr ? static_cast<double>(tile.second[p]) : 0.0;
  };
  const auto map = [&](int p, int64_t i) {
    if (counts(p)) return adjoint_map(o, s.lam, tile.first[p] + of_returns(p), done(p));
    return i < last ? masked_adjoint_map(o, s.lam) : identity_map();
  };
  const Pair end = walk_tokens<kThreads, false>(
      s.size, {0, 0}, tile.of_warp,
      [&](int count, const auto& place) {
        stage_tokens<kThreads>(tile.first, s.grad_first, count, place);
        if (s.grad_second != nullptr) {
          stage_tokens<kThreads>(tile.second, s.grad_second, count, place);
        }
        if (s.mask != nullptr) stage_tokens<kThreads>(tile.mask, s.mask, count, place);
        if (s.dones != nullptr) stage_tokens<kThreads>(tile.dones, s.dones, count, place);
      },
      map,
      [&](int p, int64_t i, const Pair& before) {
        const Pair after = applied(map(p, i), before);
        float reward = 0, value = 0;
        if (counts(p)) {
          const double of_delta = tile.first[p] + of_returns(p) + before.u;
          reward = static_cast<float>(of_delta);
          value = static_cast<float>(of_returns(p) - of_delta + before.w);
        }
        tile.first[p] = reward;
        tile.second[p] = value;
        return after;
      },
      [&](int p, int64_t i) {
        s.grad_rewards[i] = tile.first[p];
        if (s.grad_values != nullptr) s.grad_values[i] = tile.second[p];
      });
  if (threadIdx.x == 0) *s.grad_bootstrap = static_cast<float>(end.w);
}

}  // namespace rlkern

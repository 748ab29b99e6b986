// group_advantages where a group is so many consecutive rewards: as many neighbouring lanes for
// each group, up to a warp, so that a group needs no shared memory, no barrier and no atomics.
#pragma once

#include "group_rows.cuh"

namespace rlkern {

struct SegmentArgs {
  GroupRows rows;
  int64_t group_size;
  int lanes;       // for a group, a power of two
  int64_t blocks;  // in all grids; one where the advantages need the whole batch
};

inline int segment_lanes(int64_t group_size) {
  int lanes = 1;
  while (lanes < kLanes && lanes < group_size) lanes *= 2;
  return lanes;
}

// The best sample of a group, the first one of several, and by how much it leads.
struct GroupLead {
  long long row;
  double lead;
};

RLKERN_DEVICE GroupLead segment_lead(const GroupRows& r, int64_t k, int64_t begin, int64_t end,
                                     int64_t step, int lanes) {
  double best = -__builtin_inf();
  for (int64_t i = begin; i < end; i += step) best = Most()(best, r.reward(i, k));
  best = over_lanes(best, lanes, Most());
  long long first = r.rows;
  for (int64_t i = begin; i < end; i += step) {
    if (r.reward(i, k) == best && i < first) first = i;
  }
  first = over_lanes(first, lanes, [](long long a, long long b) { return b < a ? b : a; });
  double second = -__builtin_inf();
  for (int64_t i = begin; i < end; i += step) {
    if (i != first) second = Most()(second, r.reward(i, k));
  }
  return {first, best - over_lanes(second, lanes, Most())};
}

__global__ void __launch_bounds__(kFinishThreads)
    group_segments(const __grid_constant__ SegmentArgs args, int64_t first_block) {
  __shared__ OfWarp of_warp;
  const GroupRows& r = args.rows;
  const GroupOptions& o = r.options;
  const int lanes = args.lanes;
  const int64_t groups = r.rows / args.group_size, of_block = blockDim.x / lanes;
  for (int64_t k = 0; k < r.columns; ++k) {
    const GroupSummary batch = batch_summary(r, k, of_warp);
    for (int64_t base = (first_block + blockIdx.x) * of_block; base < groups;
         base += of_block * args.blocks) {
      // Lanes without a group take part in the shuffles.
      const int64_t g = base + threadIdx.x / lanes;
      const int64_t end = g < groups ? (g + 1) * args.group_size : 0;
      const int64_t begin = g * args.group_size + threadIdx.x % lanes;
      GroupSums s = {0, __builtin_inf(), 0, 0, 0, 0};
      for (int64_t i = begin; i < end; i += lanes) {
        const double x = r.reward(i, k);
        if (x == x) s.size += 1;
        s.shift = Least()(s.shift, x);
      }
      s.size = over_lanes(s.size, lanes, Sum());
      s.shift = over_lanes(s.shift, lanes, Least());
      for (int64_t i = begin; i < end; i += lanes) {
        const double x = r.reward(i, k);
        if (x != x) continue;
        const double rise = x - s.shift, length = r.length(i);
        s.rise += rise;
        s.rise_squared += rise * rise;
        s.length += length;
        s.length_rise += length * rise;
      }
      s.rise = over_lanes(s.rise, lanes, Sum());
      s.rise_squared = over_lanes(s.rise_squared, lanes, Sum());
      if (r.lengths != nullptr) {
        s.length = over_lanes(s.length, lanes, Sum());
        s.length_rise = over_lanes(s.length_rise, lanes, Sum());
      }
      GroupLead best = {0, 0};
      if (r.leads()) best = segment_lead(r, k, begin, end, lanes, lanes);

      const GroupSummary group = group_summary(o, s);
      const GroupForm form = group_form(o, group, batch);
      for (int64_t i = begin; i < end; i += lanes) {
        const double x = r.reward(i, k);
        const double lead = i == best.row ? best.lead : 0;
        give(r, i, k,
             x == x ? form.advantage(group_subject(o, group, x, r.given_reward(i, k), lead)) : 0);
      }
    }
  }
  if (o.normalized) normalize_totals(r, of_warp);
}

}  // namespace rlkern

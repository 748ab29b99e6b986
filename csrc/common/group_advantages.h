// Group-wise reward normalisation: what is summed up over a group, and a reward's advantage from it
// (the definition: rlkern/reference/group_advantages.py), for host and device, in double.
#pragma once

#include <cstdint>

#include "macros.h"

namespace rlkern {

enum class GroupBaseline {
  kMean,
  kLeaveOneOut,
  kLengthWeighted,
  kPassAtK,
  kBatchMean,
  kGiven,
  kNone
};
enum class GroupScale { kStd, kBatchStd, kMean, kNone };

struct GroupOptions {
  GroupBaseline baseline;
  GroupScale scale;
  bool unbiased;
  double eps;
  bool raw;         // a statistic over one reward is mean 0 and deviation 1
  bool joined;      // several rewards: their weighted sum
  bool normalized;  // and that over the batch

  RLKERN_HD bool uses_group() const {
    return baseline <= GroupBaseline::kPassAtK || scale == GroupScale::kStd ||
           scale == GroupScale::kMean;
  }
  RLKERN_HD bool uses_batch() const {
    return baseline == GroupBaseline::kBatchMean || scale == GroupScale::kBatchStd;
  }
};

constexpr int kGroupOptionCount = 7;

inline GroupOptions group_options(const double* v) {
  return {static_cast<GroupBaseline>(static_cast<int>(v[0])),
          static_cast<GroupScale>(static_cast<int>(v[1])),
          v[2] != 0,
          v[3],
          v[4] != 0,
          v[5] != 0,
          v[6] != 0};
}

// The normalisation of the sum of several rewards over the batch, as one group.
RLKERN_INLINE GroupOptions over_batch(const GroupOptions& o) {
  return {GroupBaseline::kMean, GroupScale::kStd, o.unbiased, o.eps, false, false, false};
}

// Sums over the rewards of a group that are not NaN, as rises above one of them (`shift`): equal
// rewards rise by exactly 0, and 1e6 + {0, 1} lose nothing.
struct GroupSums {
  double size;
  double shift;
  double rise;
  double rise_squared;
  double length;       // sum of lengths
  double length_rise;  // sum of length * rise
};

// What a reward's advantage needs to know of its group.
struct GroupSummary {
  double size;
  double shift;
  double mean_rise;      // mean - shift
  double deviation;      // standard deviation
  double weighted_rise;  // length-weighted mean - shift
};

RLKERN_INLINE double square_root(double x) {
#if defined(__CUDA_ARCH__)
  return ::sqrt(x);
#else
  return __builtin_sqrt(x);
#endif
}

RLKERN_INLINE GroupSummary group_summary(const GroupOptions& o, const GroupSums& s) {
  GroupSummary g;
  const double n = s.size > 1 ? s.size : 1;
  g.size = s.size;
  g.shift = s.shift;
  g.mean_rise = s.rise / n;
  const double squares = s.rise_squared - s.rise * g.mean_rise;
  const double degrees = o.unbiased ? s.size - 1 : s.size;
  g.deviation = square_root((squares > 0 ? squares : 0) / (degrees > 1 ? degrees : 1));
  g.weighted_rise = s.length > 0 ? s.length_rise / s.length : g.mean_rise;
  return g;
}

// Of a reward that is not NaN. `lead` is the best reward less the second best for the group's best
// one, and 0 for all others.
RLKERN_INLINE double group_advantage(const GroupOptions& o, const GroupSummary& group,
                                     const GroupSummary& batch, double reward, double given,
                                     double lead) {
  const bool one = group.size == 1, one_in_batch = batch.size == 1;
  if (!o.raw && ((o.uses_group() && one) || (o.uses_batch() && one_in_batch))) return 0;
  const double rise = reward - group.shift;
  double difference = reward;
  switch (o.baseline) {
    case GroupBaseline::kMean:
      if (!one) difference = rise - group.mean_rise;
      break;
    case GroupBaseline::kLeaveOneOut:
      if (!one) difference = (rise - group.mean_rise) * (group.size / (group.size - 1));
      break;
    case GroupBaseline::kLengthWeighted:
      if (!one) difference = rise - group.weighted_rise;
      break;
    case GroupBaseline::kPassAtK:
      if (!one) difference = lead;
      break;
    case GroupBaseline::kBatchMean:
      if (!one_in_batch) difference = reward - batch.shift - batch.mean_rise;
      break;
    case GroupBaseline::kGiven:
      difference = reward - given;
      break;
    case GroupBaseline::kNone:
      break;
  }
  if (o.scale == GroupScale::kNone) return difference;
  if (o.scale == GroupScale::kMean) {
    const double mean = one ? 1 : group.shift + group.mean_rise;
    return mean > 0 ? difference / (mean + o.eps) : 0;
  }
  const bool over_group = o.scale == GroupScale::kStd;
  const bool single = over_group ? one : one_in_batch;
  const double deviation = single ? 1 : (over_group ? group.deviation : batch.deviation);
  // Equal rewards have no direction, whatever they are compared with.
  if (o.baseline != GroupBaseline::kNone && !(deviation > 0)) return 0;
  return difference / (deviation + o.eps);
}

}  // namespace rlkern

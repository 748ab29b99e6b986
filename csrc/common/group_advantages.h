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
  // Rounding may take it below 0.
  g.deviation = square_root((squares < 0 ? 0 : squares) / (degrees > 1 ? degrees : 1));
  g.weighted_rise = s.length > 0 ? s.length_rise / s.length : g.mean_rise;
  return g;
}

// Those of two parts of a group joined, about the first one's reward.
RLKERN_INLINE GroupSums merged(const GroupSums& a, const GroupSums& b) {
  if (a.size == 0) return b;
  const double step = b.size > 0 ? b.shift - a.shift : 0;
  return {a.size + b.size,
          a.shift,
          a.rise + b.rise + b.size * step,
          a.rise_squared + b.rise_squared + (2 * b.rise + b.size * step) * step,
          a.length + b.length,
          a.length_rise + b.length_rise + b.length * step};
}

// An advantage is (x - centre) * factor of every x in the group, and 0 where the factor is: of
// the reward itself, less `given`, or of its lead (group_subject). An infinite reward makes the
// centre NaN, never the factor 0.
struct GroupForm {
  double centre;
  double factor;

  RLKERN_HD double advantage(double x) const { return factor == 0 ? 0 : (x - centre) * factor; }
};

// An infinite reward lets no sum of rises be finite, whichever reward they rise from.
RLKERN_INLINE bool has_infinity(const GroupSummary& s) { return s.mean_rise - s.mean_rise != 0; }

RLKERN_INLINE GroupForm group_form(const GroupOptions& o, const GroupSummary& group,
                                   const GroupSummary& batch) {
  if ((o.uses_group() && has_infinity(group)) || (o.uses_batch() && has_infinity(batch))) {
    return {__builtin_nan(""), 1};
  }
  const bool one = group.size == 1, one_in_batch = batch.size == 1;
  if (!o.raw && ((o.uses_group() && one) || (o.uses_batch() && one_in_batch))) return {0, 0};
  GroupForm form = {0, 1};
  switch (o.baseline) {
    case GroupBaseline::kMean:
      if (!one) form.centre = group.shift + group.mean_rise;
      break;
    case GroupBaseline::kLeaveOneOut:
      // s - (sum - s) / (n - 1) = (s - mean) n / (n - 1)
      if (!one) form = {group.shift + group.mean_rise, group.size / (group.size - 1)};
      break;
    case GroupBaseline::kLengthWeighted:
      if (!one) form.centre = group.shift + group.weighted_rise;
      break;
    case GroupBaseline::kBatchMean:
      if (!one_in_batch) form.centre = batch.shift + batch.mean_rise;
      break;
    default:
      break;
  }
  if (o.scale == GroupScale::kNone) return form;
  if (o.scale == GroupScale::kMean) {
    const double mean = one ? 1 : group.shift + group.mean_rise;
    form.factor = mean > 0 ? form.factor / (mean + o.eps) : 0;
    return form;
  }
  const bool over_group = o.scale == GroupScale::kStd;
  const bool single = over_group ? one : one_in_batch;
  const double deviation = single ? 1 : (over_group ? group.deviation : batch.deviation);
  // Equal rewards have no direction, whatever they are compared with.
  const bool flat = o.baseline != GroupBaseline::kNone && deviation == 0;
  form.factor = flat ? 0 : form.factor / (deviation + o.eps);
  return form;
}

// Of a reward that is not NaN. `lead` is the best reward less the second best for the group's best
// one, and 0 for all others.
RLKERN_INLINE double group_subject(const GroupOptions& o, const GroupSummary& group, double reward,
                                   double given, double lead) {
  if (o.baseline == GroupBaseline::kGiven) return reward - given;
  return o.baseline == GroupBaseline::kPassAtK && group.size != 1 ? lead : reward;
}

}  // namespace rlkern

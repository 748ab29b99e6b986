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
// rewards rise by exactly 0, and 1e6 + {0, 1} lose nothing. `Number` is double, or a vector of
// doubles with one group a lane.
template <typename Number>
struct GroupSumsOf {
  Number size;
  Number shift;
  Number rise;
  Number rise_squared;
  Number length;       // sum of lengths
  Number length_rise;  // sum of length * rise
};
typedef GroupSumsOf<double> GroupSums;

// A reward more; NaN is none.
RLKERN_INLINE void add_reward(GroupSums* s, double x) {
  if (x != x) return;
  if (s->size == 0) s->shift = x;
  const double rise = x - s->shift;
  s->size += 1;
  s->rise += rise;
  s->rise_squared += rise * rise;
}

// What a reward's advantage needs to know of its group.
template <typename Number>
struct GroupSummaryOf {
  Number size;
  Number shift;
  Number mean_rise;      // mean - shift
  Number deviation;      // standard deviation
  Number weighted_rise;  // length-weighted mean - shift
};
typedef GroupSummaryOf<double> GroupSummary;

RLKERN_INLINE double square_root(double x) {
#if defined(__CUDA_ARCH__)
  return ::sqrt(x);
#else
  return __builtin_sqrt(x);
#endif
}

template <typename Number>
RLKERN_INLINE GroupSummaryOf<Number> group_summary(const GroupOptions& o,
                                                   const GroupSumsOf<Number>& s) {
  GroupSummaryOf<Number> g;
  const Number zero = {}, unit = zero + 1.0;
  g.size = s.size;
  g.shift = s.shift;
  g.mean_rise = s.rise / (s.size > unit ? s.size : unit);
  const Number squares = s.rise_squared - s.rise * g.mean_rise;
  const Number degrees = o.unbiased ? s.size - 1.0 : s.size;
  // Rounding may take it below 0.
  g.deviation = square_root((squares < zero ? zero : squares) / (degrees > unit ? degrees : unit));
  g.weighted_rise = g.mean_rise;
  if (o.baseline == GroupBaseline::kLengthWeighted) {
    g.weighted_rise = s.length > zero ? s.length_rise / s.length : g.mean_rise;
  }
  return g;
}

// Those of two parts of a group joined, about the first one's reward.
template <typename Number>
RLKERN_INLINE GroupSumsOf<Number> merged(const GroupSumsOf<Number>& a,
                                         const GroupSumsOf<Number>& b) {
  const Number zero = {};
  const Number shift = a.size == zero ? b.shift : a.shift;
  const Number step = b.size > zero ? b.shift - shift : zero;
  return {a.size + b.size,
          shift,
          a.rise + b.rise + b.size * step,
          a.rise_squared + b.rise_squared + (2.0 * b.rise + b.size * step) * step,
          a.length + b.length,
          a.length_rise + b.length_rise + b.length * step};
}

// An advantage is (x - centre) * factor of every x in the group, and 0 where the factor is: of
// the reward itself, less `given`, or of its lead (group_subject). An infinite reward makes the
// centre NaN, never the factor 0.
template <typename Number>
struct GroupFormOf {
  Number centre;
  Number factor;

  RLKERN_HD Number advantage(Number x) const {
    const Number zero = {};
    return factor == zero ? zero : (x - centre) * factor;
  }
};
typedef GroupFormOf<double> GroupForm;

// An infinite reward lets no sum of rises be finite, whichever reward they rise from.
template <typename Number>
RLKERN_INLINE auto has_infinity(const GroupSummaryOf<Number>& s) {
  return s.mean_rise - s.mean_rise != Number{};
}

// Branches go by the options alone, so that a vector's groups go through together.
template <typename Number>
RLKERN_INLINE GroupFormOf<Number> group_form(const GroupOptions& o,
                                             const GroupSummaryOf<Number>& group,
                                             const GroupSummary& batch) {
  const Number zero = {}, unit = zero + 1.0;
  const auto one = group.size == unit;
  const bool one_in_batch = batch.size == 1;
  const Number mean = one ? zero : group.shift + group.mean_rise;
  Number centre = zero, factor = unit;
  switch (o.baseline) {
    case GroupBaseline::kMean:
      centre = mean;
      break;
    case GroupBaseline::kLeaveOneOut:
      // s - (sum - s) / (n - 1) = (s - mean) n / (n - 1)
      centre = mean;
      factor = one ? unit : group.size / (group.size - 1.0);
      break;
    case GroupBaseline::kLengthWeighted:
      centre = one ? zero : group.shift + group.weighted_rise;
      break;
    case GroupBaseline::kBatchMean:
      if (!one_in_batch) centre = zero + (batch.shift + batch.mean_rise);
      break;
    default:
      break;
  }
  if (o.scale == GroupScale::kMean) {
    const Number scale = one ? unit : mean;
    factor = scale > zero ? factor / (scale + o.eps) : zero;
  } else if (o.scale != GroupScale::kNone) {
    Number deviation = one ? unit : group.deviation;
    if (o.scale == GroupScale::kBatchStd) {
      deviation = zero + (one_in_batch ? 1 : batch.deviation);
    }
    factor = factor / (deviation + o.eps);
    // Equal rewards have no direction, whatever they are compared with.
    if (o.baseline != GroupBaseline::kNone) factor = deviation == zero ? zero : factor;
  }
  if (!o.raw && o.uses_group()) factor = one ? zero : factor;
  if (!o.raw && o.uses_batch() && one_in_batch) factor = zero;
  const Number nan = zero + __builtin_nan("");
  if (o.uses_group()) {
    centre = has_infinity(group) ? nan : centre;
    factor = has_infinity(group) ? unit : factor;
  }
  if (o.uses_batch() && has_infinity(batch)) return {nan, unit};
  return {centre, factor};
}

// Of a reward that is not NaN. `lead` is the best reward less the second best for the group's best
// one, and 0 for all others.
RLKERN_INLINE double group_subject(const GroupOptions& o, const GroupSummary& group, double reward,
                                   double given, double lead) {
  if (o.baseline == GroupBaseline::kGiven) return reward - given;
  return o.baseline == GroupBaseline::kPassAtK && group.size != 1 ? lead : reward;
}

}  // namespace rlkern

// What a policy loss sums up over the tokens of one sequence, and what follows from the sums. For
// host and device; T is float, or a vector of floats as in policy_formulas.h, and a Flag what its
// comparisons give.
#pragma once

#include "policy_formulas.h"
#include "policy_totals.h"

namespace rlkern {

// Needed before the terms of the tokens are known, by losses that have a sequence's ratio or
// weight.
struct BeforeSum {
  enum { kLogRatio, kCorrection, kDrift, kLogWeight, kClipped, kWeight, kAdvantage, kCount };
};

// Of the terms.
struct TermSum {
  enum {
    kLoss,
    kKl,
    kApproxKl,
    kLow,
    kHigh,
    kDual,
    kCispo,
    kRatio,
    kWeight,
    kSquaredWeight,
    kKept,
    kPhi,
    kShared,  // the gradient that the tokens share
    kEntropy,
    kBonus,
    kBonusTokens,
    kCount
  };
};

RLKERN_INLINE float max_drop_nan(float a, float b) { return b > a ? b : a; }

template <typename T>
struct RatioRange {
  T max = T{} - __builtin_inff();
  T minus_min = T{} - __builtin_inff();
};

// ---- what the terms need to know of the whole sequence -----------------------------------------

template <SurrogateKind kSurrogate, typename T, typename Flag>
RLKERN_INLINE void add_before(const PolicyOptions& o, bool has_rollout, Flag counts,
                              const PolicyInput<T>& in, T* sum) {
  constexpr bool kGmpo = kSurrogate == SurrogateKind::kGmpo;
  constexpr bool kVespo = kSurrogate == SurrogateKind::kVespo;
  const T d = in.logprob - in.old;
  sum[BeforeSum::kLogRatio] += kVespo ? clamped(d, -o.log_ratio_clamp, o.log_ratio_clamp) : d;
  const T e = or_zero(in.old - in.rollout);
  if (o.sequence_correction()) sum[BeforeSum::kCorrection] += e;
  if (o.off_policy()) {
    const T sampler = has_rollout ? in.rollout : in.old;
    sum[BeforeSum::kDrift] += or_zero(sampler - in.logprob);
  }
  if ((kGmpo || kVespo) && o.correction == CorrectionLevel::kToken) {
    T log_weight = rl_log(rollout_weight_of(o, e));
    if (kVespo) log_weight = clamped(log_weight, kVespoLogFloor, kLogBound);
    sum[BeforeSum::kLogWeight] += counts ? log_weight : T{};
  }
  if (kGmpo) {
    sum[BeforeSum::kClipped] += product(in.weight, gmpo_term(o, d, in.advantage).clipped);
    sum[BeforeSum::kWeight] += in.weight;
    sum[BeforeSum::kAdvantage] += in.advantage;
  }
}

// `length`: the tokens that count, at least 1.
template <SurrogateKind kSurrogate>
RLKERN_INLINE SequenceState sequence_state(const PolicyOptions& o, double length,
                                           const double* total) {
  SequenceState state = sequence_defaults();
  constexpr bool kGmpo = kSurrogate == SurrogateKind::kGmpo;
  constexpr bool kVespo = kSurrogate == SurrogateKind::kVespo;
  const double log_ratio = total[BeforeSum::kLogRatio];
  state.near = !(total[BeforeSum::kDrift] / length > o.off_policy_threshold);
  if (o.sequence_correction()) {
    const bool mean = o.correction == CorrectionLevel::kGeometric;
    const double e = total[BeforeSum::kCorrection];
    state.rollout_weight = rollout_weight_of(o, (float)(mean ? e / length : e));
  }
  if (o.level == RatioLevel::kSequenceSum) {
    set_log_ratio(o, (float)log_ratio, &state);
  } else if (o.level != RatioLevel::kToken) {
    set_log_ratio(o, (float)(log_ratio / length), &state);
  }
  if (kVespo) {
    const float log_w = (float)(log_ratio + total[BeforeSum::kLogWeight]);
    const float bounded = clamped(log_w, kVespoLogFloor, kLogBound);
    state.phi_pos = vespo_phi(bounded, o.vespo_k_pos, o.vespo_lambda_pos);
    state.phi_neg = vespo_phi(bounded, o.vespo_k_neg, o.vespo_lambda_neg);
  }
  if (kGmpo) {
    const double count = at_least_one(total[BeforeSum::kWeight]);
    const double advantage = total[BeforeSum::kAdvantage] / length;
    double log_weight = total[BeforeSum::kLogWeight] / length;
    if (o.sequence_correction()) log_weight = rl_log((double)state.rollout_weight);
    const bool kept = advantage >= 0 || state.near;
    const double clipped = total[BeforeSum::kClipped] / count;
    const double ratio = product(rl_exp(clipped), rl_exp(log_weight));
    state.gmpo_loss = kept ? -product(advantage, ratio) : 0;
    state.gmpo = (float)(state.gmpo_loss / count);
  }
  return state;
}

// ---- the terms --------------------------------------------------------------------------------

// What the aggregation makes of a sequence's sums, before the batch's denominators.
struct SequenceShares {
  float mean;  // one over the length where the sequence is averaged
  float policy;
  float kl;  // with its coefficient
  float bonus;
};

template <SurrogateKind kSurrogate>
RLKERN_INLINE SequenceShares sequence_shares(const PolicyOptions& o, double length) {
  SequenceShares shares;
  shares.mean = o.aggregation == Aggregation::kSeqMeanTokenMean ? (float)(1.0 / length) : 1.0f;
  shares.policy = kSurrogate == SurrogateKind::kGmpo ? 1.0f : shares.mean;
  shares.kl = o.kl_coef * shares.mean;
  shares.bonus = o.entropy_same ? shares.mean : 1.0f;
  return shares;
}

RLKERN_INLINE SequenceShares scaled(SequenceShares shares, GradientScales scales) {
  shares.policy *= scales.policy;
  shares.kl *= scales.policy;
  shares.bonus *= scales.bonus;
  return shares;
}

template <SurrogateKind kSurrogate, typename T, typename Flag>
RLKERN_INLINE void add_term(const PolicyOptions& o, bool has_ref, Flag counts,
                            const PolicyTerm<T>& t, T* sum, RatioRange<T>* range) {
  const T none = T{} - __builtin_inff();
  sum[TermSum::kLoss] += t.policy.loss;
  sum[TermSum::kApproxKl] += t.approx_kl;
  sum[TermSum::kLow] += counts ? t.policy.low : T{};
  sum[TermSum::kHigh] += counts ? t.policy.high : T{};
  sum[TermSum::kRatio] += counts ? t.ratio : T{};
  range->max = max_drop_nan(range->max, counts ? t.ratio : none);
  range->minus_min = max_drop_nan(range->minus_min, counts ? -t.ratio : none);
  if (kSurrogate == SurrogateKind::kClip && o.dual_clip < __builtin_inff()) {
    sum[TermSum::kDual] += t.policy.dual;
  }
  if (kSurrogate == SurrogateKind::kCispo) sum[TermSum::kCispo] += t.policy.cispo;
  if (kSurrogate == SurrogateKind::kVespo) sum[TermSum::kPhi] += counts ? t.phi : T{};
  if (o.correction != CorrectionLevel::kNone) {
    const T weight = counts ? t.rollout_weight : T{};
    sum[TermSum::kWeight] += weight;
    sum[TermSum::kSquaredWeight] += weight * weight;
  }
  if (o.off_policy()) sum[TermSum::kKept] += counts ? t.kept : T{};
  if (has_ref) sum[TermSum::kKl] += t.kl.value;
}

// The gradient with respect to the token's logprob, but for what all tokens of the sequence share.
template <typename T, typename Flag>
RLKERN_INLINE T term_gradient(const PolicyOptions& o, const SequenceShares& shares, bool has_ref,
                              Flag counts, const PolicyTerm<T>& t, T* sum) {
  T grad = shares.policy * t.policy.direct;
  if (has_ref && o.kl_coef != 0) grad += shares.kl * t.kl.slope;
  T through = shares.policy * t.policy.from_ratio;
  if (o.kl_ratio_weighted && o.kl_coef != 0) through += shares.kl * t.kl_from_ratio;
  if (o.coupled()) {
    sum[TermSum::kShared] += counts ? through : T{};
  } else {
    grad += product(through, t.ratio_open);
  }
  return counts ? grad : T{};
}

// What each token gets of the gradient that the tokens share.
RLKERN_INLINE float shared_gradient(const PolicyOptions& o, double length, double sum) {
  return (float)(o.level == RatioLevel::kSequence ? sum / length : sum);
}

// Of a token that is `chosen` for the bonus; returns the gradient with respect to its entropy.
template <typename T, typename Flag>
RLKERN_INLINE T add_bonus(const PolicyOptions& o, const SequenceShares& shares, Flag chosen,
                          T entropy, T* sum) {
  sum[TermSum::kBonus] += chosen ? entropy : T{};
  sum[TermSum::kBonusTokens] += chosen ? T{} + 1.0f : T{};
  return chosen ? T{} - o.entropy_coef * shares.bonus : T{};
}

// Adds the sequence to the totals. `advantage`: of the whole sequence, where `one_advantage`.
template <SurrogateKind kSurrogate>
RLKERN_INLINE void add_sequence(const PolicyOptions& o, bool one_advantage, float advantage,
                                const SequenceState& state, const SequenceShares& shares,
                                double count, const double* sum, const RatioRange<float>& range,
                                PolicyTotals* out) {
  PolicyTotals& t = *out;
  const double length = at_least_one(count);
  const bool corrected = o.correction != CorrectionLevel::kNone;
  const bool by_sequence = o.level == RatioLevel::kSequence;
  const double metric_share = by_sequence ? 1.0 / length : 1.0;
  t.sum[kTokens] += count;
  t.sum[kSequences] += 1;
  t.sum[kNonEmpty] += count > 0;
  t.sum[kRatioUnits] += by_sequence ? 1.0 : count;
  t.sum[kPolicyLoss] += kSurrogate == SurrogateKind::kGmpo
                            ? state.gmpo_loss
                            : sum[TermSum::kLoss] * (double)shares.policy;
  t.sum[kKl] += sum[TermSum::kKl];
  t.sum[kAggregatedKl] += sum[TermSum::kKl] * (double)shares.mean;
  t.sum[kEntropy] += sum[TermSum::kEntropy];
  t.sum[kBonus] += sum[TermSum::kBonus] * (double)shares.bonus;
  t.sum[kBonusCount] += sum[TermSum::kBonusTokens];
  t.sum[kApproxKl] += sum[TermSum::kApproxKl];
  t.sum[kClipLow] += sum[TermSum::kLow] * metric_share;
  t.sum[kClipHigh] += sum[TermSum::kHigh] * metric_share;
  t.sum[kDualClip] += sum[TermSum::kDual] * metric_share;
  t.sum[kCispoClip] += sum[TermSum::kCispo] * metric_share;
  t.sum[kRatio] += by_sequence ? (double)state.ratio : sum[TermSum::kRatio];
  t.sum[kRolloutWeight] += corrected ? sum[TermSum::kWeight] : count;
  t.sum[kRolloutWeightSquared] += corrected ? sum[TermSum::kSquaredWeight] : count;
  t.sum[kKept] += o.off_policy() ? sum[TermSum::kKept] : count;
  if (kSurrogate == SurrogateKind::kVespo) {
    const double phi = advantage >= 0 ? state.phi_pos : state.phi_neg;
    t.sum[kVespoPhi] += one_advantage ? phi : sum[TermSum::kPhi];
    t.sum[kVespoUnits] += one_advantage ? 1.0 : count;
  }
  t.raise(kRatioMax, by_sequence ? state.ratio : range.max);
  t.raise(kMinusRatioMin, by_sequence ? -state.ratio : range.minus_min);
  if (by_sequence || count > 0) {
    const double low = sum[TermSum::kLow] / length, high = sum[TermSum::kHigh] / length;
    t.raise(kClipLowMax, low);
    t.raise(kMinusClipLowMin, -low);
    t.raise(kClipHighMax, high);
    t.raise(kMinusClipHighMin, -high);
  }
}

}  // namespace rlkern

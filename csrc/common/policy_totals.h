// What a policy loss sums up over tokens and sequences, and what follows from the sums: the loss,
// the gradient's denominators, the metrics' vector (SUMS and MAXIMA of
// rlkern/reference/policy_loss.py, in this order).
#pragma once

#include "policy_options.h"

namespace rlkern {

enum PolicySum {
  kTokens,
  kSequences,
  kRatioUnits,
  kPolicyLoss,
  kPolicyLossUnits,
  kKl,
  kEntropy,
  kApproxKl,
  kClipLow,
  kClipHigh,
  kDualClip,
  kCispoClip,
  kRatio,
  kRolloutWeight,
  kRolloutWeightSquared,
  kKept,
  kVespoPhi,
  kVespoUnits,
  kPolicySums,  // the metrics end here
  kAggregatedKl = kPolicySums,
  kBonus,  // entropy that the bonus rewards
  kBonusCount,
  kNonEmpty,  // sequences with a counting token
  kAllPolicySums,
};

enum PolicyMax {
  kRatioMax,
  kMinusRatioMin,
  kClipLowMax,
  kMinusClipLowMin,
  kClipHighMax,
  kMinusClipHighMin,
  kPolicyMaxima,
};

constexpr int kPolicyMetrics = int{kPolicySums} + int{kPolicyMaxima};

struct PolicyTotals {
  double sum[kAllPolicySums];
  double max[kPolicyMaxima];

  RLKERN_HD void clear() {
    for (double& s : sum) s = 0;
    for (double& m : max) m = -__builtin_inf();
  }
  RLKERN_HD void add(const PolicyTotals& other) {
    for (int i = 0; i < kAllPolicySums; ++i) sum[i] += other.sum[i];
    for (int i = 0; i < kPolicyMaxima; ++i) raise(i, other.max[i]);
  }
  RLKERN_HD void raise(int i, double value) {
    if (value > max[i]) max[i] = value;
  }
};

// What the gradients are multiplied by: one over the batch's denominators.
struct GradientScales {
  float policy;  // of the policy and KL terms
  float bonus;
};

struct PolicyResult {
  double loss;
  double scale;          // one over the denominator of the policy and KL terms
  double entropy_scale;  // the same of the entropy bonus
  double metrics[kPolicyMetrics];
};

RLKERN_INLINE double at_least_one(double x) { return x > 1 ? x : 1; }

// What the caller gave, as numbers: NaN where it gave none.
struct GivenDenominators {
  double normalizer;
  double num_sequences;
  double entropy_normalizer;
};

struct Denominator {
  double value;
  double own;  // this batch's share of it, 0 where the caller gave it
};

RLKERN_INLINE Denominator denominator(Aggregation aggregation, bool skip_empty,
                                      const GivenDenominators& given, double tokens,
                                      double sequences, double non_empty) {
  if (aggregation == Aggregation::kTokenSum) return {1, 0};
  if (aggregation == Aggregation::kTokenMean) {
    if (given.normalizer == given.normalizer) return {given.normalizer, 0};
    return {at_least_one(tokens), tokens};
  }
  Denominator d;
  if (given.num_sequences == given.num_sequences) {
    d = {given.num_sequences, 0};
  } else {
    d.own = skip_empty ? non_empty : sequences;
    d.value = at_least_one(d.own);
  }
  if (aggregation == Aggregation::kSeqMeanTokenSumNorm) d.value *= given.normalizer;
  return d;
}

struct PolicyDenominators {
  Denominator policy;
  double bonus;
};

// Of the totals, only the counts of tokens and sequences are looked at.
RLKERN_INLINE PolicyDenominators policy_denominators(const PolicyOptions& o,
                                                     const GivenDenominators& given,
                                                     const PolicyTotals& t) {
  PolicyDenominators d;
  d.policy = denominator(o.aggregation, o.skip_empty, given, t.sum[kTokens], t.sum[kSequences],
                         t.sum[kNonEmpty]);
  d.bonus = d.policy.value;
  if (!o.entropy_same) {
    d.bonus = given.entropy_normalizer == given.entropy_normalizer
                  ? given.entropy_normalizer
                  : at_least_one(t.sum[kBonusCount]);
  }
  return d;
}

RLKERN_INLINE PolicyResult policy_result(const PolicyOptions& o, const GivenDenominators& given,
                                         const PolicyTotals& t) {
  const PolicyDenominators both = policy_denominators(o, given, t);
  const Denominator d = both.policy;
  const double bonus_denominator = both.bonus;
  PolicyResult r;
  r.scale = 1 / d.value;
  r.entropy_scale = 1 / bonus_denominator;
  r.loss = (t.sum[kPolicyLoss] + (o.kl_coef == 0 ? 0 : o.kl_coef * t.sum[kAggregatedKl])) / d.value;
  if (o.entropy_coef != 0) r.loss -= o.entropy_coef * t.sum[kBonus] / bonus_denominator;
  for (int i = 0; i < kPolicySums; ++i) r.metrics[i] = t.sum[i];
  // What the caller did not fix divides the merged sums; what it did, this batch's.
  r.metrics[kPolicyLoss] = t.sum[kPolicyLoss] * at_least_one(d.own) / d.value;
  r.metrics[kPolicyLossUnits] = d.own;
  for (int i = 0; i < kPolicyMaxima; ++i) r.metrics[kPolicySums + i] = t.max[i];
  return r;
}

}  // namespace rlkern

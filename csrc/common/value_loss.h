// The clipped value loss: one token's terms, what is summed, and what follows from the sums.
#pragma once

#include "policy_formulas.h"
#include "policy_totals.h"

namespace rlkern {

struct ValueOptions {
  float clip;  // infinity where the loss is not clipped
  Aggregation aggregation;
  bool skip_empty;
  double normalizer;  // NaN where not given as a number
  double num_sequences;
};

constexpr int kValueOptionCount = 5;

inline ValueOptions value_options(const double* v) {
  return {static_cast<float>(v[0]), static_cast<Aggregation>(static_cast<int>(v[1])), v[2] != 0,
          v[3], v[4]};
}

// In the order of SUMS in rlkern/reference/value_loss.py.
enum ValueSum {
  kValueTokens,
  kValueSequences,
  kValueLoss,
  kValueLossUnits,
  kValueClipped,
  kValue,
  kReturn,
  kReturnSquared,
  kResidual,
  kResidualSquared,
  kValueSums,  // the metrics end here
  kValueNonEmpty = kValueSums,
  kAllValueSums,
};

template <typename T>
struct ValueTerm {
  T loss;  // max of both squares
  T slope;
  T clipped;
  T residual;  // return - value
};

// v, old and R, zeros where masked.
template <typename T>
RLKERN_INLINE ValueTerm<T> value_term(float clip, T value, T old, T target) {
  const T free_difference = value - target;
  const T bounded = value > old + clip ? old + clip : (value < old - clip ? old - clip : value);
  const T clip_difference = bounded - target;
  const T free_square = free_difference * free_difference;
  const T clip_square = clip_difference * clip_difference;
  const auto over = clip_square > free_square;
  return {over ? clip_square : free_square, over ? T{} : 2.0f * free_difference,
          over ? T{} + 1.0f : T{}, -free_difference};
}

struct ValueTotals {
  double sum[kAllValueSums];

  RLKERN_HD void clear() {
    for (double& s : sum) s = 0;
  }
  RLKERN_HD void add(const ValueTotals& other) {
    for (int i = 0; i < kAllValueSums; ++i) sum[i] += other.sum[i];
  }
};

struct ValueResult {
  double loss;
  double scale;  // of the gradient
  double metrics[kValueSums];
};

// Of the totals, only the counts of tokens and sequences are looked at.
RLKERN_INLINE Denominator value_denominator(const ValueOptions& o, const GivenDenominators& given,
                                            const ValueTotals& t) {
  return denominator(o.aggregation, o.skip_empty, given, t.sum[kValueTokens],
                     t.sum[kValueSequences], t.sum[kValueNonEmpty]);
}

// What the slopes of the squares are multiplied by.
RLKERN_INLINE double value_scale(const Denominator& d) { return 0.5 / d.value; }

RLKERN_INLINE ValueResult value_result(const ValueOptions& o, const GivenDenominators& given,
                                       const ValueTotals& t) {
  const Denominator d = value_denominator(o, given, t);
  ValueResult r;
  r.scale = value_scale(d);
  r.loss = 0.5 * t.sum[kValueLoss] / d.value;
  for (int i = 0; i < kValueSums; ++i) r.metrics[i] = t.sum[i];
  r.metrics[kValueLoss] = r.loss * at_least_one(d.own);
  r.metrics[kValueLossUnits] = d.own;
  return r;
}

}  // namespace rlkern

// The divergence between two distributions over a vocabulary, element by element, for host and
// device, and for vectors of floats (see elementary.h).
//
// With t = log p - log q of an element:
//   KL(p || q) = sum p (t + expm1(-t)), since sum p expm1(-t) = sum q - p = 0
//   KL(q || p) = sum q (-t + expm1(t))
//   JS = b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q,
//        KL(p || m) = sum p (w - log1p(w)), w = (1 - b) expm1(-t) = m / p - 1; of q likewise
// No term is negative, so that nothing cancels between them, and an error that is common to all t,
// as that of the logarithms of the sums is, enters squared. The gradient with respect to the logits
// of p is p_j (f_j - sum_k p_k f_k) with
//   f = t;    f = -expm1(-t), whose p f is p - q;    f = -b log1p(w)
// in which a common error of t drops out of the difference.
#pragma once

#include "elementary.h"

namespace rlkern {

// In the order of DIVERGENCES in rlkern/reference/vocab_divergence.py.
enum class Divergence { kKl, kReverseKl, kJensenShannon, kCount };

template <typename T>
struct DivergenceTerms {
  T value;
  T slope;  // p f
  T p;
};

// p (t + expm1(-t)) for p = rises ? larger : larger * e, e = exp(-|t|), rises = t >= 0: from the
// larger of p and q no exponential overflows. Infinite for t = inf, where q is 0.
template <typename T>
RLKERN_INLINE T kl_term(T larger, T t, T e) {
  // p = 0 counts for the q that stands opposite it: e (t - 1) = 0 there, not 0 * inf.
  t = t < -1e30f ? T{} - 1e30f : t;
  const auto rises = t >= 0.0f;
  const T p = rises ? larger : larger * e;
  const T far = rises ? larger * ((t - 1.0f) + e) : larger * (e * (t - 1.0f) + 1.0f);
  const T term = magnitude(t) < kExpm1Series ? p * expm1_less_series(-t) : far;
  return larger == 0.0f ? T{} : term;
}

// `larger` is max(p, q). p = 0 and q = 0 together come as t = 0.
template <Divergence kKind, typename T>
RLKERN_INLINE DivergenceTerms<T> divergence_terms(T larger, T t, float beta) {
  T expm1_t;
  const T e = rl_exp_expm1(-magnitude(t), &expm1_t);
  const auto rises = t >= 0.0f;
  const T p = rises ? larger : larger * e;
  if (kKind == Divergence::kKl) {
    const T finite_below = t < -1e30f ? T{} - 1e30f : t;
    return {kl_term(larger, t, e), p == 0.0f ? T{} : p * finite_below, p};
  }
  if (kKind == Divergence::kReverseKl) {
    const T difference = larger * expm1_t;
    return {kl_term(larger, -t, e), rises ? -difference : difference, p};
  }
  // Of the larger and of the smaller; m / smaller - 1 = -larger's share * expm1(-|t|) / e.
  const T share = rises ? T{} + beta : T{} + (1.0f - beta);
  const T other = rises ? T{} + (1.0f - beta) : T{} + beta;
  const T e_above_0 = e < 1e-30f ? T{} + 1e-30f : e;
  const T w = other * expm1_t, v = -share * expm1_t / e_above_0;
  const T log_w = rl_log1p(w), log_v = rl_log1p(v);
  const T value = share * less_log1p(w, log_w) + other * e_above_0 * less_log1p(v, log_v);
  return {larger * value, p * (rises ? log_w : log_v) * -beta, p};
}

// ---- a row -------------------------------------------------------------------------------------

// What the forward pass leaves of a row for the gradient: the operator's state [..., 6].
struct DivergenceState {
  float max, log_sum, ref_max, ref_log_sum;
  float offset;  // what is taken off t
  float mean;    // of f: not finite where there is no gradient but NaN
};

// What is taken off the policy's logits before the reference's are: the maxima's difference in
// steps of 16. A shift of all logits is no difference between the distributions, but would round
// t; and below 16 the logits' own difference is the exact one where they are nearly equal.
RLKERN_INLINE float divergence_shift(float max, float ref_max) {
  return 16.0f * rl_rint((max - ref_max) / 16.0f);
}

// The divergence where only the policy, or only the reference, has a distribution: the other row
// holds nothing but -inf.
RLKERN_INLINE double divergence_of_one(Divergence kind, double beta, bool policy) {
  const double inf = __builtin_inf();
  if (kind == Divergence::kKl) return policy ? inf : 0;
  if (kind == Divergence::kReverseKl) return policy ? 0 : inf;
  const double share = policy ? beta : 1 - beta;
  return -share * rl_log(share);
}

struct DivergenceRowBegin {
  DivergenceState state;
  bool settled;  // the rows need not be read once more: this is the value, and the state is whole
  double value;
};

// From the maximum of each row (of the capped logits, -inf: nothing else is there) and the
// logarithm of its sum of exponentials relative to that.
RLKERN_INLINE DivergenceRowBegin divergence_begin(Divergence kind, double beta, float max,
                                                  double log_sum, float ref_max, double ref_log_sum,
                                                  float inv_temperature) {
  const float inf = __builtin_inff();
  DivergenceRowBegin row = {
      {max, static_cast<float>(log_sum), ref_max, static_cast<float>(ref_log_sum), 0, 0}, true, 0};
  // The maximum drops NaN, the sum does not.
  if (log_sum != log_sum || ref_log_sum != ref_log_sum) {
    row.value = __builtin_nan("");
    row.state.mean = __builtin_nanf("");
    return row;
  }
  const bool policy = max != -inf, reference = ref_max != -inf;
  if (policy && reference) {
    const double shift = divergence_shift(max, ref_max);
    row.state.offset = static_cast<float>(
        (static_cast<double>(max) - ref_max - shift) * inv_temperature + (log_sum - ref_log_sum));
    row.settled = false;
  } else if (policy || reference) {
    row.value = divergence_of_one(kind, beta, policy);
    // No gradient, but of an infinite KL.
    if (policy && row.value == inf) row.state.mean = inf;
  }
  return row;
}

enum class DivergenceGradient { kZero, kNan, kComputed };

// What the gradient of a row is. One that holds a NaN shows it, whatever is upstream.
RLKERN_INLINE DivergenceGradient divergence_gradient(const DivergenceState& s, bool counts,
                                                     float upstream) {
  const float inf = __builtin_inff();
  if (!counts) return DivergenceGradient::kZero;
  if (s.mean != s.mean) return DivergenceGradient::kNan;
  if (upstream == 0) return DivergenceGradient::kZero;
  if (s.mean == inf || s.mean == -inf) return DivergenceGradient::kNan;
  const bool both = s.max != -inf && s.ref_max != -inf;
  return both ? DivergenceGradient::kComputed : DivergenceGradient::kZero;
}

}  // namespace rlkern

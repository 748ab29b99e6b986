// The scalar math of the operators and of their derivatives, for host and device.
#pragma once

#include "online_softmax.h"

namespace rlkern {

// ---- log-probability and entropy of one row ------------------------------------------------
//
// A row pass yields the state of every value but the target's, relative to a maximum that counts
// the target too. Leaving the target out is what keeps a log-probability near 0 exact:
// log p_y = -log1p(sum of the others), where z_y - logsumexp would cancel.

template <typename T>
struct TokenLogprob {
  T logprob;
  T entropy;
  T log_sum;  // log sum_j exp(z_j - max)
};

// `others` leaves the target out; `target` is z_y - others.max, at most 0.
template <typename T>
RLKERN_INLINE TokenLogprob<T> token_logprob(SoftmaxState<T> others, T target) {
  const T inf = static_cast<T>(__builtin_inf());
  if (others.max == -inf && others.sum == T(0)) return {-inf, T(0), T(0)};  // nothing but -inf
  const T e = rl_exp(target);
  const T total = others.sum + e;
  const T log_sum = target == T(0) ? rl_log1p(others.sum) : rl_log(total);
  const T weighted = others.weighted + (target == -inf ? T(0) : target * e);
  return {target - log_sum, log_sum - weighted / total, log_sum};
}

// The gradient with respect to z_j, for upstream gradients g of the log-probability and h of the
// entropy, as p_j * (constant + slope * (z_j - max)) with p_j = exp(z_j - max - log_sum), and
// whole for the target, whose 1 - p_y must not be formed by subtraction.
//   d logp / d z_j = [j = y] - p_j          d H / d z_j = p_j * (E[z] - z_j)
template <typename T>
struct TokenGradient {
  T constant;
  T slope;
  T target;
};

template <typename T>
RLKERN_INLINE TokenGradient<T> token_gradient(T g, T h, T logprob, T entropy, T log_sum) {
  const T inf = static_cast<T>(__builtin_inf());
  // A token that cannot be drawn has no gradient of its log-probability, whatever is upstream.
  if (logprob == -inf) g = T(0);
  const T mean = h == T(0) ? T(0) : log_sum - entropy;  // E[z] - max
  const T target = logprob + log_sum;                   // z_y - max
  // A row that holds a NaN shows it, whatever is upstream.
  T whole = g == T(0) && logprob == logprob ? T(0) : g * -rl_expm1(logprob);
  if (h != T(0) && logprob != -inf) whole += h * rl_exp(logprob) * (mean - target);
  return {h * mean - g, -h, whole};
}

}  // namespace rlkern

// GAE, discounted returns and V-trace as one linear recurrence over time (the definition:
// rlkern/reference/return_scan.py), for host and device.
//
// Walking from the last token to the first, a sequence's state is the pair (V_{t+1}, x_{t+1}); a
// token maps it to (V_t, x_t). These maps are affine, V_t does not depend on x_{t+1}, and their
// composition is of the same kind: so a run of tokens is one map, and time can be scanned in
// parallel. The backward pass walks from the first token to the last with the pair of adjoints,
// whose maps have the same shape. In double: what is 6e-8 off in gamma lam is 1e-4 off in its
// 10,000th power's share of a return.
#pragma once

#include <cstdint>

#include "macros.h"

namespace rlkern {

struct ReturnOptions {
  double gamma;
  double lam;   // where a sequence has none of its own
  bool breaks;  // a masked token between counting ones enters as value 0 and reward 0
  double rho_bar;
  double c_bar;
  double rho_pg_bar;
};

constexpr int kReturnOptionCount = 6;

inline ReturnOptions return_options(const double* v) {
  return {v[0], v[1], v[2] != 0, v[3], v[4], v[5]};
}

// (u, w) -> (n + q u, a + b u + k w).
struct PairMap {
  double n, q;
  double a, b, k;
};

struct Pair {
  double u, w;
};

// Selected, not multiplied, where the factor is 0: past the end of an episode nothing enters, and a
// NaN there is none here.
RLKERN_INLINE double scaled(double factor, double x) { return factor == 0 ? 0 : factor * x; }

RLKERN_INLINE PairMap identity_map() { return {0, 1, 0, 0, 1}; }

RLKERN_INLINE Pair applied(const PairMap& m, const Pair& s) {
  return {m.n + scaled(m.q, s.u), m.a + scaled(m.b, s.u) + scaled(m.k, s.w)};
}

// What `first` does and then `second`.
RLKERN_INLINE PairMap then(const PairMap& first, const PairMap& second) {
  return {second.n + scaled(second.q, first.n), scaled(second.q, first.q),
          second.a + scaled(second.b, first.n) + scaled(second.k, first.a),
          scaled(second.b, first.q) + scaled(second.k, first.b), scaled(second.k, first.k)};
}

RLKERN_INLINE double at_most(double x, double bound) { return x > bound ? bound : x; }

// One token; value and log_ratio 0 where there are none.
struct ReturnToken {
  double reward;
  double value;
  double log_ratio;
  bool done;
};

// The map of a counting token, from (V_{t+1}, x_{t+1}) to (V_t, x_t).
RLKERN_INLINE PairMap token_map(const ReturnOptions& o, double lam, const ReturnToken& t) {
  const double ratio = t.log_ratio == 0 ? 1 : rl_exp(t.log_ratio);
  const double rho = at_most(ratio, o.rho_bar), c = at_most(ratio, o.c_bar);
  const double gamma = t.done ? 0 : o.gamma;
  return {t.value, 0, rho * (t.reward - t.value), scaled(gamma, rho), scaled(gamma * lam, c)};
}

// That map applied, for who walks token by token.
RLKERN_INLINE Pair before_token(const ReturnOptions& o, double lam, const ReturnToken& t,
                                const Pair& next) {
  const double ratio = t.log_ratio == 0 ? 1 : rl_exp(t.log_ratio);
  const double rho = at_most(ratio, o.rho_bar), c = at_most(ratio, o.c_bar);
  const double gamma = t.done ? 0 : o.gamma;
  return {t.value, rho * (t.reward + scaled(gamma, next.u) - t.value) +
                       scaled(scaled(gamma * lam, c), next.w)};
}

// Of a masked token that comes before a counting one.
RLKERN_INLINE PairMap masked_map(const ReturnOptions& o, double lam) {
  return o.breaks ? token_map(o, lam, {0, 0, 0, false}) : identity_map();
}

// V-trace's advantage of a counting token, from the state after it.
RLKERN_INLINE double trace_advantage(const ReturnOptions& o, double lam, const ReturnToken& t,
                                     const Pair& next) {
  const double rho = at_most(rl_exp(t.log_ratio), o.rho_pg_bar);
  const double gamma = t.done ? 0 : o.gamma;
  return rho * (t.reward + scaled(gamma, next.u + lam * next.w) - t.value);
}

// ---- backward of GAE and of discounted returns ------------------------------------------------
//
// With G_t the gradient of A_t from outside, L_t = G_t + gamma lam L_{t-1} is that of delta_t. The
// pair (u, w) = (gamma lam L, gamma L) of the token before gives
//   d r_t = L_t,   d V_t = (gradient of returns_t) - L_t + w,   d bootstrap = w after the last.

RLKERN_INLINE PairMap adjoint_map(const ReturnOptions& o, double lam, double g, bool done) {
  const double gamma = done ? 0 : o.gamma;
  const double both = gamma * lam;
  return {scaled(both, g), both, scaled(gamma, g), gamma, 0};
}

RLKERN_INLINE PairMap masked_adjoint_map(const ReturnOptions& o, double lam) {
  return o.breaks ? adjoint_map(o, lam, 0, false) : identity_map();
}

}  // namespace rlkern

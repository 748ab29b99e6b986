// The policy losses' math of one token and its derivatives, for host and device, and for vectors
// of floats: T is float, or a vector type whose comparisons give a mask that `? :` selects by.
// Written without branches on values; a branch that a value does not take leaves 0, never
// 0 * inf.
#pragma once

#include "elementary.h"
#include "policy_options.h"

namespace rlkern {

// a * b, 0 where either is 0.
template <typename T>
RLKERN_INLINE T product(T a, T b) {
  return ((a == 0.0f) | (b == 0.0f)) ? T{} : a * b;
}

template <typename T>
RLKERN_INLINE T clamped(T x, float low, float high) {  // a NaN stays
  x = x < low ? T{} + low : x;
  return x > high ? T{} + high : x;
}

// ---- KL ---------------------------------------------------------------------------------------

template <typename T>
struct Kl {
  T value;
  T slope;  // with respect to logprob
};

// x = ref - logprob.
template <typename T>
RLKERN_INLINE Kl<T> kl_estimate(KlEstimator estimator, KlClamp clamp, T raw) {
  const bool k3 = estimator == KlEstimator::kK3 || estimator == KlEstimator::kK3St;
  const bool bounded = clamp == KlClamp::kOpenRlhf || (clamp == KlClamp::kVerl && k3);
  const T x = bounded ? clamped(raw, -kKlLogBound, kKlLogBound) : raw;
  Kl<T> kl;
  switch (estimator) {
    case KlEstimator::kK1:
    case KlEstimator::kK1St:
      kl = {-x, T{} + 1.0f};
      break;
    case KlEstimator::kAbs:
    case KlEstimator::kAbsSt:
      kl = {magnitude(x), x > 0.0f ? T{} - 1.0f : (x < 0.0f ? T{} + 1.0f : T{})};
      break;
    case KlEstimator::kK2:
      kl = {x * x * 0.5f, -x};
      break;
    default: {
      const T e = rl_expm1(x);
      kl = {expm1_less(x, e), -e};
    }
  }
  if (bounded) {
    const auto inside = (magnitude(raw) <= kKlLogBound) & (magnitude(kl.value) <= kKlValueBound);
    kl.slope = inside ? kl.slope : T{};
    kl.value = clamped(kl.value, -kKlValueBound, kKlValueBound);
  }
  const bool straight_through = estimator == KlEstimator::kK1St ||
                                estimator == KlEstimator::kAbsSt || estimator == KlEstimator::kK3St;
  if (straight_through) kl.slope = -raw;  // of the unclamped x^2 / 2
  return kl;
}

// ---- surrogates -------------------------------------------------------------------------------

// A token's loss, its derivatives, and whether it is clipped, as 0 or 1.
template <typename T>
struct SurrogateTerm {
  T loss;
  T from_ratio;  // d loss / d log r
  T direct;      // d loss / d logprob, the ratio held
  T low;
  T high;
  T dual;
  T cispo;  // above the range, with a positive advantage
};

template <typename T>
RLKERN_INLINE SurrogateTerm<T> clip_term(const PolicyOptions& o, T r, T a) {
  const T one = T{} + 1.0f;
  const T capped = r > o.ratio_cap ? T{} + o.ratio_cap : r;
  const T free_part = product(capped, a);
  const T clip_part = product(clamped(r, o.ratio_low, o.ratio_high), a);
  const auto is_free = free_part <= clip_part;
  T loss = -(is_free ? free_part : clip_part);
  // Inside the range the clipped branch is r A too, and the smaller one where a cap below the
  // range's end holds the other.
  const auto free_slope = is_free & !(r > o.ratio_cap);
  const auto clip_slope = !is_free & (r >= o.ratio_low) & (r <= o.ratio_high);
  T slope = (free_slope | clip_slope) ? loss : T{};
  const T ceiling = -o.dual_clip * a;
  const auto over = (a < 0.0f) & (loss > ceiling);
  loss = over ? ceiling : loss;
  slope = over ? T{} : slope;
  return {loss,
          slope,
          T{},
          ((capped < o.ratio_low) & (a < 0.0f)) ? one : T{},
          ((capped > o.ratio_high) & (a > 0.0f)) ? one : T{},
          ((a < 0.0f) & (capped > o.dual_clip)) ? one : T{},
          T{}};
}

template <typename T>
RLKERN_INLINE SurrogateTerm<T> cispo_term(const PolicyOptions& o, T r, T a, T logprob) {
  const T one = T{} + 1.0f;
  const T weight = product(clamped(r, o.ratio_low, o.ratio_high), a);
  const auto above = r > o.ratio_high;
  return {-product(weight, logprob),
          T{},
          -weight,
          r < o.ratio_low ? one : T{},
          above ? one : T{},
          T{},
          (above & (a > 0.0f)) ? one : T{}};
}

// The sigmoid's derivative is s (1 - s) = e / (1 + e)^2, e = exp(-|u|), which does not cancel.
template <typename T>
RLKERN_INLINE SurrogateTerm<T> sapo_term(const PolicyOptions& o, T r, T a) {
  const T tau = a > 0.0f ? T{} + o.sapo_tau_pos : T{} + o.sapo_tau_neg;
  const T u = tau * (r - 1.0f);
  const T e = rl_exp(-magnitude(u));
  const T inverse = 1.0f / (1.0f + e);
  const T sigmoid = u >= 0.0f ? inverse : (u < 0.0f ? e * inverse : u);
  const T slope = product(4.0f * e * inverse * inverse, r);
  return {-product(4.0f / tau * sigmoid, a), -product(slope, a), T{}, T{}, T{}, T{}, T{}};
}

template <typename T>
RLKERN_INLINE SurrogateTerm<T> dppo_term(const PolicyOptions& o, T r, T a, T logprob, T old) {
  const T one = T{} + 1.0f;
  const T p = rl_exp(logprob), q = rl_exp(old);
  const auto rises = a > 0.0f;
  auto keep = rises ? p - q <= o.clip_high : p - q >= -o.clip_low;
  if (o.surrogate == SurrogateKind::kDppoKl) {
    // 1 - p as -expm1(logprob): by subtraction it would lose what the logarithm looks at.
    const T rest_p = -rl_expm1(logprob), rest_q = -rl_expm1(old);
    const T others = product(rest_q, rl_log((rest_q + kDppoEps) / (rest_p + kDppoEps)));
    const T divergence = product(q, old - logprob) + others;
    keep = rises ? (divergence <= o.clip_high) | (p <= q) : (divergence <= o.clip_low) | (p >= q);
  }
  const T capped = r > o.ratio_cap ? T{} + o.ratio_cap : r;
  const T weight = keep ? product(capped, a) : T{};
  return {-product(weight, logprob),        T{}, -weight, (!keep & (a < 0.0f)) ? one : T{},
          (!keep & (a > 0.0f)) ? one : T{}, T{}, T{}};
}

// ---- one token --------------------------------------------------------------------------------

// What a token needs to know of its sequence.
struct SequenceState {
  float ratio;           // at the sequence levels
  bool ratio_open;       // not held by sequence_token's bound
  float rollout_weight;  // at the sequence levels of the correction
  float phi_pos;         // vespo's weight for A >= 0 and for A < 0
  float phi_neg;
  bool near;   // within off_policy_threshold
  float gmpo;  // the loss of the whole sequence, over the tokens' weight
  double gmpo_loss;
};

template <typename T>
struct PolicyInput {  // zeros where masked
  T logprob;
  T old;
  T ref;
  T rollout;
  T advantage;
  T weight;  // token_weights
};

template <typename T>
struct PolicyTerm {
  SurrogateTerm<T> policy;  // weighted
  Kl<T> kl;                 // weighted by the ratio if asked
  T kl_from_ratio;          // d kl / d log r
  T ratio_open;             // d log r / d logprob of this token, 0 where a clamp holds it
  T ratio;
  T approx_kl;
  T rollout_weight;
  T kept;
  T phi;
};

template <typename T>
RLKERN_INLINE T rollout_weight_of(const PolicyOptions& o, T log_weight) {
  const T w = rl_exp(clamped(log_weight, -kLogBound, kLogBound));
  if (!o.correction_masks) return clamped(w, o.correction_low, o.correction_high);
  return ((w >= o.correction_low) & (w <= o.correction_high)) ? w : T{};
}

// 0 where it is NaN.
template <typename T>
RLKERN_INLINE T or_zero(T x) {
  return x == x ? x : T{};
}

RLKERN_INLINE float vespo_phi(float log_w, float k, float lambda) {
  const float phi = rl_exp(lambda + k * log_w - lambda * rl_exp(log_w));
  return phi <= 3.4028234e38f ? phi : 0.0f;
}

// gmpo's clipped log-ratio, and whether the token's own log-ratio passed.
template <typename T>
struct GmpoTerm {
  T clipped;
  T open;
};

template <typename T>
RLKERN_INLINE GmpoTerm<T> gmpo_term(const PolicyOptions& o, T d, T a) {
  const T bounded = clamped(d, -o.clip_low, o.clip_high);
  const auto lower = d <= bounded, upper = d >= bounded;
  const auto open = ((a > 0.0f) & lower) | ((a < 0.0f) & upper);
  const T clipped = a == 0.0f ? T{} : (open ? d : bounded);
  return {clipped, open ? T{} + 1.0f : T{}};
}

RLKERN_INLINE SequenceState sequence_defaults() { return {1, true, 1, 0, 0, true, 0, 0}; }

RLKERN_INLINE void set_log_ratio(const PolicyOptions& o, float log_ratio, SequenceState* s) {
  s->ratio_open = o.level != RatioLevel::kSequenceToken || log_ratio <= kSequenceTokenLogBound;
  s->ratio = rl_exp(s->ratio_open ? log_ratio : kSequenceTokenLogBound);
}

template <SurrogateKind kSurrogate, typename T>
RLKERN_INLINE PolicyTerm<T> policy_term(const PolicyOptions& o, const SequenceState& s,
                                        bool has_ref, const PolicyInput<T>& in) {
  const T one = T{} + 1.0f;
  PolicyTerm<T> out;
  const T d = in.logprob - in.old;
  T expm1_d;
  const T exp_d = rl_exp_expm1(d, &expm1_d);
  out.approx_kl = expm1_less(d, expm1_d);
  switch (o.level) {
    case RatioLevel::kToken: {
      const bool bounded = kSurrogate != SurrogateKind::kGmpo;
      const auto low = d<-o.log_ratio_clamp, high = d> o.log_ratio_clamp;
      out.ratio = exp_d;
      out.ratio_open = one;
      if (bounded) {
        out.ratio = low ? T{} + o.least_ratio : exp_d;
        out.ratio = high ? T{} + o.largest_ratio : out.ratio;
        out.ratio_open = (low | high) ? T{} : one;
      }
      break;
    }
    default:
      out.ratio = T{} + s.ratio;
      out.ratio_open = s.ratio_open ? one : T{};
  }

  SurrogateTerm<T>& p = out.policy;
  const T a = in.advantage;
  out.phi = T{};
  if (kSurrogate == SurrogateKind::kClip) p = clip_term(o, out.ratio, a);
  if (kSurrogate == SurrogateKind::kCispo) p = cispo_term(o, out.ratio, a, in.logprob);
  if (kSurrogate == SurrogateKind::kSapo) p = sapo_term(o, out.ratio, a);
  if (kSurrogate == SurrogateKind::kDppoTv || kSurrogate == SurrogateKind::kDppoKl) {
    p = dppo_term(o, out.ratio, a, in.logprob, in.old);
  }
  if (kSurrogate == SurrogateKind::kReinforce) {
    p = {-product(a, in.logprob), T{}, -a, T{}, T{}, T{}, T{}};
  }
  if (kSurrogate == SurrogateKind::kVespo) {
    out.phi = a >= 0.0f ? T{} + s.phi_pos : T{} + s.phi_neg;
    const T weight = product(out.phi, a);
    p = {-product(weight, in.logprob), T{}, -weight, T{}, T{}, T{}, T{}};
  }
  if (kSurrogate == SurrogateKind::kGmpo) {
    // The sequence's loss is added once, not per token; here stands its derivative alone.
    const GmpoTerm<T> g = gmpo_term(o, d, a);
    p = {T{},
         T{},
         product(g.open * in.weight, T{} + s.gmpo),
         ((d < -o.clip_low) & (a < 0.0f)) ? one : T{},
         ((d > o.clip_high) & (a > 0.0f)) ? one : T{},
         T{},
         T{}};
  }

  out.rollout_weight = one;
  if (o.correction == CorrectionLevel::kToken) {
    out.rollout_weight = rollout_weight_of(o, or_zero(in.old - in.rollout));
  } else if (o.correction != CorrectionLevel::kNone) {
    out.rollout_weight = T{} + s.rollout_weight;
  }
  out.kept = (s.near ? one : (a >= 0.0f ? one : T{}));
  if (kSurrogate != SurrogateKind::kGmpo) {
    T weight = out.kept * in.weight;
    if (kSurrogate != SurrogateKind::kVespo) weight *= out.rollout_weight;
    p.loss = product(p.loss, weight);
    p.from_ratio = product(p.from_ratio, weight);
    p.direct = product(p.direct, weight);
  }

  out.kl = {T{}, T{}};
  out.kl_from_ratio = T{};
  if (has_ref) {
    out.kl = kl_estimate(o.kl_estimator, o.kl_clamp, in.ref - in.logprob);
    if (o.kl_ratio_weighted) {
      out.kl.value = product(out.kl.value, out.ratio);
      out.kl.slope = product(out.kl.slope, out.ratio);
      out.kl_from_ratio = out.kl.value;
    }
  }
  return out;
}

}  // namespace rlkern

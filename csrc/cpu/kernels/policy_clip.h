// What most calls ask for: the clipped ratio of a token or of its sequence, one advantage for the
// whole sequence, a k3 KL or none, and nothing else. The advantage's sign says which end of the
// range a ratio can be held at, so that a token's term is one comparison and a product; and where
// the sequence has one ratio, all its tokens have the same term and the same gradient of it.
#pragma once

#include "../../common/policy_sequence.h"
#include "policy_kernels.h"
#include "token_blocks.h"

namespace rlkern {
namespace {

inline bool is_plain_clip(const PolicyOptions& o, const PolicySequence& s) {
  const bool plain_kl =
      s.ref_logprobs == nullptr ||
      (o.kl_estimator == KlEstimator::kK3 && o.kl_clamp == KlClamp::kNone && !o.kl_ratio_weighted);
  return o.surrogate == SurrogateKind::kClip && plain_kl &&
         (o.level == RatioLevel::kToken || o.level == RatioLevel::kSequence) &&
         o.correction == CorrectionLevel::kNone && !o.off_policy() && !(o.dual_clip < kInf) &&
         !(o.ratio_cap < kInf) && s.entropy == nullptr && s.token_weights == nullptr &&
         s.old_logprobs != nullptr && s.one_advantage;
}

template <typename Block>
RLKERN_INLINE Kl<vfloat> plain_kl(const PolicySequence& s, const Block& block, vfloat logprob) {
  return kl_estimate(KlEstimator::kK3, KlClamp::kNone, block.load(s.ref_logprobs) - logprob);
}

template <bool kHasRef>
void clip_tokens(const PolicyOptions& o, const PolicySequence& s, GradientScales scales,
                 PolicyTotals* out) {
  const double count = (double)count_both(s.mask, nullptr, s.size);
  const SequenceShares shares = sequence_shares<SurrogateKind::kClip>(o, at_least_one(count));
  const SequenceShares of_gradient = scaled(shares, scales);
  const float a = s.advantage;
  // min(r A, clip(r) A) is A min(r, high) for A > 0, and A max(r, low) for A < 0.
  const float side = a < 0 ? -1.0f : 1.0f;
  const float end = a < 0 ? o.ratio_low : o.ratio_high;
  const float slope = -a * of_gradient.policy;
  // Without an advantage there is no gradient, whatever the ratio: never 0 * inf.
  const float log_limit = a == 0 ? -1.0f : o.log_ratio_clamp;
  const bool kl_gradient = kHasRef && o.kl_coef != 0;

  enum { kClipped, kHeld, kRatios, kApprox, kKlSum, kCount };
  Sums<kCount> sums;
  RatioRange<vfloat> range;
  const auto terms = [&](const auto& block) __attribute__((always_inline)) {
    const vint counts = block.counts;
    const vfloat none = broadcast(-kInf);
    const vfloat logprob = block.load(s.logprobs);
    const vfloat d = logprob - block.load(s.old_logprobs);
    block.will_store(s.grad_logprobs, kAhead / 2);
    vfloat expm1_d;
    const vfloat ratio = clamped(rl_exp_expm1(d, &expm1_d), o.least_ratio, o.largest_ratio);
    const vint held = ratio * side > side * end;
    sums.chain[kClipped] += counts ? (held ? broadcast(end) : ratio) : vfloat{};
    sums.chain[kHeld] += (counts & held) ? broadcast(1.0f) : vfloat{};
    sums.chain[kRatios] += counts ? ratio : vfloat{};
    sums.chain[kApprox] += expm1_less(d, expm1_d);
    range.max = max_drop_nan(range.max, counts ? ratio : none);
    range.minus_min = max_drop_nan(range.minus_min, counts ? -ratio : none);
    vfloat grad = (held | (magnitude(d) > log_limit)) ? vfloat{} : ratio * slope;
    if (kHasRef) {
      const Kl<vfloat> kl = plain_kl(s, block, logprob);
      sums.chain[kKlSum] += kl.value;
      if (kl_gradient) grad += of_gradient.kl * kl.slope;
    }
    if (s.grad_logprobs != nullptr) block.store(s.grad_logprobs, counts ? grad : vfloat{});
  };
  for_blocks(s, &sums, terms, s.grad_logprobs);

  double total[TermSum::kCount] = {};
  total[TermSum::kLoss] = product(-(double)a, sums.total(kClipped));
  total[a < 0 ? TermSum::kLow : TermSum::kHigh] = a < 0 || a > 0 ? sums.total(kHeld) : 0;
  total[TermSum::kRatio] = sums.total(kRatios);
  total[TermSum::kApproxKl] = sums.total(kApprox);
  total[TermSum::kKl] = sums.total(kKlSum);
  const RatioRange<float> ends = {reduce_max(range.max), reduce_max(range.minus_min)};
  add_sequence<SurrogateKind::kClip>(o, true, a, sequence_defaults(), shares, count, total, ends,
                                     out);
}

template <bool kHasRef>
void clip_sequence(const PolicyOptions& o, const PolicySequence& s, GradientScales scales,
                   PolicyTotals* out) {
  const double count = (double)count_both(s.mask, nullptr, s.size);
  const double length = at_least_one(count);
  const SequenceShares shares = sequence_shares<SurrogateKind::kClip>(o, length);
  const SequenceShares of_gradient = scaled(shares, scales);

  enum { kLogRatio, kApprox, kCount };
  Sums<kCount> before;
  for_blocks(s, &before, [&](const auto& block) __attribute__((always_inline)) {
    const vfloat d = block.load(s.logprobs) - block.load(s.old_logprobs);
    before.chain[kLogRatio] += d;
    block.will_store(s.grad_logprobs, 0);
    before.chain[kApprox] += expm1_less(d, rl_expm1(d));
  });
  double of_sequence[BeforeSum::kCount] = {};
  of_sequence[BeforeSum::kLogRatio] = before.total(kLogRatio);
  const SequenceState state = sequence_state<SurrogateKind::kClip>(o, length, of_sequence);
  const SurrogateTerm<float> term = clip_term(o, state.ratio, s.advantage);
  // d log r / d logprob is 1 / length for each of the tokens, whose terms are `length` equal ones.
  const float each = of_gradient.policy * term.from_ratio;
  const bool kl_gradient = kHasRef && o.kl_coef != 0;

  Sums<1> kl_sum;
  const auto gradient = [&](const auto& block) __attribute__((always_inline)) {
    vfloat grad = broadcast(each);
    if (kHasRef) {
      const Kl<vfloat> kl = plain_kl(s, block, block.load(s.logprobs));
      kl_sum.chain[0] += kl.value;
      if (kl_gradient) grad += of_gradient.kl * kl.slope;
    }
    if (s.grad_logprobs != nullptr) block.store(s.grad_logprobs, block.counts ? grad : vfloat{});
  };
  if (kHasRef || s.grad_logprobs != nullptr) for_blocks(s, &kl_sum, gradient, s.grad_logprobs);

  double total[TermSum::kCount] = {};
  total[TermSum::kLoss] = product(count, (double)term.loss);
  total[TermSum::kLow] = product(count, (double)term.low);
  total[TermSum::kHigh] = product(count, (double)term.high);
  total[TermSum::kApproxKl] = before.total(kApprox);
  total[TermSum::kKl] = kl_sum.total(0);
  add_sequence<SurrogateKind::kClip>(o, true, s.advantage, state, shares, count, total, {}, out);
}

inline void plain_clip(const PolicyOptions& o, const PolicySequence& s, GradientScales scales,
                       PolicyTotals* out) {
  const bool has_ref = s.ref_logprobs != nullptr;
  if (o.level == RatioLevel::kToken) {
    return has_ref ? clip_tokens<true>(o, s, scales, out) : clip_tokens<false>(o, s, scales, out);
  }
  return has_ref ? clip_sequence<true>(o, s, scales, out) : clip_sequence<false>(o, s, scales, out);
}

}  // namespace
}  // namespace rlkern

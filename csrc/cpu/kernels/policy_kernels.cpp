// A policy loss over one sequence, compiled once per instruction set (see CMakeLists.txt).
//
// At most three walks over the sequence, which stays in the cache: sums that the terms need (only
// for losses that have a sequence's ratio or weight), the terms with gradient and metrics, and,
// where the tokens share a ratio, its gradient. Sums run in floats over chains of at most
// kChain vectors, then in doubles, in an order that depends on the sequence's length alone.

#include "policy_kernels.h"

// clang-format off: the formulas find the vectors' exp and log by their declarations before them.
#include "token_blocks.h"
#include "../../common/policy_sequence.h"
// clang-format on

namespace rlkern {
namespace {

template <typename Block>
RLKERN_INLINE PolicyInput<vfloat> policy_input(const PolicySequence& s, const Block& block) {
  PolicyInput<vfloat> in;
  in.logprob = block.load(s.logprobs);
  in.old = s.old_logprobs != nullptr ? block.load(s.old_logprobs) : in.logprob;
  in.ref = s.ref_logprobs != nullptr ? block.load(s.ref_logprobs) : vfloat{};
  in.rollout = s.rollout_logprobs != nullptr ? block.load(s.rollout_logprobs) : vfloat{};
  const vfloat same = vfloat{} + s.advantage;
  in.advantage = s.one_advantage ? (block.counts ? same : vfloat{}) : block.load(s.advantages);
  in.weight = s.token_weights != nullptr ? block.load(s.token_weights)
                                         : (block.counts ? vfloat{} + 1.0f : vfloat{});
  return in;
}

template <SurrogateKind kSurrogate>
SequenceState state_of(const PolicyOptions& o, const PolicySequence& s, double length) {
  if (!o.needs_sums()) return sequence_defaults();
  Sums<BeforeSum::kCount> sums;
  const bool has_rollout = s.rollout_logprobs != nullptr;
  for_blocks(s, &sums, [&](const auto& block) __attribute__((always_inline)) {
    add_before<kSurrogate>(o, has_rollout, block.counts, policy_input(s, block), sums.chain);
  });
  return sequence_state<kSurrogate>(o, length, sums.total);
}

// What most calls ask for: the clipped ratio of a token or of its sequence, with a k3 KL or without
// one, and nothing else. With these options as constants the loop over tokens is a third as long.
bool is_common(const PolicyOptions& o, const PolicySequence& s) {
  const bool plain_kl =
      s.ref_logprobs == nullptr ||
      (o.kl_estimator == KlEstimator::kK3 && o.kl_clamp == KlClamp::kNone && !o.kl_ratio_weighted);
  return o.surrogate == SurrogateKind::kClip && plain_kl &&
         (o.level == RatioLevel::kToken || o.level == RatioLevel::kSequence) &&
         o.correction == CorrectionLevel::kNone && !o.off_policy() && !(o.dual_clip < kInf) &&
         !(o.ratio_cap < kInf) && s.entropy == nullptr && s.token_weights == nullptr &&
         s.old_logprobs != nullptr && s.one_advantage;
}

template <RatioLevel kLevel, bool kHasRef>
RLKERN_INLINE void set_common(PolicyOptions* o, PolicySequence* s) {
  o->level = kLevel;
  o->kl_estimator = KlEstimator::kK3;
  o->kl_clamp = KlClamp::kNone;
  o->kl_ratio_weighted = false;
  o->correction = CorrectionLevel::kNone;
  o->off_policy_threshold = kInf;
  o->dual_clip = kInf;
  o->ratio_cap = kInf;
  o->entropy_coef = 0;
  if (!kHasRef) s->ref_logprobs = nullptr;
  s->one_advantage = true;
  s->advantages = nullptr;
  s->rollout_logprobs = nullptr;
  s->entropy = nullptr;
  s->token_weights = nullptr;
}

template <SurrogateKind kSurrogate>
RLKERN_INLINE void sequence(const PolicyOptions& o, const PolicySequence& s, PolicyTotals* out) {
  const double count = (double)count_tokens(s);
  const double length = at_least_one(count);
  const SequenceState state = state_of<kSurrogate>(o, s, length);
  const SequenceShares shares = sequence_shares<kSurrogate>(o, length);
  const bool has_ref = s.ref_logprobs != nullptr;

  Sums<TermSum::kCount> sums;
  RatioRange<vfloat> range;
  for_blocks(s, &sums, [&](const auto& block) __attribute__((always_inline)) {
    const vint counts = block.counts;
    const PolicyTerm<vfloat> t = policy_term<kSurrogate>(o, state, has_ref, policy_input(s, block));
    add_term<kSurrogate>(o, has_ref, counts, t, sums.chain, &range);
    if (s.grad_logprobs != nullptr) {
      block.store(s.grad_logprobs, term_gradient(o, shares, has_ref, counts, t, sums.chain));
    }
    if (s.entropy != nullptr) {
      const vfloat entropy = block.load(s.entropy);
      sums.chain[TermSum::kEntropy] += entropy;
      if (o.entropy_coef != 0) {
        const vint chosen =
            s.entropy_mask != nullptr ? counts & block.flags(s.entropy_mask) : counts;
        const vfloat grad = add_bonus(o, shares, chosen, entropy, sums.chain);
        if (s.grad_entropy != nullptr) block.store(s.grad_entropy, grad);
      }
    }
  });

  if (o.coupled() && s.grad_logprobs != nullptr) {
    const float each = shared_gradient(o, length, sums.total[TermSum::kShared]);
    Sums<1> none;
    for_blocks(s, &none, [&](const auto& block) __attribute__((always_inline)) {
      const vfloat own = block.load(s.grad_logprobs);
      block.store(s.grad_logprobs, block.counts ? own + each : vfloat{});
    });
  }
  const RatioRange<float> ends = {reduce_max(range.max), reduce_max(range.minus_min)};
  add_sequence<kSurrogate>(o, s.one_advantage, s.advantage, state, shares, count, sums.total, ends,
                           out);
}

template <RatioLevel kLevel, bool kHasRef>
void common(PolicyOptions o, PolicySequence s, PolicyTotals* out) {
  set_common<kLevel, kHasRef>(&o, &s);
  sequence<SurrogateKind::kClip>(o, s, out);
}

template <SurrogateKind kSurrogate>
void general(const PolicyOptions& o, const PolicySequence& s, PolicyTotals* out) {
  sequence<kSurrogate>(o, s, out);
}

void policy(const PolicyOptions& o, const PolicySequence& s, PolicyTotals* out) {
  if (is_common(o, s)) {
    const bool has_ref = s.ref_logprobs != nullptr;
    if (o.level == RatioLevel::kToken) {
      return has_ref ? common<RatioLevel::kToken, true>(o, s, out)
                     : common<RatioLevel::kToken, false>(o, s, out);
    }
    return has_ref ? common<RatioLevel::kSequence, true>(o, s, out)
                   : common<RatioLevel::kSequence, false>(o, s, out);
  }
  switch (o.surrogate) {
    case SurrogateKind::kClip:
      return general<SurrogateKind::kClip>(o, s, out);
    case SurrogateKind::kCispo:
      return general<SurrogateKind::kCispo>(o, s, out);
    case SurrogateKind::kSapo:
      return general<SurrogateKind::kSapo>(o, s, out);
    case SurrogateKind::kGmpo:
      return general<SurrogateKind::kGmpo>(o, s, out);
    case SurrogateKind::kVespo:
      return general<SurrogateKind::kVespo>(o, s, out);
    case SurrogateKind::kDppoTv:
    case SurrogateKind::kDppoKl:
      return general<SurrogateKind::kDppoKl>(o, s, out);
    case SurrogateKind::kReinforce:
      return general<SurrogateKind::kReinforce>(o, s, out);
  }
}

}  // namespace
}  // namespace rlkern

#define RLKERN_JOIN_(a, b) a##b
#define RLKERN_JOIN(a, b) RLKERN_JOIN_(a, b)

extern "C" const rlkern::TokenKernels RLKERN_JOIN(rlkern_token_kernels_, RLKERN_ISA) = {
    rlkern::policy,
};

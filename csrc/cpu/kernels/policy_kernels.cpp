// A policy loss over one sequence, compiled once per instruction set (see CMakeLists.txt).
//
// At most three walks over the sequence, which stays in the cache: sums that the terms need (only
// for losses that have a sequence's ratio or weight), the terms with gradient and metrics, and,
// where the tokens share a ratio, its gradient. Sums run in floats over chains of at most
// kChain vectors, then in doubles, in an order that depends on the sequence's length alone.
// What most calls ask for has walks of its own (policy_clip.h).

#include "policy_kernels.h"

// clang-format off: the formulas find the vectors' exp and log by their declarations before them.
#include "token_blocks.h"
#include "../../common/policy_sequence.h"
#include "policy_clip.h"
// clang-format on
#include "leaf.h"

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
  double total[BeforeSum::kCount];
  for (int i = 0; i < BeforeSum::kCount; ++i) total[i] = sums.total(i);
  return sequence_state<kSurrogate>(o, length, total);
}

template <SurrogateKind kSurrogate>
void general(const PolicyOptions& o, const PolicySequence& s, GradientScales scales,
             PolicyTotals* out) {
  const double count = (double)count_both(s.mask, nullptr, s.size);
  const double length = at_least_one(count);
  const SequenceState state = state_of<kSurrogate>(o, s, length);
  const SequenceShares shares = sequence_shares<kSurrogate>(o, length);
  const SequenceShares of_gradient = scaled(shares, scales);
  const bool has_ref = s.ref_logprobs != nullptr;

  Sums<TermSum::kCount> sums;
  RatioRange<vfloat> range;
  const auto terms = [&](const auto& block) __attribute__((always_inline)) {
    const vint counts = block.counts;
    const PolicyTerm<vfloat> t = policy_term<kSurrogate>(o, state, has_ref, policy_input(s, block));
    add_term<kSurrogate>(o, has_ref, counts, t, sums.chain, &range);
    if (s.grad_logprobs != nullptr) {
      block.store(s.grad_logprobs, term_gradient(o, of_gradient, has_ref, counts, t, sums.chain));
    }
    if (s.entropy != nullptr) {
      const vfloat entropy = block.load(s.entropy);
      sums.chain[TermSum::kEntropy] += entropy;
      if (o.entropy_coef != 0) {
        const vint chosen =
            s.entropy_mask != nullptr ? counts & block.flags(s.entropy_mask) : counts;
        const vfloat grad = add_bonus(o, of_gradient, chosen, entropy, sums.chain);
        if (s.grad_entropy != nullptr) block.store(s.grad_entropy, grad);
      }
    }
  };
  for_blocks(s, &sums, terms, s.grad_logprobs, s.grad_entropy);
  double total[TermSum::kCount];
  for (int i = 0; i < TermSum::kCount; ++i) total[i] = sums.total(i);

  if (o.coupled() && s.grad_logprobs != nullptr) {
    const float each = shared_gradient(o, length, total[TermSum::kShared]);
    Sums<1> none;
    for_blocks(s, &none, [&](const auto& block) __attribute__((always_inline)) {
      const vfloat own = block.load(s.grad_logprobs);
      block.store(s.grad_logprobs, block.counts ? own + each : vfloat{});
    });
  }
  const RatioRange<float> ends = {reduce_max(range.max), reduce_max(range.minus_min)};
  add_sequence<kSurrogate>(o, s.one_advantage, s.advantage, state, shares, count, total, ends, out);
}

void count(const PolicySequence& s, PolicyTotals* out) {
  const double tokens = (double)count_both(s.mask, nullptr, s.size);
  out->sum[kTokens] += tokens;
  out->sum[kSequences] += 1;
  out->sum[kNonEmpty] += tokens > 0;
  out->sum[kBonusCount] +=
      s.entropy_mask == nullptr ? tokens : (double)count_both(s.mask, s.entropy_mask, s.size);
}

void policy(const PolicyOptions& o, const PolicySequence& s, GradientScales scales,
            PolicyTotals* out) {
  if (is_plain_clip(o, s)) return plain_clip(o, s, scales, out);
  switch (o.surrogate) {
    case SurrogateKind::kClip:
      return general<SurrogateKind::kClip>(o, s, scales, out);
    case SurrogateKind::kCispo:
      return general<SurrogateKind::kCispo>(o, s, scales, out);
    case SurrogateKind::kSapo:
      return general<SurrogateKind::kSapo>(o, s, scales, out);
    case SurrogateKind::kGmpo:
      return general<SurrogateKind::kGmpo>(o, s, scales, out);
    case SurrogateKind::kVespo:
      return general<SurrogateKind::kVespo>(o, s, scales, out);
    case SurrogateKind::kDppoTv:
    case SurrogateKind::kDppoKl:
      return general<SurrogateKind::kDppoKl>(o, s, scales, out);
    case SurrogateKind::kReinforce:
      return general<SurrogateKind::kReinforce>(o, s, scales, out);
  }
}

}  // namespace
}  // namespace rlkern

extern "C" const rlkern::TokenKernels RLKERN_LEAF(rlkern_token_kernels) = {
    rlkern::policy,
    rlkern::count,
};

// One token of a policy loss that is separable by token: its gradients need nothing of its sequence
// but what `scales` brings. No torch in here, so that kernels and their tests without a GPU use it.
#pragma once

#include <cstdint>

#include "policy_sequence.h"

namespace rlkern {

// What the loss asks of each token, one value each and contiguous; null where it was not given.
struct TokenInputs {
  const float* advantages;
  const float* old_logprobs;
  const float* ref_logprobs;
  const float* rollout_logprobs;
  const float* token_weights;
  const unsigned char* entropy_mask;
  const GradientScales* scales;
};

// One token's share of them.
struct TokenInput {
  PolicyInput<float> policy;
  float entropy;
  bool has_ref;
  bool chosen;  // for the entropy bonus
  GradientScales scales;
};

RLKERN_INLINE TokenInput token_input(const TokenInputs& inputs, int64_t token, float logprob,
                                     float entropy) {
  const auto value = [token](const float* values, float otherwise) {
    return values == nullptr ? otherwise : values[token];
  };
  TokenInput in;
  in.policy.logprob = logprob;
  in.policy.old = value(inputs.old_logprobs, logprob);
  in.policy.ref = value(inputs.ref_logprobs, 0);
  in.policy.rollout = value(inputs.rollout_logprobs, 0);
  in.policy.advantage = inputs.advantages[token];
  in.policy.weight = value(inputs.token_weights, 1);
  in.entropy = entropy;
  in.has_ref = inputs.ref_logprobs != nullptr;
  in.chosen = inputs.entropy_mask == nullptr || inputs.entropy_mask[token] != 0;
  in.scales = inputs.scales[token];
  return in;
}

struct TokenUpstream {
  float logprob;  // d loss / d logprob
  float entropy;  // d loss / d entropy
};

template <SurrogateKind kSurrogate>
RLKERN_INLINE TokenUpstream upstream_of(const PolicyOptions& o, const TokenInput& in) {
  float unused[TermSum::kCount] = {};
  const SequenceShares shares = scaled(sequence_shares<kSurrogate>(o, 1), in.scales);
  const PolicyTerm<float> t =
      policy_term<kSurrogate>(o, sequence_defaults(), in.has_ref, in.policy);
  return {term_gradient(o, shares, in.has_ref, true, t, unused),
          o.entropy_coef == 0 ? 0.0f : add_bonus(o, shares, in.chosen, in.entropy, unused)};
}

// Of a token that counts. gmpo and vespo, which are left out, couple the tokens of a sequence.
RLKERN_INLINE TokenUpstream token_upstream(const PolicyOptions& o, const TokenInput& in) {
  switch (o.surrogate) {
    case SurrogateKind::kCispo:
      return upstream_of<SurrogateKind::kCispo>(o, in);
    case SurrogateKind::kSapo:
      return upstream_of<SurrogateKind::kSapo>(o, in);
    case SurrogateKind::kDppoTv:
    case SurrogateKind::kDppoKl:
      return upstream_of<SurrogateKind::kDppoKl>(o, in);
    case SurrogateKind::kReinforce:
      return upstream_of<SurrogateKind::kReinforce>(o, in);
    default:
      return upstream_of<SurrogateKind::kClip>(o, in);
  }
}

}  // namespace rlkern

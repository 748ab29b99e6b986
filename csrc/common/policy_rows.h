// Where the tokens of a policy loss lie in memory. No torch in here, so that kernels and their
// tests without a GPU use it too.
#pragma once

#include "sequence_grid.h"

namespace rlkern {

// A policy loss's tensors as pointers.
struct PolicyRows {
  SequenceGrid grid;
  TokenRows<const float> logprobs, advantages, old_logprobs, ref_logprobs, rollout_logprobs,
      entropy, token_weights;
  TokenRows<const bool> mask, entropy_mask;
  const float* sequence_advantages = nullptr;  // [B], instead of advantages
  TokenRows<float> grad_logprobs, grad_entropy;
};

// The tokens of one sequence, consecutive in memory; null where an argument was not given.
struct PolicySequence {
  long long size;
  const float* logprobs;
  bool one_advantage;  // for all its tokens, and then `advantages` is null
  float advantage;
  const float* advantages;
  const unsigned char* mask;
  const float* old_logprobs;
  const float* ref_logprobs;
  const float* rollout_logprobs;
  const float* entropy;
  const float* token_weights;
  const unsigned char* entropy_mask;
  float* grad_logprobs;  // on a GPU without the batch's denominators
  float* grad_entropy;
};

RLKERN_INLINE PolicySequence policy_sequence(const PolicyRows& rows, int64_t i) {
  const SequenceSpan at = rows.grid.span(i);
  PolicySequence s;
  s.size = at.size;
  s.logprobs = rows.logprobs.row(i, at);
  // A tensor without elements has a null pointer too.
  s.one_advantage = rows.sequence_advantages != nullptr;
  s.advantage = s.one_advantage ? rows.sequence_advantages[i] : 0.0f;
  s.advantages = rows.advantages.row(i, at);
  s.mask = flag_bytes(rows.mask.row(i, at));
  s.old_logprobs = rows.old_logprobs.row(i, at);
  s.ref_logprobs = rows.ref_logprobs.row(i, at);
  s.rollout_logprobs = rows.rollout_logprobs.row(i, at);
  s.entropy = rows.entropy.row(i, at);
  s.token_weights = rows.token_weights.row(i, at);
  s.entropy_mask = flag_bytes(rows.entropy_mask.row(i, at));
  s.grad_logprobs = rows.grad_logprobs.row(i, at);
  s.grad_entropy = rows.grad_entropy.row(i, at);
  return s;
}

}  // namespace rlkern

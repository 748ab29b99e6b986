// A policy loss over one sequence: what the leaf files offer to csrc/cpu. Plain C types only.
#pragma once

#include "../../common/policy_totals.h"

namespace rlkern {

// The tokens of one sequence, consecutive in memory; null where an argument was not given.
struct PolicySequence {
  long long size;
  const float* logprobs;
  const float* advantages;  // null: all are `advantage`
  float advantage;
  bool one_advantage;  // for the sequence; without tokens, the pointers do not tell
  const unsigned char* mask;
  const float* old_logprobs;
  const float* ref_logprobs;
  const float* rollout_logprobs;
  const float* entropy;
  const float* token_weights;
  const unsigned char* entropy_mask;
  float* grad_logprobs;  // without the batch's denominators
  float* grad_entropy;
};

struct TokenKernels {
  // Adds the sequence to the totals and writes its gradients.
  void (*policy)(const PolicyOptions&, const PolicySequence&, PolicyTotals*);
};

}  // namespace rlkern

extern "C" {
extern const rlkern::TokenKernels rlkern_token_kernels_portable;
#if defined(__x86_64__)
extern const rlkern::TokenKernels rlkern_token_kernels_avx2;
extern const rlkern::TokenKernels rlkern_token_kernels_avx512;
#endif
}

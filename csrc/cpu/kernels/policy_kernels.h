// A policy loss over one sequence: what the leaf files offer to csrc/cpu. Plain C types only.
#pragma once

#include "../../common/policy_rows.h"
#include "../../common/policy_totals.h"

namespace rlkern {

struct TokenKernels {
  // Adds the sequence to the totals and writes its gradients.
  void (*policy)(const PolicyOptions&, const PolicySequence&, GradientScales, PolicyTotals*);
  // Adds what the denominators are made of alone.
  void (*count)(const PolicySequence&, PolicyTotals*);
};

}  // namespace rlkern

extern "C" {
extern const rlkern::TokenKernels rlkern_token_kernels_portable;
#if defined(__x86_64__)
extern const rlkern::TokenKernels rlkern_token_kernels_avx2;
extern const rlkern::TokenKernels rlkern_token_kernels_avx512;
#endif
}

// The value loss over one sequence and the KL penalty over any tokens. Plain C types only.
#pragma once

#include "../../common/value_loss.h"

namespace rlkern {

// The tokens of one sequence, consecutive in memory; null where an argument was not given.
struct ValueSequence {
  long long size;
  const float* values;
  const float* returns;
  const float* old_values;
  const unsigned char* mask;
  float* grad_values;
};

struct KlTokens {
  long long size;
  const float* logprobs;
  const float* ref_logprobs;
  const unsigned char* mask;
  const float* upstream;  // null: the estimator is written, else upstream times its slope
  float* out;
};

struct ValueKernels {
  // Adds the sequence to the totals and writes its gradient, multiplied by `scale`.
  void (*value)(const ValueOptions&, const ValueSequence&, float scale, ValueTotals*);
  // Adds what the denominator is made of alone.
  void (*count)(const ValueSequence&, ValueTotals*);
  void (*kl)(KlEstimator, KlClamp, const KlTokens&);
};

}  // namespace rlkern

extern "C" {
extern const rlkern::ValueKernels rlkern_value_kernels_portable;
#if defined(__x86_64__)
extern const rlkern::ValueKernels rlkern_value_kernels_avx2;
extern const rlkern::ValueKernels rlkern_value_kernels_avx512;
#endif
}

// Two rows of logits element by element: what the leaf files offer to csrc/cpu. Plain C types only,
// since the leaf files include neither torch's headers nor the standard library's.
#pragma once

#include "../../common/divergence.h"
#include "row_kernels.h"

namespace rlkern {

// A row x of the policy's logits and one of the reference's, with z as in LogitRow. p_j =
// exp(z_j - max) * inv_sum; t_j = log p_j - log q_j = ((y_j - shift) - ref_y_j) / temperature -
// offset.
struct DivergenceRow {
  const void* x;
  const void* ref;
  long long size;
  float inv_temperature;
  float softcap;
  float max, inv_sum;
  float ref_max, ref_inv_sum;
  float shift, offset;
  float beta;
};

struct DivergenceSums {
  double value;
  double mean;  // of f, see divergence.h
};

struct DivergenceKernels {
  const char* name;
  void (*sums[static_cast<int>(Divergence::kCount)][static_cast<int>(LogitType::kCount)])(
      const DivergenceRow&, DivergenceSums*);
  // Writes upstream * p_j (f_j - mean) with respect to x over `grad`, which may be either row.
  void (*gradient[static_cast<int>(Divergence::kCount)][static_cast<int>(LogitType::kCount)])(
      const DivergenceRow&, float mean, float upstream, void* grad);
};

}  // namespace rlkern

extern "C" {
extern const rlkern::DivergenceKernels rlkern_divergence_kernels_portable;
#if defined(__x86_64__)
extern const rlkern::DivergenceKernels rlkern_divergence_kernels_avx2;
extern const rlkern::DivergenceKernels rlkern_divergence_kernels_avx512;
#endif
}

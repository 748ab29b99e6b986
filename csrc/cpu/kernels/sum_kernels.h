// Values added to a sum of wider type. Plain C types only.
#pragma once

#include "row_kernels.h"

namespace rlkern {

struct SumKernels {
  // sum[i] += part[i].
  void (*add[static_cast<int>(LogitType::kCount)])(float* sum, const void* part, long long size);
};

}  // namespace rlkern

extern "C" {
extern const rlkern::SumKernels rlkern_sum_kernels_portable;
#if defined(__x86_64__)
extern const rlkern::SumKernels rlkern_sum_kernels_avx2;
extern const rlkern::SumKernels rlkern_sum_kernels_avx512;
#endif
}

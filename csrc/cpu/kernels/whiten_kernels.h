// Moments and whitening of consecutive values. Plain C types only.
#pragma once

#include "../../common/whitening.h"

namespace rlkern {

struct WhitenKernels {
  // mask: null where all values count.
  Moments (*moments)(const float* x, const unsigned char* mask, long long size);
  void (*whiten)(const Whitening&, const float* x, const unsigned char* mask, long long size,
                 float* out);
};

}  // namespace rlkern

extern "C" {
extern const rlkern::WhitenKernels rlkern_whiten_kernels_portable;
#if defined(__x86_64__)
extern const rlkern::WhitenKernels rlkern_whiten_kernels_avx2;
extern const rlkern::WhitenKernels rlkern_whiten_kernels_avx512;
#endif
}

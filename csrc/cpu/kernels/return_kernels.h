// The scan over one sequence's tokens, and its backward. Plain C types only.
#pragma once

#include "../../common/return_rows.h"
#include "../../common/return_scan.h"

namespace rlkern {

struct ReturnKernels {
  void (*scan)(const ReturnOptions&, const ReturnSequence&);
  void (*scan_bwd)(const ReturnOptions&, const ReturnGradSequence&);
};

}  // namespace rlkern

extern "C" {
extern const rlkern::ReturnKernels rlkern_return_kernels_portable;
#if defined(__x86_64__)
extern const rlkern::ReturnKernels rlkern_return_kernels_avx2;
extern const rlkern::ReturnKernels rlkern_return_kernels_avx512;
#endif
}

// Which build of the leaf kernels runs: the best that the machine has, or RLKERN_CPU_ISA.
#pragma once

#include "kernels/divergence_kernels.h"
#include "kernels/group_kernels.h"
#include "kernels/policy_kernels.h"
#include "kernels/return_kernels.h"
#include "kernels/row_kernels.h"
#include "kernels/sum_kernels.h"
#include "kernels/value_kernels.h"
#include "kernels/whiten_kernels.h"

namespace rlkern {

// Throws where RLKERN_CPU_ISA names an instruction set that is unknown or that the machine lacks.
const RowKernels& row_kernels();
const TokenKernels& token_kernels();
const ReturnKernels& return_kernels();
const SumKernels& sum_kernels();
const ValueKernels& value_kernels();
const GroupKernels& group_kernels();
const WhitenKernels& whiten_kernels();
const DivergenceKernels& divergence_kernels();

}  // namespace rlkern

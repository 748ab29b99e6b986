// The tensors of add_widened_, checked once for CPU and CUDA.
#pragma once

#include "flat_values.h"

namespace rlkern {

struct SumArguments {
  int64_t size;
  float* sum;
  const void* part;
  ScalarType type;  // of the part
};

inline SumArguments sum_arguments(const Tensor& sum, const Tensor& part) {
  const ScalarType type = part.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
        "part: expected float32, float16 or bfloat16");
  const float* to = flat_values<float>(sum, part, ScalarType::Float, "sum");
  return {part.numel(), const_cast<float*>(to), flat_values<void>(part, part, type, "part"), type};
}

}  // namespace rlkern

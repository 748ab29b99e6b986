// A sum in fp32 of parts in the type that their products have.

#include "sum.h"

#include <torch/csrc/stable/ops.h>

#include "../common/sum_arguments.h"
#include "isa.h"

namespace rlkern {
namespace {

// Values below which a second thread costs more than it brings.
constexpr int64_t kGrain = 65536;

LogitType leaf_type(ScalarType type) {
  if (type == ScalarType::Float) return LogitType::kFloat;
  return type == ScalarType::Half ? LogitType::kHalf : LogitType::kBFloat16;
}

}  // namespace

void add_widened_cpu(Tensor sum, Tensor part) {
  const SumArguments a = sum_arguments(sum, part);
  const auto add = sum_kernels().add[static_cast<int>(leaf_type(a.type))];
  const int64_t bytes = a.type == ScalarType::Float ? 4 : 2;
  torch::stable::parallel_for(0, a.size, kGrain, [&](int64_t begin, int64_t end) {
    add(a.sum + begin, static_cast<const char*>(a.part) + begin * bytes, end - begin);
  });
}

}  // namespace rlkern

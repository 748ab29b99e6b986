// Launches add_widened_ on the current stream; nothing waits for the GPU.

#include "../common/sum_arguments.h"
#include "launch.h"
#include "row_plan.h"
#include "sum.cuh"
#include "sum.h"

namespace rlkern {
namespace {

template <typename Type>
void add(const SumArguments& a, cudaStream_t stream) {
  const bool aligned =
      (reinterpret_cast<uintptr_t>(a.sum) | reinterpret_cast<uintptr_t>(a.part)) % 16 == 0;
  const SumArgs<Type> args = {a.size, a.sum, static_cast<const typename Type::Scalar*>(a.part),
                              aligned};
  const int64_t values = sum_block_values<Type>();
  for_grids((a.size + values - 1) / values, kMaxBlocks, [&](unsigned blocks, int64_t first) {
    add_widened<Type><<<blocks, kSumThreads, 0, stream>>>(args, first);
  });
}

}  // namespace

void add_widened_cuda(Tensor sum, Tensor part) {
  const OnDeviceOf on(sum);
  const SumArguments a = sum_arguments(sum, part);
  switch (a.type) {
    case ScalarType::Float:
      add<Float32>(a, on.stream());
      break;
    case ScalarType::Half:
      add<Float16>(a, on.stream());
      break;
    default:
      add<BFloat16>(a, on.stream());
  }
  check_launch("add_widened_");
}

}  // namespace rlkern

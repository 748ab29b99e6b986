// The kernel of add_widened_: four loads of 16 bytes of the part a thread, and the sum's beside
// them.
#pragma once

#include "logit_types.cuh"

namespace rlkern {

constexpr int kSumThreads = 256;
constexpr int kSumVectors = 4;  // of a thread

template <typename Type>
struct SumArgs {
  int64_t size;
  float* sum;
  const typename Type::Scalar* part;
  bool aligned;  // both to 16 bytes
};

template <typename Type>
RLKERN_HD constexpr int64_t sum_block_values() {
  return kSumThreads * kSumVectors * Type::kLanes;
}

template <typename Type>
__global__ void __launch_bounds__(kSumThreads, 4)
    add_widened(const __grid_constant__ SumArgs<Type> args, int64_t first_block) {
  constexpr int kWidth = Type::kLanes;
  const int64_t begin = (first_block + blockIdx.x) * sum_block_values<Type>();
  if (args.aligned && begin + sum_block_values<Type>() <= args.size) {
    Pack parts[kSumVectors];
#pragma unroll
    for (int v = 0; v < kSumVectors; ++v) {
      parts[v] = load_pack_streamed(args.part + begin + (v * kSumThreads + threadIdx.x) * kWidth);
    }
#pragma unroll
    for (int v = 0; v < kSumVectors; ++v) {
      float* const to = args.sum + begin + (v * kSumThreads + threadIdx.x) * kWidth;
      float x[kWidth];
      Type::widen(parts[v], x);
#pragma unroll
      for (int i = 0; i < kWidth; i += 4) {
        Pack sum = load_pack(to + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sum.word[j] = float_to_bits(add(bits_to_float(sum.word[j]), x[i + j]));
        }
        store_pack(to + i, sum);
      }
    }
    return;
  }
  const int64_t end = begin + sum_block_values<Type>();
  for (int64_t i = begin + threadIdx.x; i < end && i < args.size; i += kSumThreads) {
    args.sum[i] = add(args.sum[i], Type::widen(args.part[i]));
  }
}

}  // namespace rlkern

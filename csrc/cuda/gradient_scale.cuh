// Multiplies rows in place by a number that lies on the GPU, and leaves them alone where it is 1: a
// host that looked would wait, and a walk over a gradient of the logits' size takes as long as the
// one that made it.
#pragma once

#include "../common/token_grid.h"
#include "row_gradient.cuh"

namespace rlkern {

template <typename Type>
struct GradientScaleArgs {
  typename Type::Scalar* x;
  TokenGrid grid;
  int64_t width;
  int64_t slices;
  int64_t vectors_per_slice;
  const float* factor;
};

template <typename Type>
RLKERN_DEVICE void scale_slice(const GradientSlice<Type>& slice, float factor) {
  constexpr int kLanes = Type::kLanes;
  for (int v = threadIdx.x; v < slice.vectors; v += blockDim.x) {
    float x[kLanes];
    Type::widen(load_pack(slice.grad + v * kLanes), x);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) x[i] *= factor;
    store_pack(slice.grad + v * kLanes, Type::narrow(x));
  }
  const int i = threadIdx.x;
  if (i < slice.head + slice.tail) {
    auto* const at =
        slice.grad + (i < slice.head ? i - slice.head : slice.vectors * kLanes + i - slice.head);
    *at = Type::narrow(Type::widen(*at) * factor);
  }
}

// As many blocks as fit on the GPU, which share the slices of the rows between them.
template <typename Type>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerMultiprocessor)
    gradient_scale(const __grid_constant__ GradientScaleArgs<Type> args, int64_t blocks) {
  const float factor = *args.factor;
  if (factor == 1) return;
  const int64_t items = args.grid.size() * args.slices;
  for (int64_t item = blockIdx.x; item < items; item += blocks) {
    const SliceIndex at = slice_index(item, args.slices);
    typename Type::Scalar* const row = args.x + args.grid.offset(at.row);
    scale_slice(
        GradientSlice<Type>(row, row, args.width, at.slice, args.slices, args.vectors_per_slice),
        factor);
  }
}

}  // namespace rlkern

// Launches scale_ on the current stream. Nothing waits for the GPU.

#include "gradient_scale.cuh"
#include "gradient_scale.h"
#include "launch.h"
#include "logit_launch.h"

namespace rlkern {

void scale_cuda(Tensor x, Tensor factor) {
  const OnDeviceOf on(x);
  check(factor.numel() == 1 && factor.scalar_type() == ScalarType::Float && factor.is_cuda() &&
            factor.get_device_index() == x.get_device_index(),
        "factor: expected one float32 on the device of x");
  check(x.dim() >= 1 && (x.size(x.dim() - 1) <= 1 || x.stride(x.dim() - 1) == 1),
        "x: expected rows of consecutive values");
  if (x.numel() == 0) return;
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount,
                               x.get_device_index()) == cudaSuccess,
        "the number of multiprocessors is not known");
  with_type(x, [&](auto type) {
    using Type = decltype(type);
    const int64_t width = x.size(x.dim() - 1);
    const RowPlan plan = plan_rows(width, Type::kLanes);
    const GradientScaleArgs<Type> args = {static_cast<typename Type::Scalar*>(x.data_ptr()),
                                          token_grid(x, x.dim() - 1, "x"),
                                          width,
                                          plan.slices,
                                          plan.vectors_per_slice,
                                          static_cast<const float*>(factor.data_ptr())};
    const int64_t items = args.grid.size() * plan.slices;
    const int64_t most = int64_t{multiprocessors} * kBlocksPerMultiprocessor;
    const int64_t blocks = items < most ? items : most;
    gradient_scale<Type>
        <<<static_cast<unsigned>(blocks), plan.threads, 0, on.stream()>>>(args, blocks);
    check_launch("scale_");
  });
}

}  // namespace rlkern

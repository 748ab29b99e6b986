// Launches masked_moments (two kernels) and whiten (one) on the current stream. Nothing waits for
// the GPU, and all memory comes from torch, so that a call can be captured into a CUDA graph.

#include <torch/csrc/stable/ops.h>

#include "../common/whiten_arguments.h"
#include "launch.h"
#include "row_plan.h"
#include "whiten.cuh"
#include "whiten.h"

namespace rlkern {
namespace {

int64_t whiten_blocks(int64_t size) { return (size + kBlockValues - 1) / kBlockValues; }

MaskedValues values_of(const WhitenArguments& a) { return masked_values(a.size, a.x, a.mask); }

}  // namespace

Tensor masked_moments_cuda(Tensor x, std::optional<Tensor> mask) {
  static_assert(sizeof(Moments) == 3 * sizeof(double), "a row of three doubles");
  const OnDeviceOf on(x);
  const WhitenArguments a = whiten_arguments(x, mask);
  const int64_t blocks = whiten_blocks(a.size);
  const Tensor parts = torch::stable::new_empty(x, {blocks, 3}, ScalarType::Double);
  Tensor out = torch::stable::new_empty(x, {3}, ScalarType::Double);
  const MomentsArgs args = {values_of(a), static_cast<Moments*>(parts.data_ptr())};
  for_grids(blocks, kMaxBlocks, [&](unsigned count, int64_t first) {
    moments_of_blocks<<<count, kWhitenThreads, 0, on.stream()>>>(args, first);
  });
  check_launch("masked_moments");
  moments_finish<<<1, kFinishThreads, 0, on.stream()>>>(args.parts, blocks,
                                                        static_cast<Moments*>(out.data_ptr()));
  check_launch("masked_moments finish");
  return out;
}

Tensor whiten_cuda(Tensor x, std::optional<Tensor> mask, Tensor moments,
                   std::vector<double> options) {
  const OnDeviceOf on(x);
  const WhitenArguments a = whiten_arguments(x, mask);
  Tensor out = torch::stable::new_empty(x, x.sizes());
  const WhitenArgs args = {checked_whiten_options(options), values_of(a),
                           reinterpret_cast<const Moments*>(moments_argument(moments, x)),
                           static_cast<float*>(out.data_ptr()),
                           is_aligned(out.data_ptr(), sizeof(Pack))};
  for_grids(whiten_blocks(a.size), kMaxBlocks, [&](unsigned blocks, int64_t first) {
    whiten_values<<<blocks, kWhitenThreads, 0, on.stream()>>>(args, first);
  });
  check_launch("whiten");
  return out;
}

}  // namespace rlkern

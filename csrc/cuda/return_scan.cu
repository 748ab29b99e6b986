// Launches return_scan and its backward on the current stream, one kernel each. Nothing waits for
// the GPU, and all memory comes from torch, so that a call can be captured into a CUDA graph.

#include "../common/return_arguments.h"
#include "launch.h"
#include "return_scan.cuh"
#include "return_scan.h"
#include "row_plan.h"

namespace rlkern {
namespace {

template <int kThreads>
void launch_forward(const ReturnScanArgs& args, cudaStream_t stream) {
  for_grids(args.rows.grid.sequences, kMaxBlocks, [&](unsigned blocks, int64_t first) {
    if (args.rows.log_ratios.data != nullptr) {
      return_scan_forward<kThreads, true><<<blocks, kThreads, 0, stream>>>(args, first);
    } else {
      return_scan_forward<kThreads, false><<<blocks, kThreads, 0, stream>>>(args, first);
    }
  });
  check_launch("return_scan");
}

template <int kThreads>
void launch_backward(const ReturnScanGradArgs& args, cudaStream_t stream) {
  for_grids(args.rows.grid.sequences, kMaxBlocks, [&](unsigned blocks, int64_t first) {
    return_scan_backward<kThreads><<<blocks, kThreads, 0, stream>>>(args, first);
  });
  check_launch("return_scan backward");
}

void check_sequences(const SequenceGrid& grid, const Tensor& tokens) {
  check(grid.sequences > 0 || tokens.numel() == 0, "offsets: expected values that rise from 0 to ",
        tokens.numel(), ", got one value");
}

}  // namespace

std::tuple<Tensor, Tensor> return_scan_cuda(
    Tensor rewards, std::optional<Tensor> values, std::optional<Tensor> log_ratios,
    std::optional<Tensor> mask, std::optional<Tensor> dones, std::optional<Tensor> bootstrap_value,
    std::optional<Tensor> lam, std::optional<Tensor> offsets, std::vector<double> options) {
  const OnDeviceOf on(rewards);
  const ReturnTensors tensors = {rewards, values,          log_ratios, mask,
                                 dones,   bootstrap_value, lam,        offsets};
  const ReturnOutputs out = new_return_outputs(tensors);
  const ReturnScanArgs args = {checked_return_options(options), return_rows(tensors, out)};
  check_sequences(args.rows.grid, rewards);
  switch (scan_threads(args.rows.grid)) {
    case 32:
      launch_forward<32>(args, on.stream());
      break;
    case 128:
      launch_forward<128>(args, on.stream());
      break;
    default:
      launch_forward<256>(args, on.stream());
  }
  return {out.first, out.second};
}

std::tuple<Tensor, Tensor, Tensor> return_scan_bwd_cuda(
    Tensor grad_first, std::optional<Tensor> grad_second, std::optional<Tensor> mask,
    std::optional<Tensor> dones, std::optional<Tensor> lam, std::optional<Tensor> offsets,
    std::vector<double> options) {
  const OnDeviceOf on(grad_first);
  const ReturnGradTensors tensors = {grad_first, grad_second, mask, dones, lam, offsets};
  const SequenceGrid grid = sequence_grid(grad_first, offsets);
  check_sequences(grid, grad_first);
  const ReturnGradients out = new_return_gradients(tensors, grid);
  const ReturnScanGradArgs args = {checked_return_options(options),
                                   return_grad_rows(tensors, grid, out)};
  switch (scan_threads(grid)) {
    case 32:
      launch_backward<32>(args, on.stream());
      break;
    case 128:
      launch_backward<128>(args, on.stream());
      break;
    default:
      launch_backward<256>(args, on.stream());
  }
  return {out.rewards, out.values, out.bootstrap_value};
}

}  // namespace rlkern

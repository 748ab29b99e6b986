// GAE, discounted returns and V-trace: parallel over sequences, each of which is one thread's walk
// over time, so that no result depends on the number of threads or on another sequence.

#include "return_scan.h"

#include "../common/return_arguments.h"
#include "huge_pages.h"
#include "isa.h"
#include "sequence_runs.h"

namespace rlkern {
namespace {

template <typename One>
void for_sequences(const SequenceGrid& grid, int64_t tokens, One one) {
  const int64_t grain = tokens > 0 ? kTokenGrain * grid.sequences / tokens + 1 : grid.sequences + 1;
  torch::stable::parallel_for(0, grid.sequences, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) one(i);
  });
}

}  // namespace

std::tuple<Tensor, Tensor> return_scan_cpu(Tensor rewards, std::optional<Tensor> values,
                                           std::optional<Tensor> log_ratios,
                                           std::optional<Tensor> mask, std::optional<Tensor> dones,
                                           std::optional<Tensor> bootstrap_value,
                                           std::optional<Tensor> lam, std::optional<Tensor> offsets,
                                           std::vector<double> options) {
  const ReturnOptions o = checked_return_options(options);
  const ReturnTensors tensors = {rewards, values,          log_ratios, mask,
                                 dones,   bootstrap_value, lam,        offsets};
  const ReturnOutputs out = new_return_outputs(tensors);
  const ReturnRows rows = return_rows(tensors, out);
  check_offsets(rows.grid);
  for (const Tensor& output : {out.first, out.second}) prefer_huge_pages(output);
  const auto kernel = return_kernels().scan;
  for_sequences(rows.grid, rewards.numel(),
                [&](int64_t i) { kernel(o, return_sequence(rows, o.lam, i)); });
  return {out.first, out.second};
}

std::tuple<Tensor, Tensor, Tensor> return_scan_bwd_cpu(
    Tensor grad_first, std::optional<Tensor> grad_second, std::optional<Tensor> mask,
    std::optional<Tensor> dones, std::optional<Tensor> lam, std::optional<Tensor> offsets,
    std::vector<double> options) {
  const ReturnOptions o = checked_return_options(options);
  const ReturnGradTensors tensors = {grad_first, grad_second, mask, dones, lam, offsets};
  const SequenceGrid grid = sequence_grid(grad_first, offsets);
  check_offsets(grid);
  const ReturnGradients out = new_return_gradients(tensors, grid);
  for (const Tensor& output : {out.rewards, out.values}) prefer_huge_pages(output);
  const ReturnGradRows rows = return_grad_rows(tensors, grid, out);
  const auto kernel = return_kernels().scan_bwd;
  for_sequences(grid, grad_first.numel(),
                [&](int64_t i) { kernel(o, return_grad_sequence(rows, o.lam, i)); });
  return {out.rewards, out.values, out.bootstrap_value};
}

}  // namespace rlkern

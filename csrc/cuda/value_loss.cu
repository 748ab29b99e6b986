// Launches value_loss and kl_penalty on the current stream. Nothing waits for the GPU, and all
// memory comes from torch, so that a call can be captured into a CUDA graph.

#include <torch/csrc/stable/ops.h>

#include <limits>

#include "../common/value_arguments.h"
#include "launch.h"
#include "row_plan.h"
#include "sequence_launch.h"
#include "value_loss.cuh"
#include "value_loss.h"

namespace rlkern {
namespace {

Tensor kl_over(const KlArguments& given, const Tensor& like, const float* upstream) {
  const OnDeviceOf on(like);
  Tensor out = torch::stable::new_empty(like, like.sizes());
  const KlArgs args = {
      given.estimator,    given.clamp, given.size, given.logprobs,
      given.ref_logprobs, given.mask,  upstream,   static_cast<float*>(out.data_ptr())};
  for_grids((args.size + kKlThreads - 1) / kKlThreads, kMaxBlocks,
            [&](unsigned blocks, int64_t first) {
              kl_tokens<<<blocks, kKlThreads, 0, on.stream()>>>(args, first);
            });
  check_launch("kl_penalty");
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> value_loss_cuda(
    Tensor values, Tensor returns, std::optional<Tensor> mask, std::optional<Tensor> old_values,
    std::optional<Tensor> offsets, std::optional<Tensor> normalizer,
    std::optional<Tensor> num_sequences, std::vector<double> options, bool grad_values) {
  const OnDeviceOf on(values);
  const ValueOptions o = checked_value_options(options, old_values.has_value());
  const ValueOutputs out = new_value_outputs(values, grad_values);
  ValueRows rows;
  rows.grid = sequence_grid(values, offsets);
  rows.values = token_rows<const float>(values, values, ScalarType::Float, "values");
  rows.returns = token_rows<const float>(returns, values, ScalarType::Float, "returns");
  rows.old_values = token_rows<const float>(old_values, values, ScalarType::Float, "old_values");
  rows.mask = token_rows<const bool>(mask, values, ScalarType::Bool, "mask");
  if (grad_values) {
    rows.grad_values = token_rows<float>(out.grad_values, values, ScalarType::Float, "grad_values");
  }
  check(rows.grid.sequences > 0 || values.numel() == 0,
        "offsets: expected values that rise from 0 to ", values.numel(), ", got one value");
  const Tensor totals = torch::stable::new_empty(
      values, {rows.grid.sequences * static_cast<int64_t>(kAllValueSums)}, ScalarType::Double);
  const ValueArgs args = {o, rows, static_cast<ValueTotals*>(totals.data_ptr())};
  for_grids(rows.grid.sequences, kMaxBlocks, [&](unsigned blocks, int64_t first) {
    value_sequences<<<blocks, kTokenThreads, 0, on.stream()>>>(args, first);
  });
  check_launch("value_loss sequences");
  const ValueFinishArgs finish = {o,
                                  args.totals,
                                  rows.grid.sequences,
                                  given_tensor(normalizer, values, "normalizer"),
                                  given_tensor(num_sequences, values, "num_sequences"),
                                  static_cast<float*>(out.loss.data_ptr()),
                                  static_cast<double*>(out.metrics.data_ptr()),
                                  static_cast<float*>(out.scale.data_ptr())};
  value_finish<<<1, kFinishThreads, 0, on.stream()>>>(finish);
  check_launch("value_loss finish");
  return {out.loss, out.metrics, out.grad_values, out.scale};
}

Tensor value_loss_bwd_cuda(Tensor grad_loss, Tensor grad_values, Tensor scale) {
  check(scale.numel() == 1, "scale: expected what the forward pass returned");
  const Tensor none = torch::stable::new_empty(grad_values, {0});
  return scaled_gradients(grad_loss, scale, {grad_values, none})[0];
}

Tensor kl_penalty_cuda(Tensor logprobs, Tensor ref_logprobs, std::optional<Tensor> mask,
                       int64_t estimator, int64_t clamp) {
  return kl_over(kl_arguments(logprobs, ref_logprobs, mask, estimator, clamp), logprobs, nullptr);
}

Tensor kl_penalty_bwd_cuda(Tensor grad, Tensor logprobs, Tensor ref_logprobs,
                           std::optional<Tensor> mask, int64_t estimator, int64_t clamp) {
  const KlArguments given = kl_arguments(logprobs, ref_logprobs, mask, estimator, clamp);
  return kl_over(given, logprobs, flat_values<float>(grad, logprobs, ScalarType::Float, "grad"));
}

}  // namespace rlkern

// A policy loss with its gradient and metrics: parallel over runs of sequences, whose totals are
// added in order, so that the result does not depend on the number of threads.

#include "policy_loss.h"

#include "../common/policy_arguments.h"
#include "isa.h"

namespace rlkern {
namespace {

// Tokens below which a second thread costs more than it brings.
constexpr int64_t kGrain = 16384;
// Totals that are kept until they are added; long runs of short sequences share one.
constexpr int64_t kMaxRuns = 4096;

const unsigned char* bytes(const bool* flags) {
  return reinterpret_cast<const unsigned char*>(flags);
}

PolicySequence sequence_of(const PolicyRows& rows, int64_t i) {
  const SequenceGrid& g = rows.grid;
  PolicySequence s;
  s.size = g.size(i);
  s.logprobs = rows.logprobs.row(g, i);
  s.advantages = rows.advantages.row(g, i);
  s.advantage = rows.sequence_advantages != nullptr ? rows.sequence_advantages[i] : 0.0f;
  s.mask = bytes(rows.mask.row(g, i));
  s.old_logprobs = rows.old_logprobs.row(g, i);
  s.ref_logprobs = rows.ref_logprobs.row(g, i);
  s.rollout_logprobs = rows.rollout_logprobs.row(g, i);
  s.entropy = rows.entropy.row(g, i);
  s.token_weights = rows.token_weights.row(g, i);
  s.entropy_mask = bytes(rows.entropy_mask.row(g, i));
  s.grad_logprobs = rows.grad_logprobs.row(g, i);
  s.grad_entropy = rows.grad_entropy.row(g, i);
  return s;
}

double given(const std::optional<Tensor>& tensor, double number, const char* name) {
  if (!tensor.has_value()) return number;
  check(tensor->numel() == 1 && tensor->scalar_type() == ScalarType::Double, name,
        ": expected one float64");
  return *static_cast<const double*>(tensor->data_ptr());
}

// The packed sequences must lie inside the tensors: offsets are values, and nothing else bounds
// what is read.
void check_offsets(const SequenceGrid& grid) {
  if (grid.offsets == nullptr) return;
  bool rises = grid.offsets[0] == 0 && grid.offsets[grid.sequences] == grid.length;
  for (int64_t i = 0; i < grid.sequences; ++i) rises &= grid.size(i) >= 0;
  check(rises, "offsets: expected values that rise from 0 to ", grid.length);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> policy_loss_cpu(
    Tensor logprobs, Tensor advantages, std::optional<Tensor> mask,
    std::optional<Tensor> old_logprobs, std::optional<Tensor> ref_logprobs,
    std::optional<Tensor> rollout_logprobs, std::optional<Tensor> entropy,
    std::optional<Tensor> token_weights, std::optional<Tensor> entropy_mask,
    std::optional<Tensor> offsets, std::optional<Tensor> normalizer,
    std::optional<Tensor> num_sequences, std::optional<Tensor> entropy_normalizer,
    std::vector<double> options, bool grad_logprobs, bool grad_entropy) {
  const PolicyTensors tensors = {
      logprobs,      advantages,   mask,    old_logprobs, ref_logprobs,  rollout_logprobs,  entropy,
      token_weights, entropy_mask, offsets, normalizer,   num_sequences, entropy_normalizer};
  const PolicyOptions o = checked_options(options);
  const GivenDenominators denominators = {
      given(normalizer, o.normalizer, "normalizer"),
      given(num_sequences, o.num_sequences, "num_sequences"),
      given(entropy_normalizer, o.entropy_normalizer, "entropy_normalizer")};
  const PolicyOutputs out = new_policy_outputs(tensors, grad_logprobs, grad_entropy);
  const PolicyRows rows = policy_rows(tensors, o, out);
  check_offsets(rows.grid);

  const int64_t sequences = rows.grid.sequences;
  const int64_t run = sequences / kMaxRuns + 1;
  const int64_t runs = (sequences + run - 1) / run;
  const int64_t tokens = logprobs.numel();
  const int64_t grain = tokens > 0 ? kGrain * runs / tokens + 1 : runs + 1;
  std::vector<PolicyTotals> totals(runs + 1);
  const auto kernel = token_kernels().policy;
  torch::stable::parallel_for(0, runs, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      totals[r].clear();
      const int64_t last = (r + 1) * run < sequences ? (r + 1) * run : sequences;
      for (int64_t i = r * run; i < last; ++i) kernel(o, sequence_of(rows, i), &totals[r]);
    }
  });
  PolicyTotals& sum = totals[runs];
  sum.clear();
  for (int64_t r = 0; r < runs; ++r) sum.add(totals[r]);

  const PolicyResult result = policy_result(o, denominators, sum);
  *static_cast<float*>(out.loss.data_ptr()) = static_cast<float>(result.loss);
  double* metrics = static_cast<double*>(out.metrics.data_ptr());
  for (int i = 0; i < kPolicyMetrics; ++i) metrics[i] = result.metrics[i];
  float* scale = static_cast<float*>(out.scale.data_ptr());
  scale[0] = static_cast<float>(result.scale);
  scale[1] = static_cast<float>(result.entropy_scale);
  return {out.loss, out.metrics, out.grad_logprobs, out.grad_entropy, out.scale};
}

std::tuple<Tensor, Tensor> policy_loss_bwd_cpu(Tensor grad_loss, Tensor grad_logprobs,
                                               Tensor grad_entropy, Tensor scale) {
  check(grad_loss.numel() == 1 && grad_loss.scalar_type() == ScalarType::Float,
        "grad_loss: expected one float32");
  check(scale.numel() == 2 && scale.scalar_type() == ScalarType::Float && scale.is_contiguous(),
        "scale: expected what the forward pass returned");
  const float upstream = *static_cast<const float*>(grad_loss.data_ptr());
  const float* scales = static_cast<const float*>(scale.data_ptr());
  const auto scaled = [&](const Tensor& grad, float factor, const char* name) {
    check(grad.scalar_type() == ScalarType::Float && grad.is_contiguous(), name,
          ": expected what the forward pass returned");
    Tensor out = torch::stable::new_empty(grad, grad.sizes());
    const float* from = static_cast<const float*>(grad.data_ptr());
    float* to = static_cast<float*>(out.data_ptr());
    torch::stable::parallel_for(0, grad.numel(), kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) to[i] = from[i] * factor;
    });
    return out;
  };
  return {scaled(grad_logprobs, upstream * scales[0], "grad_logprobs"),
          scaled(grad_entropy, upstream * scales[1], "grad_entropy")};
}

}  // namespace rlkern

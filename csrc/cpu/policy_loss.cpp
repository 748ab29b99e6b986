// A policy loss with its gradient and metrics: parallel over runs of sequences, whose totals are
// added in order, so that the result does not depend on the number of threads.

#include "policy_loss.h"

#include "../common/policy_arguments.h"
#include "isa.h"
#include "sequence_runs.h"

namespace rlkern {
namespace {

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
  s.one_advantage = rows.sequence_advantages != nullptr;
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
      given_number(normalizer, o.normalizer, "normalizer"),
      given_number(num_sequences, o.num_sequences, "num_sequences"),
      given_number(entropy_normalizer, o.entropy_normalizer, "entropy_normalizer")};
  const PolicyOutputs out = new_policy_outputs(tensors, grad_logprobs, grad_entropy);
  const PolicyRows rows = policy_rows(tensors, o, out);
  check_offsets(rows.grid);

  const auto kernel = token_kernels().policy;
  const PolicyTotals sum = over_sequences<PolicyTotals>(
      rows.grid, logprobs.numel(),
      [&](int64_t i, PolicyTotals* totals) { kernel(o, sequence_of(rows, i), totals); });
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
  return {scaled(grad_logprobs, upstream_factor(grad_loss, scale, 0), "grad_logprobs"),
          scaled(grad_entropy, upstream_factor(grad_loss, scale, 1), "grad_entropy")};
}

}  // namespace rlkern

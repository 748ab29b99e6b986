// A policy loss with its gradient and metrics: parallel over runs of sequences, whose totals are
// added in order, so that the result does not depend on the number of threads.
//
// The gradients are written as they are for an upstream gradient of 1: what divides them is counted
// first where it is not known, which is a look at the mask alone. So `scale`, by which the backward
// still multiplies, is 1.

#include "policy_loss.h"

#include "../common/policy_arguments.h"
#include "isa.h"
#include "sequence_runs.h"

namespace rlkern {
namespace {

GradientScales gradient_scales(const PolicyOptions& o, const GivenDenominators& given,
                               const PolicyRows& rows, int64_t tokens) {
  const bool counts_bonus = o.entropy_coef != 0 && !o.entropy_same &&
                            !(given.entropy_normalizer == given.entropy_normalizer);
  PolicyTotals counts;
  counts.clear();
  counts.sum[kSequences] = static_cast<double>(rows.grid.sequences);
  if (counts_tokens(o.aggregation, given) || counts_bonus || o.skip_empty) {
    const auto kernel = token_kernels().count;
    counts = over_sequences<PolicyTotals>(
        rows.grid, tokens, kCountGrain,
        [&](int64_t i, PolicyTotals* totals) { kernel(policy_sequence(rows, i), totals); });
  }
  const PolicyDenominators d = policy_denominators(o, given, counts);
  return {static_cast<float>(1 / d.policy.value), static_cast<float>(1 / d.bonus)};
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

  const int64_t tokens = logprobs.numel();
  GradientScales scales = {1, 1};
  if (grad_logprobs || grad_entropy) scales = gradient_scales(o, denominators, rows, tokens);
  const auto kernel = token_kernels().policy;
  const PolicyTotals sum = over_sequences<PolicyTotals>(
      rows.grid, tokens, kTokenGrain, [&](int64_t i, PolicyTotals* totals) {
        kernel(o, policy_sequence(rows, i), scales, totals);
      });
  const PolicyResult result = policy_result(o, denominators, sum);
  *static_cast<float*>(out.loss.data_ptr()) = static_cast<float>(result.loss);
  double* metrics = static_cast<double*>(out.metrics.data_ptr());
  for (int i = 0; i < kPolicyMetrics; ++i) metrics[i] = result.metrics[i];
  float* scale = static_cast<float*>(out.scale.data_ptr());
  scale[0] = scale[1] = 1;
  return {out.loss, out.metrics, out.grad_logprobs, out.grad_entropy, out.scale};
}

std::tuple<Tensor, Tensor> policy_loss_bwd_cpu(Tensor grad_loss, Tensor grad_logprobs,
                                               Tensor grad_entropy, Tensor scale) {
  return {scaled(grad_logprobs, upstream_factor(grad_loss, scale, 0), "grad_logprobs"),
          scaled(grad_entropy, upstream_factor(grad_loss, scale, 1), "grad_entropy")};
}

}  // namespace rlkern

// The clipped value loss and the KL penalty: parallel over runs of sequences and over tokens.

#include "value_loss.h"

#include "../common/value_arguments.h"
#include "isa.h"
#include "sequence_runs.h"

namespace rlkern {
namespace {

Tensor kl_over(const KlArguments& given, const Tensor& like, const float* upstream) {
  Tensor out = torch::stable::new_empty(like, like.sizes());
  float* to = static_cast<float*>(out.data_ptr());
  const auto kernel = value_kernels().kl;
  torch::stable::parallel_for(0, given.size, kTokenGrain, [&](int64_t begin, int64_t end) {
    const auto from = [begin](auto* p) { return p == nullptr ? p : p + begin; };
    kernel(given.estimator, given.clamp,
           {end - begin, from(given.logprobs), from(given.ref_logprobs),
            flag_bytes(from(given.mask)), from(upstream), from(to)});
  });
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> value_loss_cpu(
    Tensor values, Tensor returns, std::optional<Tensor> mask, std::optional<Tensor> old_values,
    std::optional<Tensor> offsets, std::optional<Tensor> normalizer,
    std::optional<Tensor> num_sequences, std::vector<double> options, bool grad_values) {
  const ValueOptions o = checked_value_options(options, old_values.has_value());
  const GivenDenominators given = {given_number(normalizer, o.normalizer, "normalizer"),
                                   given_number(num_sequences, o.num_sequences, "num_sequences"),
                                   std::numeric_limits<double>::quiet_NaN()};
  const SequenceGrid grid = sequence_grid(values, offsets);
  check_offsets(grid);
  const auto v = token_rows<const float>(values, values, ScalarType::Float, "values");
  const auto r = token_rows<const float>(returns, values, ScalarType::Float, "returns");
  const auto old = token_rows<const float>(old_values, values, ScalarType::Float, "old_values");
  const auto m = token_rows<const bool>(mask, values, ScalarType::Bool, "mask");
  const ValueOutputs out = new_value_outputs(values, grad_values);
  const auto g = grad_values
                     ? token_rows<float>(out.grad_values, values, ScalarType::Float, "grad_values")
                     : TokenRows<float>();

  const int64_t tokens = values.numel();
  const auto sequence = [&](int64_t i) -> ValueSequence {
    return {
        grid.size(i),  v.row(grid, i), r.row(grid, i), old.row(grid, i), flag_bytes(m.row(grid, i)),
        g.row(grid, i)};
  };
  // As in policy_loss.cpp, what divides the gradient is counted first.
  float scale = 1;
  if (grad_values) {
    ValueTotals counts;
    counts.clear();
    counts.sum[kValueSequences] = static_cast<double>(grid.sequences);
    if (counts_tokens(o.aggregation, given) || o.skip_empty) {
      const auto kernel = value_kernels().count;
      counts = over_sequences<ValueTotals>(
          grid, tokens, kCountGrain,
          [&](int64_t i, ValueTotals* totals) { kernel(sequence(i), totals); });
    }
    scale = static_cast<float>(value_scale(value_denominator(o, given, counts)));
  }
  const auto kernel = value_kernels().value;
  const ValueTotals sum = over_sequences<ValueTotals>(
      grid, tokens, kTokenGrain,
      [&](int64_t i, ValueTotals* totals) { kernel(o, sequence(i), scale, totals); });
  const ValueResult result = value_result(o, given, sum);
  *static_cast<float*>(out.loss.data_ptr()) = static_cast<float>(result.loss);
  *static_cast<float*>(out.scale.data_ptr()) = 1;
  double* vector = static_cast<double*>(out.metrics.data_ptr());
  for (int i = 0; i < kValueSums; ++i) vector[i] = result.metrics[i];
  return {out.loss, out.metrics, out.grad_values, out.scale};
}

Tensor value_loss_bwd_cpu(Tensor grad_loss, Tensor grad_values, Tensor scale) {
  return scaled(grad_values, upstream_factor(grad_loss, scale, 0), "grad_values");
}

Tensor kl_penalty_cpu(Tensor logprobs, Tensor ref_logprobs, std::optional<Tensor> mask,
                      int64_t estimator, int64_t clamp) {
  return kl_over(kl_arguments(logprobs, ref_logprobs, mask, estimator, clamp), logprobs, nullptr);
}

Tensor kl_penalty_bwd_cpu(Tensor grad, Tensor logprobs, Tensor ref_logprobs,
                          std::optional<Tensor> mask, int64_t estimator, int64_t clamp) {
  const KlArguments given = kl_arguments(logprobs, ref_logprobs, mask, estimator, clamp);
  return kl_over(given, logprobs, flat_values<float>(grad, logprobs, ScalarType::Float, "grad"));
}

}  // namespace rlkern

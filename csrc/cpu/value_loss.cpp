// The clipped value loss and the KL penalty: parallel over runs of sequences and over tokens.

#include "value_loss.h"

#include <torch/csrc/stable/ops.h>

#include "../common/sequence_view.h"
#include "../common/value_loss.h"
#include "isa.h"
#include "sequence_runs.h"

namespace rlkern {
namespace {

const unsigned char* bytes(const bool* flags) {
  return reinterpret_cast<const unsigned char*>(flags);
}

KlTokens kl_tokens(const Tensor& logprobs, const Tensor& ref_logprobs,
                   const std::optional<Tensor>& mask, int64_t estimator, int64_t clamp) {
  check(estimator >= 0 && estimator <= static_cast<int64_t>(KlEstimator::kK3St),
        "estimator: unknown number ", estimator);
  check(clamp >= 0 && clamp <= static_cast<int64_t>(KlClamp::kOpenRlhf), "clamp: unknown number ",
        clamp);
  const auto flat = [&](const Tensor& t, ScalarType dtype, const char* name) {
    check(t.scalar_type() == dtype && t.is_contiguous() && t.numel() == logprobs.numel(), name,
          ": expected a contiguous tensor of ", logprobs.numel(), " values");
    return t.data_ptr();
  };
  KlTokens k;
  k.size = logprobs.numel();
  k.logprobs = static_cast<const float*>(flat(logprobs, ScalarType::Float, "logprobs"));
  k.ref_logprobs = static_cast<const float*>(flat(ref_logprobs, ScalarType::Float, "ref_logprobs"));
  k.mask = mask.has_value()
               ? static_cast<const unsigned char*>(flat(*mask, ScalarType::Bool, "mask"))
               : nullptr;
  k.upstream = nullptr;
  return k;
}

Tensor kl_over(KlTokens all, const Tensor& like, int64_t estimator, int64_t clamp) {
  Tensor out = torch::stable::new_empty(like, like.sizes());
  all.out = static_cast<float*>(out.data_ptr());
  const auto kernel = value_kernels().kl;
  torch::stable::parallel_for(0, all.size, kTokenGrain, [&](int64_t begin, int64_t end) {
    const auto from = [begin](auto* p) { return p == nullptr ? p : p + begin; };
    kernel(static_cast<KlEstimator>(estimator), static_cast<KlClamp>(clamp),
           {end - begin, from(all.logprobs), from(all.ref_logprobs), from(all.mask),
            from(all.upstream), from(all.out)});
  });
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> value_loss_cpu(
    Tensor values, Tensor returns, std::optional<Tensor> mask, std::optional<Tensor> old_values,
    std::optional<Tensor> offsets, std::optional<Tensor> normalizer,
    std::optional<Tensor> num_sequences, std::vector<double> options, bool grad_values) {
  check(options.size() == kValueOptionCount, "options: expected ", kValueOptionCount,
        " numbers, got ", options.size());
  const ValueOptions o = value_options(options.data());
  const GivenDenominators given = {given_number(normalizer, o.normalizer, "normalizer"),
                                   given_number(num_sequences, o.num_sequences, "num_sequences"),
                                   std::numeric_limits<double>::quiet_NaN()};
  const SequenceGrid grid = sequence_grid(values, offsets);
  check_offsets(grid);
  const auto v = token_rows<const float>(values, values, ScalarType::Float, "values");
  const auto r = token_rows<const float>(returns, values, ScalarType::Float, "returns");
  const auto old = token_rows<const float>(old_values, values, ScalarType::Float, "old_values");
  const auto m = token_rows<const bool>(mask, values, ScalarType::Bool, "mask");
  check(o.clip == std::numeric_limits<float>::infinity() || old_values.has_value(),
        "old_values: expected with clip");
  const std::vector<int64_t> sizes(values.sizes().begin(), values.sizes().end());
  const auto empty = [&](const std::vector<int64_t>& shape, ScalarType dtype) {
    return torch::stable::new_empty(values, shape, dtype);
  };
  Tensor loss = empty({}, ScalarType::Float), metrics = empty({kValueSums}, ScalarType::Double);
  Tensor scale = empty({1}, ScalarType::Float);
  Tensor grad = empty(grad_values ? sizes : std::vector<int64_t>{0}, ScalarType::Float);
  const auto g = grad_values ? token_rows<float>(grad, values, ScalarType::Float, "grad_values")
                             : TokenRows<float>();

  const auto kernel = value_kernels().value;
  const ValueTotals sum =
      over_sequences<ValueTotals>(grid, values.numel(), [&](int64_t i, ValueTotals* totals) {
        kernel(o,
               {grid.size(i), v.row(grid, i), r.row(grid, i), old.row(grid, i),
                bytes(m.row(grid, i)), g.row(grid, i)},
               totals);
      });
  const ValueResult result = value_result(o, given, sum);
  *static_cast<float*>(loss.data_ptr()) = static_cast<float>(result.loss);
  *static_cast<float*>(scale.data_ptr()) = static_cast<float>(result.scale);
  double* vector = static_cast<double*>(metrics.data_ptr());
  for (int i = 0; i < kValueSums; ++i) vector[i] = result.metrics[i];
  return {loss, metrics, grad, scale};
}

Tensor value_loss_bwd_cpu(Tensor grad_loss, Tensor grad_values, Tensor scale) {
  return scaled(grad_values, upstream_factor(grad_loss, scale, 0), "grad_values");
}

Tensor kl_penalty_cpu(Tensor logprobs, Tensor ref_logprobs, std::optional<Tensor> mask,
                      int64_t estimator, int64_t clamp) {
  return kl_over(kl_tokens(logprobs, ref_logprobs, mask, estimator, clamp), logprobs, estimator,
                 clamp);
}

Tensor kl_penalty_bwd_cpu(Tensor grad, Tensor logprobs, Tensor ref_logprobs,
                          std::optional<Tensor> mask, int64_t estimator, int64_t clamp) {
  KlTokens all = kl_tokens(logprobs, ref_logprobs, mask, estimator, clamp);
  check(grad.scalar_type() == ScalarType::Float && grad.is_contiguous() &&
            grad.numel() == logprobs.numel(),
        "grad: expected contiguous float32 in the shape of logprobs");
  all.upstream = static_cast<const float*>(grad.data_ptr());
  return kl_over(all, logprobs, estimator, clamp);
}

}  // namespace rlkern

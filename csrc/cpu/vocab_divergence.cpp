// The divergence between two distributions over the vocabulary: a pass over each row for the sum of
// its exponentials, then one over both for the divergence, while they are in the cache. The
// gradient is one pass over both. Parallel over rows.

#include "vocab_divergence.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "../common/formulas.h"
#include "isa.h"
#include "logit_rows.h"

namespace rlkern {
namespace {

constexpr int64_t kState = sizeof(DivergenceState) / sizeof(float);

// The rows of the policy and of the reference, and the numbers of the divergence.
struct RowPairs {
  LogitRows policy;
  LogitRows reference;
  Divergence kind;
  double beta;

  RowPairs(const Tensor& logits, const Tensor& ref_logits, const std::optional<Tensor>& mask,
           const std::optional<Tensor>& token_temperature, double temperature,
           std::optional<double> softcap, int64_t divergence, double beta_)
      : policy(logits, std::nullopt, mask, token_temperature, temperature, softcap),
        reference(ref_logits, std::nullopt, std::nullopt, std::nullopt, temperature, softcap),
        kind(static_cast<Divergence>(divergence)),
        beta(beta_) {
    check(divergence >= 0 && divergence < static_cast<int64_t>(Divergence::kCount),
          "divergence: expected 0, 1 or 2, got ", divergence);
    check(kind != Divergence::kJensenShannon || (beta > 0 && beta < 1),
          "beta: expected a number between 0 and 1, got ", beta);
    require_same(ref_logits, logits, "ref_logits");
    policy.check_values(false);
  }

  static void require_same(const Tensor& tensor, const Tensor& logits, const char* name) {
    bool same = tensor.dim() == logits.dim() && tensor.scalar_type() == logits.scalar_type() &&
                !tensor.is_cuda();
    for (int64_t d = 0; same && d < logits.dim(); ++d) same = tensor.size(d) == logits.size(d);
    check(same && (logits.size(logits.dim() - 1) == 1 || tensor.stride(tensor.dim() - 1) == 1),
          name, ": expected rows of consecutive values in the logits' shape and dtype");
  }

  DivergenceRow row(int64_t token, const DivergenceState& s) const {
    const LogitRow of_policy = policy.row(token);
    return {of_policy.x,
            reference.row_data(token),
            policy.vocab,
            of_policy.inv_temperature,
            of_policy.softcap,
            s.max,
            std::exp(-s.log_sum),
            s.ref_max,
            std::exp(-s.ref_log_sum),
            divergence_shift(s.max, s.ref_max),
            s.offset,
            static_cast<float>(beta)};
  }
};

// Of the row that `x` is of: max of y and log of the sum of exponentials relative to it.
double log_sum_of(LogitRow row, const void* x, LogitType type, float* max) {
  row.x = x;
  RowForward pass;
  row_kernels().forward[static_cast<int>(type)](row, false, &pass);
  *max = pass.max;
  return token_logprob(pass.others, pass.target).log_sum;
}

struct RowResult {
  double value;
  DivergenceState state;
};

RowResult forward_row(const RowPairs& pairs, int64_t token) {
  const LogitRow of_policy = pairs.policy.row(token);
  const LogitType type = pairs.policy.type;
  float max, ref_max;
  const double log_sum = log_sum_of(of_policy, of_policy.x, type, &max);
  const double ref_log_sum = log_sum_of(of_policy, pairs.reference.row_data(token), type, &ref_max);
  DivergenceRowBegin begun = divergence_begin(pairs.kind, pairs.beta, max, log_sum, ref_max,
                                              ref_log_sum, of_policy.inv_temperature);
  if (begun.settled) return {begun.value, begun.state};
  DivergenceSums sums;
  divergence_kernels().sums[static_cast<int>(pairs.kind)][static_cast<int>(type)](
      pairs.row(token, begun.state), &sums);
  begun.state.mean = static_cast<float>(sums.mean);
  return {sums.value, begun.state};
}

template <typename Scalar>
void fill(void* out, int64_t size, Scalar value) {
  std::fill_n(static_cast<Scalar*>(out), size, value);
}

void fill_nan(void* out, int64_t size, LogitType type) {
  if (type == LogitType::kFloat) {
    return fill(out, size, std::numeric_limits<float>::quiet_NaN());
  }
  fill<uint16_t>(out, size, type == LogitType::kHalf ? 0x7e00 : 0x7fc0);
}

void gradient_rows(const RowPairs& pairs, const Tensor& grad_value, const Tensor& logits,
                   const Tensor& state, const Tensor& grad) {
  const LogitRows& rows = pairs.policy;
  const TokenView<const float> upstream(grad_value, logits, ScalarType::Float, "grad_value");
  check(state.is_contiguous() && state.numel() == kState * rows.grid.size() &&
            state.scalar_type() == ScalarType::Float,
        "state: expected what the forward pass returned");
  RowPairs::require_same(grad, logits, "grad");
  const auto* saved = static_cast<const DivergenceState*>(state.data_ptr());
  const TokenGrid out_grid = token_grid(grad, grad.dim() - 1, "grad");
  char* out = static_cast<char*>(grad.data_ptr());
  const auto kernel =
      divergence_kernels().gradient[static_cast<int>(pairs.kind)][static_cast<int>(rows.type)];

  torch::stable::parallel_for(0, rows.grid.size(), rows.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      void* dx = out + out_grid.offset(i) * rows.element_size;
      const DivergenceState& s = saved[i];
      // Rows without a gradient are not read.
      switch (divergence_gradient(s, rows.counts(i), upstream[i])) {
        case DivergenceGradient::kZero:
          std::memset(dx, 0, rows.vocab * rows.element_size);
          break;
        case DivergenceGradient::kNan:
          fill_nan(dx, rows.vocab, rows.type);
          break;
        case DivergenceGradient::kComputed:
          kernel(pairs.row(i, s), s.mean, upstream[i], dx);
      }
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor> vocab_divergence_cpu(Tensor logits, Tensor ref_logits,
                                                std::optional<Tensor> mask,
                                                std::optional<Tensor> token_temperature,
                                                double temperature, std::optional<double> softcap,
                                                int64_t divergence, double beta) {
  const RowPairs pairs(logits, ref_logits, mask, token_temperature, temperature, softcap,
                       divergence, beta);
  std::vector<int64_t> sizes(logits.sizes().begin(), logits.sizes().end() - 1);
  Tensor value = torch::stable::new_empty(logits, sizes, ScalarType::Float);
  sizes.push_back(kState);
  Tensor state = torch::stable::new_empty(logits, sizes, ScalarType::Float);
  float* values = static_cast<float*>(value.data_ptr());
  auto* states = static_cast<DivergenceState*>(state.data_ptr());
  const LogitRows& rows = pairs.policy;
  torch::stable::parallel_for(0, rows.grid.size(), rows.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      RowResult result = {0, {}};
      if (rows.counts(i)) result = forward_row(pairs, i);
      values[i] = static_cast<float>(result.value);
      states[i] = result.state;
    }
  });
  return {value, state};
}

Tensor vocab_divergence_bwd_cpu(Tensor grad_value, Tensor logits, Tensor ref_logits,
                                std::optional<Tensor> mask, std::optional<Tensor> token_temperature,
                                double temperature, std::optional<double> softcap,
                                int64_t divergence, double beta, Tensor state) {
  const RowPairs pairs(logits, ref_logits, mask, token_temperature, temperature, softcap,
                       divergence, beta);
  Tensor grad = torch::stable::new_empty(logits, logits.sizes());
  gradient_rows(pairs, grad_value, logits, state, grad);
  return grad;
}

void vocab_divergence_bwd_into_cpu(Tensor grad_value, Tensor grad, Tensor logits, Tensor ref_logits,
                                   std::optional<Tensor> mask,
                                   std::optional<Tensor> token_temperature, double temperature,
                                   std::optional<double> softcap, int64_t divergence, double beta,
                                   Tensor state) {
  const RowPairs pairs(logits, ref_logits, mask, token_temperature, temperature, softcap,
                       divergence, beta);
  gradient_rows(pairs, grad_value, logits, state, grad);
}

}  // namespace rlkern

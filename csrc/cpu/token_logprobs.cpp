// Log-probability and entropy of chosen tokens: one read of the logits forward, one read and one
// write backward. Parallel over rows; a row's arithmetic does not depend on the rows beside it.

#include "token_logprobs.h"

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "../common/formulas.h"
#include "isa.h"
#include "logit_rows.h"

namespace rlkern {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

Tensor new_tokens(const Tensor& logits, std::vector<int64_t> sizes) {
  return torch::stable::new_empty(logits, sizes, ScalarType::Float);
}

void backward_rows(const LogitRows& rows, const std::optional<Tensor>& grad_logprobs,
                   const std::optional<Tensor>& grad_entropy, const Tensor& logits,
                   const Tensor& logprobs, const Tensor& entropy, const Tensor& state,
                   const Tensor& grad) {
  const TokenView<const float> g(grad_logprobs, logits, ScalarType::Float, "grad_logprobs");
  const TokenView<const float> h(grad_entropy, logits, ScalarType::Float, "grad_entropy");
  const TokenView<const float> logp(logprobs, logits, ScalarType::Float, "logprobs");
  const TokenView<const float> ent(
      grad_entropy.has_value() ? std::optional<Tensor>(entropy) : std::nullopt, logits,
      ScalarType::Float, "entropy");
  check(state.is_contiguous() && state.numel() == 2 * rows.grid.size() &&
            state.scalar_type() == ScalarType::Float,
        "state: expected what the forward pass returned");
  rows.check_values(true);
  const float* saved = static_cast<const float*>(state.data_ptr());
  const TokenGrid out_grid = token_grid(grad, grad.dim() - 1, "grad");
  char* out = static_cast<char*>(grad.data_ptr());
  const auto kernel = row_kernels().backward[static_cast<int>(rows.type)];

  torch::stable::parallel_for(0, rows.grid.size(), rows.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      void* dx = out + out_grid.offset(i) * rows.element_size;
      const float gi = g ? g[i] : 0.0f;
      const float hi = h ? h[i] : 0.0f;
      const float max = saved[2 * i], log_sum = saved[2 * i + 1];
      // Rows without a gradient are not read: masked ones, all -inf, nothing upstream. A row
      // that holds a NaN shows it all the same.
      const bool silent = ((gi == 0 && hi == 0) || max == -kInfinity) && !std::isnan(log_sum);
      if (!rows.counts(i) || silent) {
        std::memset(dx, 0, rows.vocab * rows.element_size);
        continue;
      }
      const auto t = token_gradient<float>(gi, hi, logp[i], ent ? ent[i] : 0.0f, log_sum);
      kernel(rows.row(i), {max, log_sum, t.constant, t.slope, t.target}, dx);
    }
  });
}

struct Results {
  Tensor logprobs, entropy, state;
  Tensor outputs;  // mean of z, log of the sum of squared probabilities, 1 where y is the argmax
};

Results forward_rows(const LogitRows& rows, const Tensor& logits, bool return_entropy,
                     bool return_outputs) {
  rows.check_values(true);
  std::vector<int64_t> sizes(logits.sizes().begin(), logits.sizes().end() - 1);
  Tensor logprobs = new_tokens(logits, sizes);
  Tensor entropy = new_tokens(logits, return_entropy ? sizes : std::vector<int64_t>{0});
  sizes.push_back(2);
  Tensor state = new_tokens(logits, sizes);
  sizes.back() = 3;
  Tensor outputs = new_tokens(logits, return_outputs ? sizes : std::vector<int64_t>{0});
  float* more = return_outputs ? static_cast<float*>(outputs.data_ptr()) : nullptr;
  float* logp = static_cast<float*>(logprobs.data_ptr());
  float* ent = return_entropy ? static_cast<float*>(entropy.data_ptr()) : nullptr;
  float* saved = static_cast<float*>(state.data_ptr());
  const auto kernel = row_kernels().forward[static_cast<int>(rows.type)];
  const auto also = row_kernels().outputs[static_cast<int>(rows.type)];

  torch::stable::parallel_for(0, rows.grid.size(), rows.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      TokenLogprob<double> result{0, 0, 0};
      float max = 0;
      if (more != nullptr) more[3 * i] = more[3 * i + 1] = more[3 * i + 2] = 0;
      if (rows.counts(i)) {
        const LogitRow row = rows.row(i);
        RowForward pass;
        kernel(row, return_entropy, &pass);
        result = token_logprob(pass.others, pass.target);
        max = pass.max;
        if (more != nullptr) {
          // The row is in the cache still.
          RowOutputs found;
          also(row, max, &found);
          more[3 * i] = static_cast<float>(found.sum * row.inv_temperature / rows.vocab);
          more[3 * i + 1] = static_cast<float>(std::log(found.squares) - 2 * result.log_sum);
          more[3 * i + 2] = pass.target == 0 && !found.earlier && result.log_sum == result.log_sum;
        }
      }
      const bool elsewhere = rows.counts(i) && rows.ids[i] == kElsewhere;
      logp[i] = elsewhere ? kNaN : static_cast<float>(result.logprob);
      if (ent != nullptr) ent[i] = static_cast<float>(result.entropy);
      saved[2 * i] = max;
      saved[2 * i + 1] = static_cast<float>(result.log_sum);
    }
  });
  return {logprobs, entropy, state, outputs};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> token_logprobs_cpu(Tensor logits, Tensor token_ids,
                                                      std::optional<Tensor> mask,
                                                      std::optional<Tensor> token_temperature,
                                                      double temperature,
                                                      std::optional<double> softcap,
                                                      bool return_entropy) {
  const LogitRows rows(logits, token_ids, mask, token_temperature, temperature, softcap);
  const Results found = forward_rows(rows, logits, return_entropy, false);
  return {found.logprobs, found.entropy, found.state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> token_logprobs_outputs_cpu(
    Tensor logits, Tensor token_ids, std::optional<Tensor> mask,
    std::optional<Tensor> token_temperature, double temperature, std::optional<double> softcap,
    bool return_entropy) {
  const LogitRows rows(logits, token_ids, mask, token_temperature, temperature, softcap);
  const Results found = forward_rows(rows, logits, return_entropy, true);
  return {found.logprobs, found.entropy, found.state, found.outputs};
}

Tensor token_logprobs_bwd_cpu(std::optional<Tensor> grad_logprobs,
                              std::optional<Tensor> grad_entropy, Tensor logits, Tensor token_ids,
                              std::optional<Tensor> mask, std::optional<Tensor> token_temperature,
                              double temperature, std::optional<double> softcap, Tensor logprobs,
                              Tensor entropy, Tensor state) {
  const LogitRows rows(logits, token_ids, mask, token_temperature, temperature, softcap);
  Tensor grad = torch::stable::new_empty(logits, logits.sizes());
  backward_rows(rows, grad_logprobs, grad_entropy, logits, logprobs, entropy, state, grad);
  return grad;
}

void token_logprobs_bwd_inplace_cpu(std::optional<Tensor> grad_logprobs,
                                    std::optional<Tensor> grad_entropy, Tensor logits,
                                    Tensor token_ids, std::optional<Tensor> mask,
                                    std::optional<Tensor> token_temperature, double temperature,
                                    std::optional<double> softcap, Tensor logprobs, Tensor entropy,
                                    Tensor state) {
  const LogitRows rows(logits, token_ids, mask, token_temperature, temperature, softcap);
  backward_rows(rows, grad_logprobs, grad_entropy, logits, logprobs, entropy, state, logits);
}

}  // namespace rlkern

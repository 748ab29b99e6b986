// Log-probability and entropy of chosen tokens: one read of the logits forward, one read and one
// write backward. Parallel over rows; a row's arithmetic does not depend on the rows beside it.

#include "token_logprobs.h"

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "../common/formulas.h"
#include "../common/token_view.h"
#include "isa.h"

namespace rlkern {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Elements below which a second thread costs more than it brings.
constexpr int64_t kGrain = 16384;

LogitType logit_type(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return LogitType::kFloat;
    case ScalarType::Half:
      return LogitType::kHalf;
    case ScalarType::BFloat16:
      return LogitType::kBFloat16;
    default:
      fail("logits: expected float32, float16 or bfloat16");
  }
}

// What forward and backward share: the logits' rows and the values that belong to each.
struct Rows {
  TokenGrid grid;
  LogitType type;
  int64_t element_size;
  char* data;
  int64_t vocab;
  TokenView<const int64_t> ids;
  TokenView<const bool> mask;
  TokenView<const float> token_temperature;
  float inv_temperature;
  float softcap;

  Rows(const Tensor& logits, const Tensor& token_ids, const std::optional<Tensor>& mask_,
       const std::optional<Tensor>& token_temperature_, double temperature,
       std::optional<double> softcap_)
      : grid(token_grid(logits, token_dims(logits), "logits")),
        type(logit_type(logits)),
        element_size(type == LogitType::kFloat ? 4 : 2),
        data(static_cast<char*>(logits.data_ptr())),
        vocab(logits.size(logits.dim() - 1)),
        ids(token_ids, logits, ScalarType::Long, "token_ids"),
        mask(mask_, logits, ScalarType::Bool, "mask"),
        token_temperature(token_temperature_, logits, ScalarType::Float, "temperature"),
        inv_temperature(static_cast<float>(1.0 / temperature)),
        softcap(softcap_or_none(softcap_)) {
    check(vocab > 0, "logits: expected at least one value per row, got none");
    check(vocab == 1 || logits.stride(logits.dim() - 1) == 1,
          "logits: expected rows of consecutive values, got a stride of ",
          logits.stride(logits.dim() - 1));
    check(temperature > 0, "temperature: expected a positive number, got ", temperature);
  }

  bool counts(int64_t token) const { return !mask || mask[token]; }
  void* row_data(int64_t token) const { return data + grid.offset(token) * element_size; }
  LogitRow row(int64_t token) const {
    const float inv = token_temperature ? 1.0f / token_temperature[token] : inv_temperature;
    return {row_data(token), vocab, ids[token], inv, softcap};
  }
  int64_t grain() const { return kGrain / vocab + 1; }

  // Before anything is computed: an id read past its row would be a silent wrong number.
  void check_values() const {
    for (int64_t i = 0; i < grid.size(); ++i) {
      if (!counts(i)) continue;
      check(ids[i] >= 0 && ids[i] < vocab, "token_ids: expected values in [0, ", vocab, "), got ",
            ids[i], " at token ", i);
      check(!token_temperature || token_temperature[i] > 0,
            "temperature: expected positive values, got ",
            token_temperature ? token_temperature[i] : 0.0f, " at token ", i);
    }
  }
};

Tensor new_tokens(const Tensor& logits, std::vector<int64_t> sizes) {
  return torch::stable::new_empty(logits, sizes, ScalarType::Float);
}

void backward_rows(const Rows& rows, const std::optional<Tensor>& grad_logprobs,
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
  rows.check_values();
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

}  // namespace

std::tuple<Tensor, Tensor, Tensor> token_logprobs_cpu(Tensor logits, Tensor token_ids,
                                                      std::optional<Tensor> mask,
                                                      std::optional<Tensor> token_temperature,
                                                      double temperature,
                                                      std::optional<double> softcap,
                                                      bool return_entropy) {
  const Rows rows(logits, token_ids, mask, token_temperature, temperature, softcap);
  rows.check_values();
  std::vector<int64_t> sizes(logits.sizes().begin(), logits.sizes().end() - 1);
  Tensor logprobs = new_tokens(logits, sizes);
  Tensor entropy = new_tokens(logits, return_entropy ? sizes : std::vector<int64_t>{0});
  sizes.push_back(2);
  Tensor state = new_tokens(logits, sizes);
  float* logp = static_cast<float*>(logprobs.data_ptr());
  float* ent = return_entropy ? static_cast<float*>(entropy.data_ptr()) : nullptr;
  float* saved = static_cast<float*>(state.data_ptr());
  const auto kernel = row_kernels().forward[static_cast<int>(rows.type)];

  torch::stable::parallel_for(0, rows.grid.size(), rows.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      TokenLogprob<double> result{0, 0, 0};
      float max = 0;
      if (rows.counts(i)) {
        RowForward pass;
        kernel(rows.row(i), return_entropy, &pass);
        result = token_logprob(pass.others, pass.target);
        max = pass.max;
      }
      logp[i] = static_cast<float>(result.logprob);
      if (ent != nullptr) ent[i] = static_cast<float>(result.entropy);
      saved[2 * i] = max;
      saved[2 * i + 1] = static_cast<float>(result.log_sum);
    }
  });
  return {logprobs, entropy, state};
}

Tensor token_logprobs_bwd_cpu(std::optional<Tensor> grad_logprobs,
                              std::optional<Tensor> grad_entropy, Tensor logits, Tensor token_ids,
                              std::optional<Tensor> mask, std::optional<Tensor> token_temperature,
                              double temperature, std::optional<double> softcap, Tensor logprobs,
                              Tensor entropy, Tensor state) {
  const Rows rows(logits, token_ids, mask, token_temperature, temperature, softcap);
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
  const Rows rows(logits, token_ids, mask, token_temperature, temperature, softcap);
  backward_rows(rows, grad_logprobs, grad_entropy, logits, logprobs, entropy, state, logits);
}

}  // namespace rlkern

// A policy loss that is separable by token, from its logits: a row's gradient is known as soon as
// its log-probability is, so the row is read from memory once and its gradient written once, over
// the row if asked to. Between the two passes the row and its exponentials stay in the cache.

#include "policy_rows.h"

#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <limits>
#include <memory>

#include "../common/formulas.h"
#include "../common/policy_row_arguments.h"
#include "isa.h"
#include "logit_rows.h"

namespace rlkern {
namespace {

// A token as a sequence of its own, with room for its results.
PolicySequence as_sequence(const TokenInputs& in, int64_t token, const float* logprob,
                           const float* entropy, float* upstream) {
  const auto at = [token](const auto* values) {
    return values == nullptr ? nullptr : values + token;
  };
  PolicySequence s = {};
  s.size = 1;
  s.logprobs = logprob;
  s.one_advantage = true;
  s.advantage = in.advantages[token];
  s.old_logprobs = at(in.old_logprobs);
  s.ref_logprobs = at(in.ref_logprobs);
  s.rollout_logprobs = at(in.rollout_logprobs);
  s.entropy = entropy;
  s.token_weights = at(in.token_weights);
  s.entropy_mask = at(in.entropy_mask);
  s.grad_logprobs = upstream;
  s.grad_entropy = upstream + 1;
  return s;
}

// Room for the exponentials of a row and the maxima of its blocks. Exponentials of fp32 logits lie
// where the gradient will: half the traffic. Unless the gradient looks at the logits once more, for
// a cap or an entropy.
class KeptRow {
 public:
  KeptRow(int64_t vocab, bool in_gradient) {
    const int64_t blocks = (vocab + kRowBlock - 1) / kRowBlock;
    own_ = in_gradient ? 0 : blocks * kRowBlock;
    values_.reset(new float[own_ + blocks]);
  }
  RowKept view(void* gradient) const {
    float* exponentials = own_ > 0 ? values_.get() : static_cast<float*>(gradient);
    return {exponentials, values_.get() + own_};
  }

 private:
  int64_t own_;
  std::unique_ptr<float[]> values_;
};

PolicyRowResults over_rows(const LogitRows& rows, const Tensor& logits, const TokenInputs& in,
                           const PolicyOptions& o, bool return_entropy, const Tensor& grad) {
  rows.check_values(false);
  const TokenGrid out_grid = gradient_grid(grad, logits);
  const PolicyRowResults out = new_policy_row_results(logits, return_entropy);
  float* logp = static_cast<float*>(out.logprobs.data_ptr());
  float* ent = return_entropy ? static_cast<float*>(out.entropy.data_ptr()) : nullptr;
  float* upstream = static_cast<float*>(out.upstream.data_ptr());
  char* dx = static_cast<char*>(grad.data_ptr());
  const int type = static_cast<int>(rows.type);
  const auto forward = row_kernels().forward_keeping[type];
  const auto backward = row_kernels().backward_from_kept[type];
  const auto policy = token_kernels().policy;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();

  torch::stable::parallel_for(0, rows.grid.size(), rows.grain(), [&](int64_t begin, int64_t end) {
    const bool plain = rows.type == LogitType::kFloat && rows.softcap == 0 && o.entropy_coef == 0;
    const KeptRow room(rows.vocab, plain);
    PolicyTotals ignored;
    ignored.clear();
    for (int64_t i = begin; i < end; ++i) {
      void* row_grad = dx + out_grid.offset(i) * rows.element_size;
      float* up = upstream + 2 * i;
      up[0] = up[1] = logp[i] = 0;
      if (ent != nullptr) ent[i] = 0;
      if (!rows.counts(i)) {
        std::memset(row_grad, 0, rows.vocab * rows.element_size);
        continue;
      }
      RowForward pass;
      const RowKept kept = room.view(row_grad);
      forward(rows.row(i), return_entropy, kept, &pass);
      const TokenLogprob<double> result = token_logprob(pass.others, pass.target);
      logp[i] = static_cast<float>(result.logprob);
      if (ent != nullptr) ent[i] = static_cast<float>(result.entropy);
      const float log_sum = static_cast<float>(result.log_sum);
      policy(o, as_sequence(in, i, logp + i, ent == nullptr ? nullptr : ent + i, up), in.scales[i],
             &ignored);
      const bool silent =
          ((up[0] == 0 && up[1] == 0) || pass.max == -kInfinity) && log_sum == log_sum;
      if (silent) {
        std::memset(row_grad, 0, rows.vocab * rows.element_size);
        continue;
      }
      const auto t =
          token_gradient<float>(up[0], up[1], logp[i], ent == nullptr ? 0 : ent[i], log_sum);
      backward(rows.row(i), {pass.max, log_sum, t.constant, t.slope, t.target}, kept, row_grad);
    }
  });
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> policy_rows_cpu(
    Tensor logits, Tensor grad, Tensor token_ids, std::optional<Tensor> mask,
    std::optional<Tensor> token_temperature, double temperature, std::optional<double> softcap,
    Tensor advantages, std::optional<Tensor> old_logprobs, std::optional<Tensor> ref_logprobs,
    std::optional<Tensor> rollout_logprobs, std::optional<Tensor> token_weights,
    std::optional<Tensor> entropy_mask, Tensor scales, std::vector<double> options,
    bool return_entropy) {
  const LogitRows rows(logits, token_ids, mask, token_temperature, temperature, softcap);
  const SeparableTensors tensors = {advantages,    old_logprobs, ref_logprobs, rollout_logprobs,
                                    token_weights, entropy_mask, scales};
  const PolicyOptions o = separable_options(options, tensors, return_entropy);
  const TokenInputs in = token_inputs(tensors, logits, rows.grid.size());
  const PolicyRowResults out = over_rows(rows, logits, in, o, return_entropy, grad);
  return {out.logprobs, out.entropy, out.upstream};
}

}  // namespace rlkern

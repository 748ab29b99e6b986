// The tensors of a policy loss, checked once for CPU and CUDA.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <limits>
#include <optional>
#include <vector>

#include "new_tensor.h"
#include "policy_rows.h"
#include "policy_totals.h"
#include "sequence_view.h"

namespace rlkern {

// As rlkern/_schema.py lists them.
struct PolicyTensors {
  Tensor logprobs;
  Tensor advantages;
  std::optional<Tensor> mask, old_logprobs, ref_logprobs, rollout_logprobs, entropy, token_weights,
      entropy_mask, offsets, normalizer, num_sequences, entropy_normalizer;
};

struct PolicyOutputs {
  Tensor loss, metrics, grad_logprobs, grad_entropy, scale;
};

inline PolicyOptions checked_options(const std::vector<double>& options) {
  check(options.size() == kPolicyOptionCount, "options: expected ", kPolicyOptionCount,
        " numbers, got ", options.size());
  return policy_options(options.data());
}

inline PolicyOutputs new_policy_outputs(const PolicyTensors& t, bool grad_logprobs,
                                        bool grad_entropy) {
  const std::vector<int64_t> sizes(t.logprobs.sizes().begin(), t.logprobs.sizes().end());
  const std::vector<int64_t> none{0};
  const auto empty = [&](const std::vector<int64_t>& shape, ScalarType dtype) {
    return new_tensor(t.logprobs, shape, dtype);
  };
  return {empty({}, ScalarType::Float), empty({kPolicyMetrics}, ScalarType::Double),
          empty(grad_logprobs ? sizes : none, ScalarType::Float),
          empty(grad_entropy ? sizes : none, ScalarType::Float), empty({2}, ScalarType::Float)};
}

inline PolicyRows policy_rows(const PolicyTensors& t, const PolicyOptions& o,
                              const PolicyOutputs& out) {
  const Tensor& like = t.logprobs;
  const auto floats = [&](const std::optional<Tensor>& tensor, const char* name) {
    return token_rows<const float>(tensor, like, ScalarType::Float, name);
  };
  const auto flags = [&](const std::optional<Tensor>& tensor, const char* name) {
    return token_rows<const bool>(tensor, like, ScalarType::Bool, name);
  };
  const auto gradient = [&](const Tensor& tensor, const char* name) {
    return tensor.dim() == like.dim() && tensor.numel() == like.numel()
               ? token_rows<float>(tensor, like, ScalarType::Float, name)
               : TokenRows<float>();
  };
  PolicyRows rows;
  rows.grid = sequence_grid(like, t.offsets);
  rows.logprobs = floats(like, "logprobs");
  if (t.advantages.dim() == 1 && t.advantages.size(0) == rows.grid.sequences) {
    check(t.advantages.scalar_type() == ScalarType::Float && t.advantages.is_contiguous(),
          "advantages: expected contiguous float32");
    check(t.advantages.is_cuda() == like.is_cuda() &&
              t.advantages.get_device_index() == like.get_device_index(),
          "advantages: expected the device of the others");
    rows.sequence_advantages = static_cast<const float*>(t.advantages.data_ptr());
  } else {
    rows.advantages = floats(t.advantages, "advantages");
  }
  rows.mask = flags(t.mask, "mask");
  rows.old_logprobs = floats(t.old_logprobs, "old_logprobs");
  rows.ref_logprobs = floats(t.ref_logprobs, "ref_logprobs");
  rows.rollout_logprobs = floats(t.rollout_logprobs, "rollout_logprobs");
  rows.entropy = floats(t.entropy, "entropy");
  rows.token_weights = floats(t.token_weights, "token_weights");
  rows.entropy_mask = flags(t.entropy_mask, "entropy_mask");
  rows.grad_logprobs = gradient(out.grad_logprobs, "grad_logprobs");
  rows.grad_entropy = gradient(out.grad_entropy, "grad_entropy");
  check(o.kl_coef == 0 || t.ref_logprobs.has_value(), "ref_logprobs: expected with kl_coef");
  check(o.entropy_coef == 0 || t.entropy.has_value(), "entropy: expected with entropy_coef");
  check(o.correction == CorrectionLevel::kNone || t.rollout_logprobs.has_value(),
        "rollout_logprobs: expected with a rollout correction");
  return rows;
}

}  // namespace rlkern

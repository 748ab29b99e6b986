// The tensors of policy_rows beside the logits' own, checked once for CPU and CUDA.
#pragma once

#include <optional>
#include <vector>

#include "checks.h"
#include "new_tensor.h"
#include "policy_arguments.h"
#include "policy_token.h"
#include "token_view.h"

namespace rlkern {

// As rlkern/_schema.py lists them.
struct SeparableTensors {
  Tensor advantages;
  std::optional<Tensor> old_logprobs, ref_logprobs, rollout_logprobs, token_weights, entropy_mask;
  Tensor scales;
};

inline PolicyOptions separable_options(const std::vector<double>& numbers,
                                       const SeparableTensors& t, bool return_entropy) {
  const PolicyOptions o = checked_options(numbers);
  check(!o.needs_sums() && o.surrogate != SurrogateKind::kGmpo,
        "options: expected a loss that is separable by token");
  check(o.kl_coef == 0 || t.ref_logprobs.has_value(), "ref_logprobs: expected with kl_coef");
  check(o.entropy_coef == 0 || return_entropy, "return_entropy: expected with entropy_coef");
  check(o.correction == CorrectionLevel::kNone || t.rollout_logprobs.has_value(),
        "rollout_logprobs: expected with a rollout correction");
  return o;
}

// `tokens`: how many rows the logits have.
inline TokenInputs token_inputs(const SeparableTensors& t, const Tensor& logits, int64_t tokens) {
  const auto values = [&](const std::optional<Tensor>& tensor, int64_t count, ScalarType dtype,
                          const char* name) -> const void* {
    if (!tensor.has_value()) return nullptr;
    check(tensor->scalar_type() == dtype && tensor->is_contiguous() && tensor->numel() == count,
          name, ": expected ", count, " contiguous values of the schema's dtype, got ",
          tensor->numel());
    check(tensor->is_cuda() == logits.is_cuda() &&
              tensor->get_device_index() == logits.get_device_index(),
          name, ": expected the logits' device");
    return tensor->data_ptr();
  };
  const auto floats = [&](const std::optional<Tensor>& tensor, const char* name) {
    return static_cast<const float*>(values(tensor, tokens, ScalarType::Float, name));
  };
  return {floats(t.advantages, "advantages"),
          floats(t.old_logprobs, "old_logprobs"),
          floats(t.ref_logprobs, "ref_logprobs"),
          floats(t.rollout_logprobs, "rollout_logprobs"),
          floats(t.token_weights, "token_weights"),
          static_cast<const unsigned char*>(
              values(t.entropy_mask, tokens, ScalarType::Bool, "entropy_mask")),
          static_cast<const GradientScales*>(
              values(t.scales, 2 * tokens, ScalarType::Float, "scales"))};
}

// Where the gradient's rows lie; they may be the logits themselves.
inline TokenGrid gradient_grid(const Tensor& grad, const Tensor& logits) {
  const int64_t dims = token_dims(logits);
  bool same = grad.scalar_type() == logits.scalar_type() && grad.dim() == logits.dim() &&
              grad.is_cuda() == logits.is_cuda() &&
              grad.get_device_index() == logits.get_device_index();
  for (int64_t d = 0; same && d <= dims; ++d) same = grad.size(d) == logits.size(d);
  check(same && (grad.size(dims) <= 1 || grad.stride(dims) == 1),
        "grad: expected rows of consecutive values in the logits' shape, dtype and device");
  return token_grid(grad, dims, "grad");
}

struct PolicyRowResults {
  Tensor logprobs, entropy, upstream;
};

inline PolicyRowResults new_policy_row_results(const Tensor& logits, bool return_entropy) {
  std::vector<int64_t> sizes(logits.sizes().begin(), logits.sizes().end() - 1);
  const auto floats = [&](const std::vector<int64_t>& shape) {
    return new_tensor(logits, shape, ScalarType::Float);
  };
  PolicyRowResults out = {floats(sizes), floats(return_entropy ? sizes : std::vector<int64_t>{0}),
                          Tensor()};
  sizes.push_back(2);
  out.upstream = floats(sizes);
  return out;
}

}  // namespace rlkern

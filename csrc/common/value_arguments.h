// The tensors of the value loss and of the KL penalty, checked once for CPU and CUDA.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <limits>
#include <optional>
#include <vector>

#include "flat_values.h"
#include "new_tensor.h"
#include "sequence_view.h"
#include "value_loss.h"

namespace rlkern {

struct ValueOutputs {
  Tensor loss, metrics, grad_values, scale;
};

inline ValueOptions checked_value_options(const std::vector<double>& options, bool has_old_values) {
  check(options.size() == kValueOptionCount, "options: expected ", kValueOptionCount,
        " numbers, got ", options.size());
  const ValueOptions o = value_options(options.data());
  check(o.clip == std::numeric_limits<float>::infinity() || has_old_values,
        "old_values: expected with clip");
  return o;
}

inline ValueOutputs new_value_outputs(const Tensor& values, bool grad_values) {
  const std::vector<int64_t> sizes(values.sizes().begin(), values.sizes().end());
  const auto empty = [&](const std::vector<int64_t>& shape, ScalarType dtype) {
    return new_tensor(values, shape, dtype);
  };
  return {empty({}, ScalarType::Float), empty({kValueSums}, ScalarType::Double),
          empty(grad_values ? sizes : std::vector<int64_t>{0}, ScalarType::Float),
          empty({1}, ScalarType::Float)};
}

struct KlArguments {
  KlEstimator estimator;
  KlClamp clamp;
  int64_t size;
  const float* logprobs;
  const float* ref_logprobs;
  const bool* mask;  // null where not given
};

inline KlArguments kl_arguments(const Tensor& logprobs, const Tensor& ref_logprobs,
                                const std::optional<Tensor>& mask, int64_t estimator,
                                int64_t clamp) {
  check(estimator >= 0 && estimator <= static_cast<int64_t>(KlEstimator::kK3St),
        "estimator: unknown number ", estimator);
  check(clamp >= 0 && clamp <= static_cast<int64_t>(KlClamp::kOpenRlhf), "clamp: unknown number ",
        clamp);
  return {static_cast<KlEstimator>(estimator),
          static_cast<KlClamp>(clamp),
          logprobs.numel(),
          flat_values<float>(logprobs, logprobs, ScalarType::Float, "logprobs"),
          flat_values<float>(ref_logprobs, logprobs, ScalarType::Float, "ref_logprobs"),
          flat_values<bool>(mask, logprobs.numel(), logprobs, ScalarType::Bool, "mask")};
}

}  // namespace rlkern

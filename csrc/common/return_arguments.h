// The tensors of a return scan and of its backward, checked once for CPU and CUDA.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "return_rows.h"
#include "return_scan.h"
#include "sequence_view.h"

namespace rlkern {

// As rlkern/_schema.py lists them.
struct ReturnTensors {
  Tensor rewards;
  std::optional<Tensor> values, log_ratios, mask, dones, bootstrap_value, lam, offsets;
};

struct ReturnGradTensors {
  Tensor grad_first;
  std::optional<Tensor> grad_second, mask, dones, lam, offsets;
};

struct ReturnOutputs {
  Tensor first, second;
};

struct ReturnGradients {
  Tensor rewards, values, bootstrap_value;
};

inline ReturnOptions checked_return_options(const std::vector<double>& options) {
  check(options.size() == kReturnOptionCount, "options: expected ", kReturnOptionCount,
        " numbers, got ", options.size());
  return return_options(options.data());
}

// In the shape of `like`, contiguous, or [0].
inline Tensor new_tokens(const Tensor& like, bool wanted) {
  std::vector<int64_t> sizes{0};
  if (wanted) sizes.assign(like.sizes().begin(), like.sizes().end());
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

inline ReturnOutputs new_return_outputs(const ReturnTensors& t) {
  return {new_tokens(t.rewards, true), new_tokens(t.rewards, t.values.has_value())};
}

inline ReturnGradients new_return_gradients(const ReturnGradTensors& t, const SequenceGrid& grid) {
  return {new_tokens(t.grad_first, true), new_tokens(t.grad_first, t.grad_second.has_value()),
          torch::stable::new_empty(t.grad_first, {grid.sequences}, ScalarType::Float)};
}

// One float per sequence, or null where it is not given.
inline const float* sequence_floats(const std::optional<Tensor>& tensor, const Tensor& like,
                                    const SequenceGrid& grid, const char* name) {
  if (!tensor.has_value()) return nullptr;
  check(tensor->scalar_type() == ScalarType::Float && tensor->is_contiguous(), name,
        ": expected contiguous float32");
  check(tensor->dim() == 1 && tensor->size(0) == grid.sequences, name, ": expected ",
        grid.sequences, " values, one per sequence");
  check(
      tensor->is_cuda() == like.is_cuda() && tensor->get_device_index() == like.get_device_index(),
      name, ": expected the device of the others");
  return static_cast<const float*>(tensor->data_ptr());
}

inline ReturnRows return_rows(const ReturnTensors& t, const ReturnOutputs& out) {
  const Tensor& like = t.rewards;
  const auto floats = [&](const std::optional<Tensor>& tensor, const char* name) {
    return token_rows<const float>(tensor, like, ScalarType::Float, name);
  };
  const auto flags = [&](const std::optional<Tensor>& tensor, const char* name) {
    return token_rows<const bool>(tensor, like, ScalarType::Bool, name);
  };
  check(t.values.has_value() || !t.log_ratios.has_value(), "values: expected with log_ratios");
  ReturnRows rows;
  rows.grid = sequence_grid(like, t.offsets);
  rows.rewards = floats(like, "rewards");
  rows.values = floats(t.values, "values");
  rows.log_ratios = floats(t.log_ratios, "log_ratios");
  rows.mask = flags(t.mask, "mask");
  rows.dones = flags(t.dones, "dones");
  rows.bootstrap_value = sequence_floats(t.bootstrap_value, like, rows.grid, "bootstrap_value");
  rows.lam = sequence_floats(t.lam, like, rows.grid, "lam");
  rows.first = token_rows<float>(out.first, like, ScalarType::Float, "first");
  if (t.values.has_value()) {
    rows.second = token_rows<float>(out.second, like, ScalarType::Float, "second");
  }
  return rows;
}

inline ReturnGradRows return_grad_rows(const ReturnGradTensors& t, const SequenceGrid& grid,
                                       const ReturnGradients& out) {
  const Tensor& like = t.grad_first;
  const auto flags = [&](const std::optional<Tensor>& tensor, const char* name) {
    return token_rows<const bool>(tensor, like, ScalarType::Bool, name);
  };
  ReturnGradRows rows;
  rows.grid = grid;
  rows.grad_first = token_rows<const float>(like, like, ScalarType::Float, "grad_first");
  rows.grad_second = token_rows<const float>(t.grad_second, like, ScalarType::Float, "grad_second");
  rows.mask = flags(t.mask, "mask");
  rows.dones = flags(t.dones, "dones");
  rows.lam = sequence_floats(t.lam, like, grid, "lam");
  rows.grad_rewards = token_rows<float>(out.rewards, like, ScalarType::Float, "grad_rewards");
  if (t.grad_second.has_value()) {
    rows.grad_values = token_rows<float>(out.values, like, ScalarType::Float, "grad_values");
  }
  rows.grad_bootstrap = static_cast<float*>(out.bootstrap_value.data_ptr());
  return rows;
}

}  // namespace rlkern

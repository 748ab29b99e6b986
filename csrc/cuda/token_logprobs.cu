// Launches token_logprobs on the current stream. Nothing waits for the GPU, and all memory comes
// from torch, so that a call can be captured into a CUDA graph.

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "../common/token_view.h"
#include "launch.h"
#include "token_logprobs.cuh"
#include "token_logprobs.h"

namespace rlkern {
namespace {

// Calls run(Type{}) with the logits' element type.
template <typename Run>
void with_type(const Tensor& logits, const Run& run) {
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return run(Float32{});
    case ScalarType::Half:
      return run(Float16{});
    case ScalarType::BFloat16:
      return run(BFloat16{});
    default:
      fail("logits: expected float32, float16 or bfloat16");
  }
}

// Calls run with two flags as compile-time constants.
template <typename Run>
void with_flags(bool a, bool b, const Run& run) {
  using std::false_type;
  using std::true_type;
  a ? (b ? run(true_type{}, true_type{}) : run(true_type{}, false_type{}))
    : (b ? run(false_type{}, true_type{}) : run(false_type{}, false_type{}));
}

template <typename Type>
LogitRows<Type> logit_rows(const Tensor& logits, const Tensor& token_ids,
                           const std::optional<Tensor>& mask,
                           const std::optional<Tensor>& token_temperature, double temperature,
                           std::optional<double> softcap) {
  LogitRows<Type> rows;
  rows.x = static_cast<const typename Type::Scalar*>(logits.data_ptr());
  rows.grid = token_grid(logits, token_dims(logits), "logits");
  rows.vocab = logits.size(logits.dim() - 1);
  rows.ids = TokenView<const int64_t>(token_ids, logits, ScalarType::Long, "token_ids");
  rows.mask = TokenView<const bool>(mask, logits, ScalarType::Bool, "mask");
  rows.token_temperature =
      TokenView<const float>(token_temperature, logits, ScalarType::Float, "temperature");
  rows.inv_temperature = static_cast<float>(1.0 / temperature);
  rows.softcap = softcap_or_none(softcap);
  check(rows.vocab > 0, "logits: expected at least one value per row, got none");
  check(rows.vocab == 1 || logits.stride(logits.dim() - 1) == 1,
        "logits: expected rows of consecutive values, got a stride of ",
        logits.stride(logits.dim() - 1));
  check(temperature > 0, "temperature: expected a positive number, got ", temperature);
  return rows;
}

template <typename Type>
void launch_forward(ForwardArgs<Type> args, const Tensor& logits, bool return_entropy,
                    cudaStream_t stream) {
  const RowPlan plan = plan_rows(args.rows.vocab, Type::kLanes);
  const int64_t rows = args.rows.grid.size();
  args.slices = plan.slices;
  args.vectors_per_slice = plan.vectors_per_slice;
  Tensor parts;
  if (plan.slices > 1) {
    parts = torch::stable::new_empty(logits, {rows * plan.slices * 3}, ScalarType::Float);
    args.parts = static_cast<SoftmaxState<float>*>(parts.data_ptr());
  }
  with_flags(args.rows.softcap > 0, return_entropy, [&](auto capped, auto entropy) {
    for_grids(rows * plan.slices, kMaxBlocks, [&](unsigned blocks, int64_t first) {
      token_logprobs_forward<Type, decltype(capped)::value, decltype(entropy)::value>
          <<<blocks, plan.threads, 0, stream>>>(args, first);
    });
  });
  check_launch("token_logprobs forward");
  if (plan.slices == 1) return;
  constexpr int kThreads = 64;
  for_grids((rows + kThreads - 1) / kThreads, kMaxBlocks, [&](unsigned blocks, int64_t first) {
    token_logprobs_merge<Type><<<blocks, kThreads, 0, stream>>>(args, first * kThreads, rows);
  });
  check_launch("token_logprobs merge");
}

void backward(const std::optional<Tensor>& grad_logprobs, const std::optional<Tensor>& grad_entropy,
              const Tensor& logits, const Tensor& token_ids, const std::optional<Tensor>& mask,
              const std::optional<Tensor>& token_temperature, double temperature,
              std::optional<double> softcap, const Tensor& logprobs, const Tensor& entropy,
              const Tensor& state, const Tensor& grad) {
  const OnDeviceOf on(logits);
  with_type(logits, [&](auto type) {
    using Type = decltype(type);
    BackwardArgs<Type> args;
    args.rows = logit_rows<Type>(logits, token_ids, mask, token_temperature, temperature, softcap);
    const int64_t rows = args.rows.grid.size();
    check(state.is_contiguous() && state.numel() == 2 * rows &&
              state.scalar_type() == ScalarType::Float && state.is_cuda(),
          "state: expected what the forward pass returned");
    const auto floats = [&](const std::optional<Tensor>& tensor, const char* name) {
      return TokenView<const float>(tensor, logits, ScalarType::Float, name);
    };
    args.grad_logprobs = floats(grad_logprobs, "grad_logprobs");
    args.grad_entropy = floats(grad_entropy, "grad_entropy");
    args.logprobs = floats(logprobs, "logprobs");
    if (grad_entropy.has_value()) args.entropy = floats(entropy, "entropy");
    args.state = static_cast<const float*>(state.data_ptr());
    args.grad = static_cast<typename Type::Scalar*>(grad.data_ptr());
    args.grad_grid = token_grid(grad, grad.dim() - 1, "grad");
    const RowPlan plan = plan_rows(args.rows.vocab, Type::kLanes);
    args.slices = plan.slices;
    args.vectors_per_slice = plan.vectors_per_slice;
    with_flags(args.rows.softcap > 0, grad_entropy.has_value(), [&](auto capped, auto sloped) {
      for_grids(rows * plan.slices, kMaxBlocks, [&](unsigned blocks, int64_t first) {
        token_logprobs_backward<Type, decltype(capped)::value, decltype(sloped)::value>
            <<<blocks, plan.threads, 0, on.stream()>>>(args, first);
      });
    });
    check_launch("token_logprobs backward");
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> token_logprobs_cuda(Tensor logits, Tensor token_ids,
                                                       std::optional<Tensor> mask,
                                                       std::optional<Tensor> token_temperature,
                                                       double temperature,
                                                       std::optional<double> softcap,
                                                       bool return_entropy) {
  const OnDeviceOf on(logits);
  std::vector<int64_t> sizes(logits.sizes().begin(), logits.sizes().begin() + token_dims(logits));
  const auto floats = [&](const std::vector<int64_t>& shape) {
    return torch::stable::new_empty(logits, shape, ScalarType::Float);
  };
  Tensor logprobs = floats(sizes);
  Tensor entropy = floats(return_entropy ? sizes : std::vector<int64_t>{0});
  sizes.push_back(2);
  Tensor state = floats(sizes);
  with_type(logits, [&](auto type) {
    using Type = decltype(type);
    ForwardArgs<Type> args{};
    args.rows = logit_rows<Type>(logits, token_ids, mask, token_temperature, temperature, softcap);
    args.logprobs = static_cast<float*>(logprobs.data_ptr());
    args.entropy = return_entropy ? static_cast<float*>(entropy.data_ptr()) : nullptr;
    args.state = static_cast<float*>(state.data_ptr());
    if (args.rows.grid.size() > 0) launch_forward(args, logits, return_entropy, on.stream());
  });
  return {logprobs, entropy, state};
}

Tensor token_logprobs_bwd_cuda(std::optional<Tensor> grad_logprobs,
                               std::optional<Tensor> grad_entropy, Tensor logits, Tensor token_ids,
                               std::optional<Tensor> mask, std::optional<Tensor> token_temperature,
                               double temperature, std::optional<double> softcap, Tensor logprobs,
                               Tensor entropy, Tensor state) {
  Tensor grad = torch::stable::new_empty(logits, logits.sizes());
  backward(grad_logprobs, grad_entropy, logits, token_ids, mask, token_temperature, temperature,
           softcap, logprobs, entropy, state, grad);
  return grad;
}

void token_logprobs_bwd_inplace_cuda(std::optional<Tensor> grad_logprobs,
                                     std::optional<Tensor> grad_entropy, Tensor logits,
                                     Tensor token_ids, std::optional<Tensor> mask,
                                     std::optional<Tensor> token_temperature, double temperature,
                                     std::optional<double> softcap, Tensor logprobs, Tensor entropy,
                                     Tensor state) {
  backward(grad_logprobs, grad_entropy, logits, token_ids, mask, token_temperature, temperature,
           softcap, logprobs, entropy, state, logits);
}

}  // namespace rlkern

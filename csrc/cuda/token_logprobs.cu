// Launches token_logprobs on the current stream. Nothing waits for the GPU, and all memory comes
// from torch, so that a call can be captured into a CUDA graph.

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "launch.h"
#include "logit_launch.h"
#include "token_logprobs.cuh"
#include "token_logprobs.h"

namespace rlkern {
namespace {

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

// Launches policy_loss on the current stream: two kernels forward, one backward. Nothing waits for
// the GPU, and all memory comes from torch, so that a call can be captured into a CUDA graph.

#include <torch/csrc/stable/ops.h>

#include "../common/policy_arguments.h"
#include "launch.h"
#include "policy_loss.cuh"
#include "policy_loss.h"
#include "sequence_launch.h"

namespace rlkern {
namespace {

template <SurrogateKind kSurrogate>
void launch_sequences(const PolicyArgs& args, cudaStream_t stream) {
  for_grids(args.rows.grid.sequences, kMaxBlocks, [&](unsigned blocks, int64_t first) {
    policy_sequences<kSurrogate><<<blocks, kTokenThreads, 0, stream>>>(args, first);
  });
  check_launch("policy_loss sequences");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> policy_loss_cuda(
    Tensor logprobs, Tensor advantages, std::optional<Tensor> mask,
    std::optional<Tensor> old_logprobs, std::optional<Tensor> ref_logprobs,
    std::optional<Tensor> rollout_logprobs, std::optional<Tensor> entropy,
    std::optional<Tensor> token_weights, std::optional<Tensor> entropy_mask,
    std::optional<Tensor> offsets, std::optional<Tensor> normalizer,
    std::optional<Tensor> num_sequences, std::optional<Tensor> entropy_normalizer,
    std::vector<double> options, bool grad_logprobs, bool grad_entropy) {
  const OnDeviceOf on(logprobs);
  const PolicyTensors tensors = {
      logprobs,      advantages,   mask,    old_logprobs, ref_logprobs,  rollout_logprobs,  entropy,
      token_weights, entropy_mask, offsets, normalizer,   num_sequences, entropy_normalizer};
  const PolicyOptions o = checked_options(options);
  const PolicyOutputs out = new_policy_outputs(tensors, grad_logprobs, grad_entropy);
  const PolicyRows rows = policy_rows(tensors, o, out);
  const int64_t sequences = rows.grid.sequences;
  check(sequences > 0 || logprobs.numel() == 0, "offsets: expected values that rise from 0 to ",
        logprobs.numel(), ", got one value");
  constexpr int64_t kValues = sizeof(PolicyTotals) / sizeof(double);
  const Tensor totals =
      torch::stable::new_empty(logprobs, {sequences * kValues}, ScalarType::Double);

  const PolicyArgs args = {o, rows, static_cast<PolicyTotals*>(totals.data_ptr())};
  switch (o.surrogate) {
    case SurrogateKind::kClip:
      launch_sequences<SurrogateKind::kClip>(args, on.stream());
      break;
    case SurrogateKind::kCispo:
      launch_sequences<SurrogateKind::kCispo>(args, on.stream());
      break;
    case SurrogateKind::kSapo:
      launch_sequences<SurrogateKind::kSapo>(args, on.stream());
      break;
    case SurrogateKind::kGmpo:
      launch_sequences<SurrogateKind::kGmpo>(args, on.stream());
      break;
    case SurrogateKind::kVespo:
      launch_sequences<SurrogateKind::kVespo>(args, on.stream());
      break;
    case SurrogateKind::kDppoTv:
    case SurrogateKind::kDppoKl:
      launch_sequences<SurrogateKind::kDppoKl>(args, on.stream());
      break;
    case SurrogateKind::kReinforce:
      launch_sequences<SurrogateKind::kReinforce>(args, on.stream());
      break;
  }

  const PolicyFinishArgs finish = {o,
                                   args.totals,
                                   sequences,
                                   given_tensor(normalizer, logprobs, "normalizer"),
                                   given_tensor(num_sequences, logprobs, "num_sequences"),
                                   given_tensor(entropy_normalizer, logprobs, "entropy_normalizer"),
                                   static_cast<float*>(out.loss.data_ptr()),
                                   static_cast<double*>(out.metrics.data_ptr()),
                                   static_cast<float*>(out.scale.data_ptr())};
  policy_finish<<<1, kFinishThreads, 0, on.stream()>>>(finish);
  check_launch("policy_loss finish");
  return {out.loss, out.metrics, out.grad_logprobs, out.grad_entropy, out.scale};
}

std::array<Tensor, 2> scaled_gradients(const Tensor& grad_loss, const Tensor& scale,
                                       const std::array<Tensor, 2>& grads) {
  const OnDeviceOf on(grads[0]);
  const auto floats = [&](const Tensor& tensor, const char* name) {
    check(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous(), name,
          ": expected contiguous float32");
    check(tensor.is_cuda() && tensor.get_device_index() == grads[0].get_device_index(), name,
          ": expected the device of the others");
    return static_cast<const float*>(tensor.data_ptr());
  };
  check(grad_loss.numel() == 1, "grad_loss: expected one float32");
  const std::array<Tensor, 2> to = {torch::stable::new_empty(grads[0], grads[0].sizes()),
                                    torch::stable::new_empty(grads[1], grads[1].sizes())};
  PolicyScaleArgs args = {
      floats(grad_loss, "grad_loss"),
      floats(scale, "scale"),
      {floats(grads[0], "gradient"), floats(grads[1], "gradient")},
      {static_cast<float*>(to[0].data_ptr()), static_cast<float*>(to[1].data_ptr())},
      {grads[0].numel(), grads[1].numel()},
      true};
  for (int i = 0; i < 2; ++i) {
    args.aligned &= reinterpret_cast<uintptr_t>(args.from[i]) % sizeof(Pack) == 0;
    args.aligned &= reinterpret_cast<uintptr_t>(args.to[i]) % sizeof(Pack) == 0;
  }
  const int64_t vectors = scale_vectors(args, 0) + scale_vectors(args, 1);
  for_grids((vectors + kScaleThreads - 1) / kScaleThreads, kMaxBlocks,
            [&](unsigned blocks, int64_t first) {
              policy_scale<<<blocks, kScaleThreads, 0, on.stream()>>>(args, first);
            });
  check_launch("the gradients' scale");
  return to;
}

std::tuple<Tensor, Tensor> policy_loss_bwd_cuda(Tensor grad_loss, Tensor grad_logprobs,
                                                Tensor grad_entropy, Tensor scale) {
  check(scale.numel() == 2, "scale: expected what the forward pass returned");
  const auto to = scaled_gradients(grad_loss, scale, {grad_logprobs, grad_entropy});
  return {to[0], to[1]};
}

}  // namespace rlkern

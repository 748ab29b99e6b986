// Launches vocab_divergence on the current stream. Nothing waits for the GPU, and all memory comes
// from torch, so that a call can be captured into a CUDA graph.

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "launch.h"
#include "logit_launch.h"
#include "row_plan.h"
#include "vocab_divergence.cuh"
#include "vocab_divergence.h"

namespace rlkern {
namespace {

constexpr int64_t kState = sizeof(DivergenceState) / sizeof(float);

// The operator's arguments beside the two logits.
struct Given {
  const std::optional<Tensor>& mask;
  const std::optional<Tensor>& token_temperature;
  double temperature;
  std::optional<double> softcap;
  int64_t divergence;
  double beta;
};

void require_same(const Tensor& tensor, const Tensor& logits, const char* name) {
  bool same = tensor.dim() == logits.dim() && tensor.scalar_type() == logits.scalar_type() &&
              tensor.is_cuda() && tensor.get_device_index() == logits.get_device_index();
  for (int64_t d = 0; same && d < logits.dim(); ++d) same = tensor.size(d) == logits.size(d);
  check(same && (logits.size(logits.dim() - 1) == 1 || tensor.stride(tensor.dim() - 1) == 1), name,
        ": expected rows of consecutive values in the logits' shape and dtype on their device");
}

template <typename Type>
LogitPairs<Type> logit_pairs(const Tensor& logits, const Tensor& ref_logits, const Given& given) {
  using Scalar = typename Type::Scalar;
  LogitPairs<Type> rows;
  rows.grid = token_grid(logits, token_dims(logits), "logits");
  rows.vocab = logits.size(logits.dim() - 1);
  check(rows.vocab > 0, "logits: expected at least one value per row, got none");
  check(rows.vocab < (int64_t{1} << 31), "logits: expected fewer than 2^31 values per row, got ",
        rows.vocab);
  require_same(logits, logits, "logits");
  require_same(ref_logits, logits, "ref_logits");
  rows.x = static_cast<const Scalar*>(logits.data_ptr());
  rows.ref = static_cast<const Scalar*>(ref_logits.data_ptr());
  rows.ref_grid = token_grid(ref_logits, ref_logits.dim() - 1, "ref_logits");
  rows.mask = TokenView<const bool>(given.mask, logits, ScalarType::Bool, "mask");
  rows.token_temperature =
      TokenView<const float>(given.token_temperature, logits, ScalarType::Float, "temperature");
  check(given.temperature > 0, "temperature: expected a positive number, got ", given.temperature);
  rows.inv_temperature = static_cast<float>(1.0 / given.temperature);
  rows.softcap = softcap_or_none(given.softcap);
  check(given.divergence >= 0 && given.divergence < static_cast<int64_t>(Divergence::kCount),
        "divergence: expected 0, 1 or 2, got ", given.divergence);
  rows.kind = static_cast<Divergence>(given.divergence);
  check(rows.kind != Divergence::kJensenShannon || (given.beta > 0 && given.beta < 1),
        "beta: expected a number between 0 and 1, got ", given.beta);
  rows.beta = static_cast<float>(given.beta);
  return rows;
}

void gradient(const Tensor& grad_value, const Tensor& grad, const Tensor& logits,
              const Tensor& ref_logits, const Given& given, const Tensor& state) {
  const OnDeviceOf on(logits);
  with_type(logits, [&](auto type) {
    using Type = decltype(type);
    DivergenceGradientArgs<Type> args;
    args.rows = logit_pairs<Type>(logits, ref_logits, given);
    const int64_t rows = args.rows.grid.size();
    check(state.is_contiguous() && state.numel() == kState * rows &&
              state.scalar_type() == ScalarType::Float && state.is_cuda(),
          "state: expected what the forward pass returned");
    require_same(grad, logits, "grad");
    args.upstream = TokenView<const float>(grad_value, logits, ScalarType::Float, "grad_value");
    args.state = static_cast<const DivergenceState*>(state.data_ptr());
    args.grad = static_cast<typename Type::Scalar*>(grad.data_ptr());
    args.grad_grid = token_grid(grad, grad.dim() - 1, "grad");
    for_grids(rows, kMaxBlocks, [&](unsigned blocks, int64_t first) {
      divergence_backward<Type><<<blocks, kTokenThreads, 0, on.stream()>>>(args, first);
    });
    check_launch("vocab_divergence backward");
  });
}

}  // namespace

std::tuple<Tensor, Tensor> vocab_divergence_cuda(Tensor logits, Tensor ref_logits,
                                                 std::optional<Tensor> mask,
                                                 std::optional<Tensor> token_temperature,
                                                 double temperature, std::optional<double> softcap,
                                                 int64_t divergence, double beta) {
  const OnDeviceOf on(logits);
  std::vector<int64_t> sizes(logits.sizes().begin(), logits.sizes().begin() + token_dims(logits));
  Tensor value = torch::stable::new_empty(logits, sizes, ScalarType::Float);
  sizes.push_back(kState);
  Tensor state = torch::stable::new_empty(logits, sizes, ScalarType::Float);
  const Given given = {mask, token_temperature, temperature, softcap, divergence, beta};
  with_type(logits, [&](auto type) {
    using Type = decltype(type);
    DivergenceArgs<Type> args;
    args.rows = logit_pairs<Type>(logits, ref_logits, given);
    args.value = static_cast<float*>(value.data_ptr());
    args.state = static_cast<DivergenceState*>(state.data_ptr());
    for_grids(args.rows.grid.size(), kMaxBlocks, [&](unsigned blocks, int64_t first) {
      divergence_forward<Type><<<blocks, kTokenThreads, 0, on.stream()>>>(args, first);
    });
    check_launch("vocab_divergence forward");
  });
  return {value, state};
}

Tensor vocab_divergence_bwd_cuda(Tensor grad_value, Tensor logits, Tensor ref_logits,
                                 std::optional<Tensor> mask,
                                 std::optional<Tensor> token_temperature, double temperature,
                                 std::optional<double> softcap, int64_t divergence, double beta,
                                 Tensor state) {
  Tensor grad = torch::stable::new_empty(logits, logits.sizes());
  gradient(grad_value, grad, logits, ref_logits,
           {mask, token_temperature, temperature, softcap, divergence, beta}, state);
  return grad;
}

void vocab_divergence_bwd_into_cuda(Tensor grad_value, Tensor grad, Tensor logits,
                                    Tensor ref_logits, std::optional<Tensor> mask,
                                    std::optional<Tensor> token_temperature, double temperature,
                                    std::optional<double> softcap, int64_t divergence, double beta,
                                    Tensor state) {
  gradient(grad_value, grad, logits, ref_logits,
           {mask, token_temperature, temperature, softcap, divergence, beta}, state);
}

}  // namespace rlkern

// The kernels of csrc/cuda/policy_loss.cuh as a Python module that runs them on a CPU (shim.h).
// Launches as policy_loss.cu does, with the block sizes and the grid limit as arguments; tensors
// come as addresses and row strides.

#include "shim.h"
// The shim stands in for CUDA, so it comes first.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/policy_loss.cuh"
#include "cuda/value_loss.cuh"
#include "emulated_rows.h"

namespace py = pybind11;
using namespace rlkern;

namespace {

template <SurrogateKind kSurrogate>
void launch_sequences(const PolicyArgs& args, unsigned threads, int64_t max_blocks) {
  for_grids(args.rows.grid.sequences, max_blocks, [&](unsigned blocks, int64_t first) {
    shim_launch(blocks, threads, [&] { policy_sequences<kSurrogate>(args, first); });
  });
}

void forward(const Arguments& arguments, int64_t sequences, int64_t length,
             const std::vector<double>& options, uintptr_t totals, uintptr_t loss,
             uintptr_t metrics, uintptr_t scale, unsigned threads, unsigned finish_threads,
             int64_t max_blocks) {
  py::gil_scoped_release release;
  const PolicyOptions o = policy_options(options.data());
  PolicyRows rows;
  rows.grid = {sequences, length, pointer<const int64_t>(arguments, "offsets")};
  rows.logprobs = token_rows<const float>(arguments, "logprobs");
  rows.advantages = token_rows<const float>(arguments, "advantages");
  rows.sequence_advantages = pointer<const float>(arguments, "sequence_advantages");
  rows.mask = token_rows<const bool>(arguments, "mask");
  rows.old_logprobs = token_rows<const float>(arguments, "old_logprobs");
  rows.ref_logprobs = token_rows<const float>(arguments, "ref_logprobs");
  rows.rollout_logprobs = token_rows<const float>(arguments, "rollout_logprobs");
  rows.entropy = token_rows<const float>(arguments, "entropy");
  rows.token_weights = token_rows<const float>(arguments, "token_weights");
  rows.entropy_mask = token_rows<const bool>(arguments, "entropy_mask");
  rows.grad_logprobs = token_rows<float>(arguments, "grad_logprobs");
  rows.grad_entropy = token_rows<float>(arguments, "grad_entropy");
  const PolicyArgs args = {o, rows, reinterpret_cast<PolicyTotals*>(totals)};
  const auto launch = [&] {
    switch (o.surrogate) {
      case SurrogateKind::kClip:
        return launch_sequences<SurrogateKind::kClip>(args, threads, max_blocks);
      case SurrogateKind::kCispo:
        return launch_sequences<SurrogateKind::kCispo>(args, threads, max_blocks);
      case SurrogateKind::kSapo:
        return launch_sequences<SurrogateKind::kSapo>(args, threads, max_blocks);
      case SurrogateKind::kGmpo:
        return launch_sequences<SurrogateKind::kGmpo>(args, threads, max_blocks);
      case SurrogateKind::kVespo:
        return launch_sequences<SurrogateKind::kVespo>(args, threads, max_blocks);
      case SurrogateKind::kDppoTv:
      case SurrogateKind::kDppoKl:
        return launch_sequences<SurrogateKind::kDppoKl>(args, threads, max_blocks);
      case SurrogateKind::kReinforce:
        return launch_sequences<SurrogateKind::kReinforce>(args, threads, max_blocks);
    }
  };
  launch();
  const PolicyFinishArgs finish = {o,
                                   args.totals,
                                   sequences,
                                   pointer<const double>(arguments, "normalizer"),
                                   pointer<const double>(arguments, "num_sequences"),
                                   pointer<const double>(arguments, "entropy_normalizer"),
                                   reinterpret_cast<float*>(loss),
                                   reinterpret_cast<double*>(metrics),
                                   reinterpret_cast<float*>(scale)};
  shim_launch(1, finish_threads, [&] { policy_finish(finish); });
}

void backward(uintptr_t grad_loss, uintptr_t scale, const std::vector<Rows>& from,
              const std::vector<uintptr_t>& to, bool aligned, unsigned threads,
              int64_t max_blocks) {
  py::gil_scoped_release release;
  const auto floats = [&](int i) { return reinterpret_cast<const float*>(std::get<0>(from[i])); };
  const PolicyScaleArgs args = {reinterpret_cast<const float*>(grad_loss),
                                reinterpret_cast<const float*>(scale),
                                {floats(0), floats(1)},
                                {reinterpret_cast<float*>(to[0]), reinterpret_cast<float*>(to[1])},
                                {std::get<1>(from[0]), std::get<1>(from[1])},  // sizes
                                aligned};
  const int64_t vectors = scale_vectors(args, 0) + scale_vectors(args, 1);
  for_grids((vectors + threads - 1) / threads, max_blocks, [&](unsigned blocks, int64_t first) {
    shim_launch(blocks, threads, [&] { policy_scale(args, first); });
  });
}

void value(const Arguments& arguments, int64_t sequences, int64_t length,
           const std::vector<double>& options, uintptr_t totals, uintptr_t loss, uintptr_t metrics,
           uintptr_t scale, unsigned threads, unsigned finish_threads, int64_t max_blocks) {
  py::gil_scoped_release release;
  const ValueOptions o = value_options(options.data());
  ValueRows rows;
  rows.grid = {sequences, length, pointer<const int64_t>(arguments, "offsets")};
  rows.values = token_rows<const float>(arguments, "values");
  rows.returns = token_rows<const float>(arguments, "returns");
  rows.old_values = token_rows<const float>(arguments, "old_values");
  rows.mask = token_rows<const bool>(arguments, "mask");
  rows.grad_values = token_rows<float>(arguments, "grad_values");
  const ValueArgs args = {o, rows, reinterpret_cast<ValueTotals*>(totals)};
  for_grids(sequences, max_blocks, [&](unsigned blocks, int64_t first) {
    shim_launch(blocks, threads, [&] { value_sequences(args, first); });
  });
  const ValueFinishArgs finish = {o,
                                  args.totals,
                                  sequences,
                                  pointer<const double>(arguments, "normalizer"),
                                  pointer<const double>(arguments, "num_sequences"),
                                  reinterpret_cast<float*>(loss),
                                  reinterpret_cast<double*>(metrics),
                                  reinterpret_cast<float*>(scale)};
  shim_launch(1, finish_threads, [&] { value_finish(finish); });
}

void kl(int estimator, int clamp, int64_t size, uintptr_t logprobs, uintptr_t ref_logprobs,
        uintptr_t mask, uintptr_t upstream, uintptr_t out, unsigned threads) {
  py::gil_scoped_release release;
  const KlArgs args = {static_cast<KlEstimator>(estimator),
                       static_cast<KlClamp>(clamp),
                       size,
                       reinterpret_cast<const float*>(logprobs),
                       reinterpret_cast<const float*>(ref_logprobs),
                       reinterpret_cast<const bool*>(mask),
                       reinterpret_cast<const float*>(upstream),
                       reinterpret_cast<float*>(out)};
  const unsigned blocks = static_cast<unsigned>((size + threads - 1) / threads);
  shim_launch(blocks, threads, [&] { kl_tokens(args, 0); });
}

}  // namespace

PYBIND11_MODULE(_emulated_policy, m) {
  m.def("forward", &forward);
  m.def("backward", &backward);
  m.def("value", &value);
  m.def("kl", &kl);
  m.attr("VALUE_TOTALS") = static_cast<int>(kAllValueSums);
  m.attr("TOTALS") = sizeof(PolicyTotals) / sizeof(double);
  m.attr("CHAIN") = kTokenChain;
}

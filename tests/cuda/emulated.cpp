// The kernels of csrc/cuda as a Python module that runs them on a CPU (shim.h). Launches as
// token_logprobs.cu does, with the grid limit as an argument; tensors come as addresses and
// strides.

#include "shim.h"
// The shim stands in for CUDA, so it comes first.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/sum.cuh"
#include "cuda/token_logprobs.cuh"
#include "emulated_logits.h"

namespace py = pybind11;
using namespace rlkern;

namespace {

template <typename Type, bool kCapped, bool kEntropy>
void launch_forward(const ForwardArgs<Type>& args, const RowPlan& plan, int64_t max_blocks) {
  for_grids(args.rows.grid.size() * plan.slices, max_blocks, [&](unsigned blocks, int64_t first) {
    shim_launch(blocks, plan.threads,
                [&] { token_logprobs_forward<Type, kCapped, kEntropy>(args, first); });
  });
}

template <typename Type, bool kCapped, bool kSloped>
void launch_backward(const BackwardArgs<Type>& args, const RowPlan& plan, int64_t max_blocks) {
  for_grids(args.rows.grid.size() * plan.slices, max_blocks, [&](unsigned blocks, int64_t first) {
    shim_launch(blocks, plan.threads,
                [&] { token_logprobs_backward<Type, kCapped, kSloped>(args, first); });
  });
}

void forward(const Logits& logits, uintptr_t logprobs, uintptr_t entropy, uintptr_t state,
             uintptr_t parts) {
  py::gil_scoped_release release;
  with_type(logits.dtype, [&](auto type) {
    using Type = decltype(type);
    const RowPlan plan = plan_rows(logits.vocab, Type::kLanes);
    const ForwardArgs<Type> args{logit_rows<Type>(logits),
                                 plan.slices,
                                 plan.vectors_per_slice,
                                 reinterpret_cast<float*>(logprobs),
                                 reinterpret_cast<float*>(entropy),
                                 reinterpret_cast<float*>(state),
                                 reinterpret_cast<SoftmaxState<float>*>(parts)};
    if (logits.softcap > 0) {
      entropy ? launch_forward<Type, true, true>(args, plan, logits.max_blocks)
              : launch_forward<Type, true, false>(args, plan, logits.max_blocks);
    } else {
      entropy ? launch_forward<Type, false, true>(args, plan, logits.max_blocks)
              : launch_forward<Type, false, false>(args, plan, logits.max_blocks);
    }
    if (plan.slices == 1) return;
    const int64_t rows = args.rows.grid.size();
    constexpr int kThreads = 64;
    for_grids((rows + kThreads - 1) / kThreads, logits.max_blocks,
              [&](unsigned blocks, int64_t first) {
                shim_launch(blocks, kThreads,
                            [&] { token_logprobs_merge<Type>(args, first * kThreads, rows); });
              });
  });
}

void backward(const Logits& logits, const Span& grad_logprobs, const Span& grad_entropy,
              const Span& logprobs, const Span& entropy, uintptr_t state, const Span& grad) {
  py::gil_scoped_release release;
  with_type(logits.dtype, [&](auto type) {
    using Type = decltype(type);
    const RowPlan plan = plan_rows(logits.vocab, Type::kLanes);
    const BackwardArgs<Type> args{logit_rows<Type>(logits),
                                  plan.slices,
                                  plan.vectors_per_slice,
                                  token_span<const float>(logits, grad_logprobs),
                                  token_span<const float>(logits, grad_entropy),
                                  token_span<const float>(logits, logprobs),
                                  token_span<const float>(logits, entropy),
                                  reinterpret_cast<const float*>(state),
                                  reinterpret_cast<typename Type::Scalar*>(std::get<0>(grad)),
                                  grid(logits, grad)};
    const bool sloped = std::get<0>(grad_entropy) != 0;
    if (logits.softcap > 0) {
      sloped ? launch_backward<Type, true, true>(args, plan, logits.max_blocks)
             : launch_backward<Type, true, false>(args, plan, logits.max_blocks);
    } else {
      sloped ? launch_backward<Type, false, true>(args, plan, logits.max_blocks)
             : launch_backward<Type, false, false>(args, plan, logits.max_blocks);
    }
  });
}

void add_widened_to(const std::string& dtype, uintptr_t sum, uintptr_t part, int64_t size,
                    int64_t max_blocks) {
  py::gil_scoped_release release;
  with_type(dtype, [&](auto type) {
    using Type = decltype(type);
    const SumArgs<Type> args = {size, reinterpret_cast<float*>(sum),
                                reinterpret_cast<const typename Type::Scalar*>(part),
                                (sum | part) % 16 == 0};
    const int64_t values = sum_block_values<Type>();
    for_grids((size + values - 1) / values, max_blocks, [&](unsigned blocks, int64_t first) {
      shim_launch(blocks, kSumThreads, [&] { add_widened<Type>(args, first); });
    });
  });
}

// Every value of a 16-bit type there and back, and the rounding of a float.
template <typename Type>
uint32_t round_float(float x) {
  return Type::narrow(x);
}
template <typename Type>
float widen_bits(uint32_t bits) {
  return Type::widen(static_cast<typename Type::Scalar>(bits));
}

}  // namespace

PYBIND11_MODULE(_emulated, m) {
  bind_logits(m);
  m.def("forward", &forward);
  m.def("backward", &backward);
  m.def("add_widened", &add_widened_to);
  m.def("plan", [](int64_t vocab, int lanes) {
    const RowPlan plan = plan_rows(vocab, lanes);
    return std::make_tuple(plan.slices, plan.vectors_per_slice, plan.threads);
  });
  m.def("round_bfloat16", &round_float<BFloat16>);
  m.def("round_float16", &round_float<Float16>);
  m.def("widen_float16", &widen_bits<Float16>);
  m.def("softcap", [](float x, float cap) {
    const Softcap softcap(cap);
    return std::make_tuple(softcap.value(x), softcap.derivative(softcap.decay(x)));
  });
}

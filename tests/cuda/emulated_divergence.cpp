// The kernels of vocab_divergence as a Python module that runs them on a CPU (shim.h). Launches as
// vocab_divergence.cu does, with the block size and the grid limit as arguments; tensors come as
// addresses and the strides of their rows.

#include "shim.h"
// The shim stands in for CUDA, so it comes first.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>

#include "cuda/row_plan.h"
#include "cuda/vocab_divergence.cuh"

namespace py = pybind11;
using namespace rlkern;

namespace {

using Rows = std::tuple<uintptr_t, int64_t>;  // address, row stride

struct Pairs {
  std::string dtype;
  Rows x, ref;
  int64_t rows, vocab;
  uintptr_t mask, temperature;  // contiguous, or 0
  double number, softcap;
  int kind;
  double beta;
  unsigned threads;
  int64_t max_blocks;
};

TokenGrid grid(const Pairs& pairs, int64_t stride) { return {1, pairs.rows, 0, stride}; }

template <typename T>
TokenSpan<T> one_each(const Pairs& pairs, uintptr_t address) {
  return {grid(pairs, 1), reinterpret_cast<T*>(address)};
}

template <typename Type>
LogitPairs<Type> logit_pairs(const Pairs& pairs) {
  using Scalar = typename Type::Scalar;
  return {reinterpret_cast<const Scalar*>(std::get<0>(pairs.x)),
          reinterpret_cast<const Scalar*>(std::get<0>(pairs.ref)),
          grid(pairs, std::get<1>(pairs.x)),
          grid(pairs, std::get<1>(pairs.ref)),
          pairs.vocab,
          one_each<const bool>(pairs, pairs.mask),
          one_each<const float>(pairs, pairs.temperature),
          static_cast<float>(1.0 / pairs.number),
          static_cast<float>(pairs.softcap),
          static_cast<Divergence>(pairs.kind),
          static_cast<float>(pairs.beta)};
}

template <typename Run>
void with_type(const std::string& dtype, const Run& run) {
  if (dtype == "float32") run(Float32{});
  if (dtype == "float16") run(Float16{});
  if (dtype == "bfloat16") run(BFloat16{});
}

template <typename Kernel>
void launch(const Pairs& pairs, const Kernel& kernel) {
  for_grids(pairs.rows, pairs.max_blocks, [&](unsigned blocks, int64_t first) {
    shim_launch(blocks, pairs.threads, [&] { kernel(first); });
  });
}

void forward(const Pairs& pairs, uintptr_t value, uintptr_t state) {
  py::gil_scoped_release release;
  with_type(pairs.dtype, [&](auto type) {
    using Type = decltype(type);
    const DivergenceArgs<Type> args = {logit_pairs<Type>(pairs), reinterpret_cast<float*>(value),
                                       reinterpret_cast<DivergenceState*>(state)};
    launch(pairs, [&](int64_t first) { divergence_forward<Type>(args, first); });
  });
}

void backward(const Pairs& pairs, uintptr_t upstream, uintptr_t state, const Rows& grad) {
  py::gil_scoped_release release;
  with_type(pairs.dtype, [&](auto type) {
    using Type = decltype(type);
    const DivergenceGradientArgs<Type> args = {
        logit_pairs<Type>(pairs), one_each<const float>(pairs, upstream),
        reinterpret_cast<const DivergenceState*>(state),
        reinterpret_cast<typename Type::Scalar*>(std::get<0>(grad)),
        grid(pairs, std::get<1>(grad))};
    launch(pairs, [&](int64_t first) { divergence_backward<Type>(args, first); });
  });
}

}  // namespace

PYBIND11_MODULE(_emulated_divergence, m) {
  py::class_<Pairs>(m, "Pairs")
      .def(py::init([](std::string dtype, Rows x, Rows ref, int64_t rows, int64_t vocab,
                       uintptr_t mask, uintptr_t temperature, double number, double softcap,
                       int kind, double beta, unsigned threads, int64_t max_blocks) {
        return Pairs{dtype,  x,       ref,  rows, vocab,   mask,      temperature,
                     number, softcap, kind, beta, threads, max_blocks};
      }));
  m.def("forward", &forward);
  m.def("backward", &backward);
}

// Shows csrc/common to the tests, value by value, in double and in float.

#include <pybind11/pybind11.h>

#include <tuple>

#include "common/formulas.h"

namespace py = pybind11;
using namespace rlkern;

namespace {

template <typename T>
std::tuple<T, T, T> fold(const py::sequence& values) {
  auto state = softmax_empty<T>();
  for (const auto& v : values) state = softmax_fold<T>(state, v.cast<T>());
  return {state.max, state.sum, state.weighted};
}

template <typename T>
std::tuple<T, T, T> merge(std::tuple<T, T, T> a, std::tuple<T, T, T> b) {
  const auto s = softmax_merge<T>({std::get<0>(a), std::get<1>(a), std::get<2>(a)},
                                  {std::get<0>(b), std::get<1>(b), std::get<2>(b)});
  return {s.max, s.sum, s.weighted};
}

template <typename T>
std::tuple<T, T, T> logprob(std::tuple<T, T, T> others, T target) {
  const auto r =
      token_logprob<T>({std::get<0>(others), std::get<1>(others), std::get<2>(others)}, target);
  return {r.logprob, r.entropy, r.log_sum};
}

template <typename T>
std::tuple<T, T, T> gradient(T g, T h, T logprob, T entropy, T log_sum) {
  const auto r = token_gradient<T>(g, h, logprob, entropy, log_sum);
  return {r.constant, r.slope, r.target};
}

template <typename T>
void expose(py::module_ m) {
  m.def("softmax_fold", &fold<T>);
  m.def("softmax_merge", &merge<T>);
  m.def("token_logprob", &logprob<T>);
  m.def("token_gradient", &gradient<T>);
}

}  // namespace

PYBIND11_MODULE(_test_common, m) {
  expose<double>(m.def_submodule("f64"));
  expose<float>(m.def_submodule("f32"));
}

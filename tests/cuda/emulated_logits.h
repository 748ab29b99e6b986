// Rows of logits as Python hands them to the emulated kernels: addresses and strides.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>

#include "cuda/row_pass.cuh"

namespace rlkern {

using Span = std::tuple<uintptr_t, int64_t, int64_t>;  // address, outer stride, inner stride

struct Logits {
  std::string dtype;
  Span x;
  int64_t outer, inner, vocab;
  Span ids, mask, temperature;
  double number, softcap;
  int64_t max_blocks;
};

inline TokenGrid grid(const Logits& logits, const Span& span) {
  return {logits.outer, logits.inner, std::get<1>(span), std::get<2>(span)};
}

template <typename T>
TokenSpan<T> token_span(const Logits& logits, const Span& span) {
  return {grid(logits, span), reinterpret_cast<T*>(std::get<0>(span))};
}

template <typename Type>
LogitRows<Type> logit_rows(const Logits& logits) {
  using Scalar = typename Type::Scalar;
  return {reinterpret_cast<const Scalar*>(std::get<0>(logits.x)),
          grid(logits, logits.x),
          logits.vocab,
          token_span<const int64_t>(logits, logits.ids),
          token_span<const bool>(logits, logits.mask),
          token_span<const float>(logits, logits.temperature),
          static_cast<float>(1.0 / logits.number),
          static_cast<float>(logits.softcap)};
}

template <typename Run>
void with_type(const std::string& dtype, const Run& run) {
  if (dtype == "float32") run(Float32{});
  if (dtype == "float16") run(Float16{});
  if (dtype == "bfloat16") run(BFloat16{});
}

inline void bind_logits(pybind11::module_& m) {
  // For each module its own: pybind11 knows a type once for all of them.
  pybind11::class_<Logits>(m, "Logits", pybind11::module_local())
      .def(pybind11::init([](std::string dtype, Span x, int64_t outer, int64_t inner, int64_t vocab,
                             Span ids, Span mask, Span temperature, double number, double softcap,
                             int64_t max_blocks) {
        return Logits{dtype, x,           outer,  inner,   vocab,     ids,
                      mask,  temperature, number, softcap, max_blocks};
      }));
}

}  // namespace rlkern

// What the launchers of kernels over rows of logits share.
#pragma once

#include <type_traits>

#include "../common/token_view.h"
#include "row_pass.cuh"

namespace rlkern {

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

}  // namespace rlkern

// Rows of logits with what belongs to each, checked once for every operator that passes over them.
#pragma once

#include <cstdint>
#include <optional>

#include "../common/token_view.h"
#include "kernels/row_kernels.h"

namespace rlkern {

// Elements below which a second thread costs more than it brings.
constexpr int64_t kGrain = 16384;

// The id of a token whose logit stands in another process's columns: its log-probability is NaN,
// the rest of the row what it is.
constexpr int64_t kElsewhere = -(int64_t{1} << 62);

inline LogitType logit_type(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return LogitType::kFloat;
    case ScalarType::Half:
      return LogitType::kHalf;
    case ScalarType::BFloat16:
      return LogitType::kBFloat16;
    default:
      fail("logits: expected float32, float16 or bfloat16");
  }
}

// What forward and backward share: the logits' rows and the values that belong to each. Without
// token ids a row's target is its first value.
struct LogitRows {
  TokenGrid grid;
  LogitType type;
  int64_t element_size;
  char* data;
  int64_t vocab;
  TokenView<const int64_t> ids;
  TokenView<const bool> mask;
  TokenView<const float> token_temperature;
  float inv_temperature;
  float softcap;

  LogitRows(const Tensor& logits, const std::optional<Tensor>& token_ids,
            const std::optional<Tensor>& mask_, const std::optional<Tensor>& token_temperature_,
            double temperature, std::optional<double> softcap_)
      : grid(token_grid(logits, token_dims(logits), "logits")),
        type(logit_type(logits)),
        element_size(type == LogitType::kFloat ? 4 : 2),
        data(static_cast<char*>(logits.data_ptr())),
        vocab(logits.size(logits.dim() - 1)),
        ids(token_ids, logits, ScalarType::Long, "token_ids"),
        mask(mask_, logits, ScalarType::Bool, "mask"),
        token_temperature(token_temperature_, logits, ScalarType::Float, "temperature"),
        inv_temperature(static_cast<float>(1.0 / temperature)),
        softcap(softcap_or_none(softcap_)) {
    check(vocab > 0, "logits: expected at least one value per row, got none");
    check(vocab == 1 || logits.stride(logits.dim() - 1) == 1,
          "logits: expected rows of consecutive values, got a stride of ",
          logits.stride(logits.dim() - 1));
    check(temperature > 0, "temperature: expected a positive number, got ", temperature);
  }

  bool counts(int64_t token) const { return !mask || mask[token]; }
  void* row_data(int64_t token) const { return data + grid.offset(token) * element_size; }
  LogitRow row(int64_t token) const {
    const float inv = token_temperature ? 1.0f / token_temperature[token] : inv_temperature;
    const int64_t id = ids ? ids[token] : 0;
    return {row_data(token), vocab, id == kElsewhere ? -1 : id, inv, softcap};
  }
  int64_t grain() const { return kGrain / vocab + 1; }

  // Before anything is computed: an id read past its row would be a silent wrong number.
  void check_values(bool or_elsewhere) const {
    for (int64_t i = 0; i < grid.size(); ++i) {
      if (!counts(i)) continue;
      const int64_t id = ids ? ids[i] : 0;
      check((id >= 0 && id < vocab) || (or_elsewhere && id == kElsewhere),
            "token_ids: expected values in [0, ", vocab, "), got ", id, " at token ", i);
      check(!token_temperature || token_temperature[i] > 0,
            "temperature: expected positive values, got ",
            token_temperature ? token_temperature[i] : 0.0f, " at token ", i);
    }
  }
};

}  // namespace rlkern

// What the losses over sequences share on the CPU: a parallel sum in a fixed order, the scaled
// gradient, and values that have to be looked at.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "../common/policy_totals.h"
#include "../common/sequence_view.h"

namespace rlkern {

// Tokens below which a second thread costs more than it brings.
constexpr int64_t kTokenGrain = 16384;
// The same where a mask is all that is read.
constexpr int64_t kCountGrain = 1 << 20;
// Totals that are kept until they are added; long runs of short sequences share one.
constexpr int64_t kMaxRuns = 4096;

// Calls one(i, totals) for every sequence, in parallel over runs of them of `token_grain` tokens or
// more, and adds the runs' totals in order: the result does not depend on the number of threads.
template <typename Totals, typename One>
Totals over_sequences(const SequenceGrid& grid, int64_t tokens, int64_t token_grain, One one) {
  const int64_t run = grid.sequences / kMaxRuns + 1;
  const int64_t runs = (grid.sequences + run - 1) / run;
  const int64_t grain = tokens > 0 ? token_grain * runs / tokens + 1 : runs + 1;
  std::vector<Totals> totals(runs);
  torch::stable::parallel_for(0, runs, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      totals[r].clear();
      const int64_t last = (r + 1) * run < grid.sequences ? (r + 1) * run : grid.sequences;
      for (int64_t i = r * run; i < last; ++i) one(i, &totals[r]);
    }
  });
  Totals sum;
  sum.clear();
  for (const Totals& t : totals) sum.add(t);
  return sum;
}

// The packed sequences must lie inside the tensors: offsets are values, and nothing else bounds
// what is read.
inline void check_offsets(const SequenceGrid& grid) {
  if (grid.offsets == nullptr) return;
  bool rises = grid.sequences > 0 || (grid.offsets[0] == 0 && grid.length == 0);
  for (int64_t i = 0; i < grid.sequences; ++i) rises &= grid.is_sound(i);
  check(rises, "offsets: expected values that rise from 0 to ", grid.length);
}

// A denominator that came as a tensor, or else as a number.
inline double given_number(const std::optional<Tensor>& tensor, double number, const char* name) {
  if (!tensor.has_value()) return number;
  check(tensor->numel() == 1 && tensor->scalar_type() == ScalarType::Double, name,
        ": expected one float64");
  return *static_cast<const double*>(tensor->data_ptr());
}

// The tokens divide, and have to be counted.
inline bool counts_tokens(Aggregation aggregation, const GivenDenominators& given) {
  return aggregation == Aggregation::kTokenMean && !(given.normalizer == given.normalizer);
}

inline float upstream_factor(const Tensor& grad_loss, const Tensor& scale, int64_t place) {
  check(grad_loss.numel() == 1 && grad_loss.scalar_type() == ScalarType::Float,
        "grad_loss: expected one float32");
  check(scale.numel() > place && scale.scalar_type() == ScalarType::Float && scale.is_contiguous(),
        "scale: expected what the forward pass returned");
  return *static_cast<const float*>(grad_loss.data_ptr()) *
         static_cast<const float*>(scale.data_ptr())[place];
}

inline Tensor scaled(const Tensor& grad, float factor, const char* name) {
  check(grad.scalar_type() == ScalarType::Float && grad.is_contiguous(), name,
        ": expected what the forward pass returned");
  Tensor out = torch::stable::new_empty(grad, grad.sizes());
  const float* from = static_cast<const float*>(grad.data_ptr());
  float* to = static_cast<float*>(out.data_ptr());
  torch::stable::parallel_for(0, grad.numel(), kTokenGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) to[i] = from[i] * factor;
  });
  return out;
}

}  // namespace rlkern

// The kernels of the value loss, one block a sequence and one block that adds their totals, and of
// the KL penalty, one thread a token.
#pragma once

#include "../common/sequence_grid.h"
#include "../common/value_loss.h"
#include "block_sums.cuh"

namespace rlkern {

struct ValueRows {
  SequenceGrid grid;
  TokenRows<const float> values, returns, old_values;
  TokenRows<const bool> mask;
  TokenRows<float> grad_values;
};

struct ValueArgs {
  ValueOptions options;
  ValueRows rows;
  ValueTotals* totals;  // one per sequence
};

enum ValueSlot {
  kLossSlot,
  kClippedSlot,
  kValueSlot,
  kReturnSlot,
  kReturnSquaredSlot,
  kResidualSlot,
  kResidualSquaredSlot,
  kCountSlot,
  kValueSlots,
};

__global__ void __launch_bounds__(kTokenThreads, 4)
    value_sequences(const __grid_constant__ ValueArgs args, int64_t first_sequence) {
  __shared__ Slot slots[kValueSlots];
  const ValueOptions& o = args.options;
  const int64_t index = first_sequence + blockIdx.x;
  const SequenceSpan at = args.rows.grid.span(index);
  const float* values = args.rows.values.row(index, at);
  const float* returns = args.rows.returns.row(index, at);
  const float* old_values = args.rows.old_values.row(index, at);
  const bool* mask = args.rows.mask.row(index, at);
  float* grad_values = args.rows.grad_values.row(index, at);
  const bool mean = o.aggregation == Aggregation::kSeqMeanTokenMean;

  float chain[kValueSlots] = {};
  const auto flush = [&] { flush_chain(slots, chain); };
  double count = static_cast<double>(at.size);
  if (mean && mask != nullptr) {
    clear_slots(slots, 1, 0);
    float counted[1] = {};
    for_tokens(
        at.size, [&](int64_t i) { counted[0] += mask[i] ? 1.0f : 0.0f; },
        [&] { flush_chain(slots, counted); });
    reduce_slots(slots, 1, 1);
    count = slots[0][0];
    __syncthreads();  // all have read it before it is cleared
  }
  const double share = mean && count > 1 ? 1.0 / count : 1.0;
  clear_slots(slots, kValueSlots, 0);
  for_tokens(
      at.size,
      [&](int64_t i) {
        float slope = 0;
        if (mask == nullptr || mask[i]) {
          const float v = values[i], target = returns[i];
          const float old = old_values != nullptr ? old_values[i] : v;
          const ValueTerm<float> t = value_term(o.clip, v, old, target);
          chain[kLossSlot] += t.loss;
          chain[kClippedSlot] += t.clipped;
          chain[kValueSlot] += v;
          chain[kReturnSlot] += target;
          chain[kReturnSquaredSlot] += target * target;
          chain[kResidualSlot] += t.residual;
          chain[kResidualSquaredSlot] += t.residual * t.residual;
          chain[kCountSlot] += 1.0f;
          slope = static_cast<float>(share) * t.slope;
        }
        if (grad_values != nullptr) grad_values[i] = slope;
      },
      flush);
  reduce_slots(slots, kValueSlots, kValueSlots);
  if (threadIdx.x != 0) return;
  double* t = args.totals[index].sum;
  // As in policy_loss.cuh: value_finish sees it.
  t[kValueSequences] = args.rows.grid.is_sound(index) ? 1 : __builtin_nan("");
  t[kValueTokens] = slots[kCountSlot][0];
  t[kValueNonEmpty] = slots[kCountSlot][0] > 0;
  t[kValueLoss] = slots[kLossSlot][0] * share;
  t[kValueLossUnits] = 0;
  t[kValueClipped] = slots[kClippedSlot][0];
  t[kValue] = slots[kValueSlot][0];
  t[kReturn] = slots[kReturnSlot][0];
  t[kReturnSquared] = slots[kReturnSquaredSlot][0];
  t[kResidual] = slots[kResidualSlot][0];
  t[kResidualSquared] = slots[kResidualSquaredSlot][0];
}

struct ValueFinishArgs {
  ValueOptions options;
  const ValueTotals* totals;
  int64_t sequences;
  const double* normalizer;  // null: the options' number
  const double* num_sequences;
  float* loss;
  double* metrics;
  float* scale;
};

__global__ void __launch_bounds__(kFinishThreads)
    value_finish(const __grid_constant__ ValueFinishArgs args) {
  static_assert(kAllValueSums <= kLanes, "a lane for each value");
  __shared__ WarpSums of_warp;
  __shared__ ValueTotals totals;
  combine_rows(reinterpret_cast<const double*>(args.totals), args.sequences, kAllValueSums,
               kAllValueSums, of_warp, totals.sum);
  if (threadIdx.x != 0) return;
  const ValueOptions& o = args.options;
  const GivenDenominators given = {given_or(args.normalizer, o.normalizer),
                                   given_or(args.num_sequences, o.num_sequences),
                                   __builtin_nan("")};
  const ValueResult result = value_result(o, given, totals);
  const double sequences = totals.sum[kValueSequences];
  const double poison = sequences == sequences ? 0 : sequences;
  *args.loss = static_cast<float>(result.loss + poison);
  *args.scale = static_cast<float>(result.scale + poison);
#pragma unroll
  for (int i = 0; i < kValueSums; ++i) args.metrics[i] = result.metrics[i];
}

// ---- KL penalty -------------------------------------------------------------------------------

constexpr int kKlThreads = 256;

struct KlArgs {
  KlEstimator estimator;
  KlClamp clamp;
  int64_t size;
  const float* logprobs;
  const float* ref_logprobs;
  const bool* mask;
  const float* upstream;  // null: the estimator is written, else upstream times its slope
  float* out;
};

__global__ void __launch_bounds__(kKlThreads)
    kl_tokens(const __grid_constant__ KlArgs args, int64_t first_block) {
  const int64_t i = (first_block + blockIdx.x) * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i >= args.size) return;
  float result = 0;
  if (args.mask == nullptr || args.mask[i]) {
    const Kl<float> k =
        kl_estimate(args.estimator, args.clamp, args.ref_logprobs[i] - args.logprobs[i]);
    result = args.upstream != nullptr ? product(args.upstream[i], k.slope) : k.value;
  }
  args.out[i] = result;
}

}  // namespace rlkern

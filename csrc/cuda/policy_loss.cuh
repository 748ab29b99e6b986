// The kernels of the policy loss: one block a sequence for its terms, gradients and totals, one
// block that adds the totals of all sequences, and the backward's product.
//
// How the sums run, and how wrong they can be: block_sums.cuh.
#pragma once

#include "../common/policy_rows.h"
#include "../common/policy_sequence.h"
#include "block_sums.cuh"
#include "intrinsics.cuh"
#include "row_plan.h"

namespace rlkern {

// That fit on a multiprocessor: the sums of a token want 80 registers.
constexpr int kPolicyBlocks = 3;
constexpr int kScaleThreads = 256;

// ---- one sequence -----------------------------------------------------------------------------

// What follows the sums of TermSum (or BeforeSum) in a block's slots.
constexpr int kCounting = TermSum::kCount;  // tokens that count
constexpr int kRange = TermSum::kCount + 1;
constexpr int kSlots = kRange + 2;

struct PolicyArgs {
  PolicyOptions options;
  PolicyRows rows;
  PolicyTotals* totals;  // one per sequence
};

// Of a token that counts: what others hold may be anything, and is not read.
RLKERN_DEVICE PolicyInput<float> policy_input(const PolicySequence& s, int64_t i) {
  PolicyInput<float> in;
  in.logprob = s.logprobs[i];
  in.old = s.old_logprobs != nullptr ? s.old_logprobs[i] : in.logprob;
  in.ref = s.ref_logprobs != nullptr ? s.ref_logprobs[i] : 0.0f;
  in.rollout = s.rollout_logprobs != nullptr ? s.rollout_logprobs[i] : 0.0f;
  in.advantage = s.one_advantage ? s.advantage : s.advantages[i];
  in.weight = s.token_weights != nullptr ? s.token_weights[i] : 1.0f;
  return in;
}

RLKERN_DEVICE bool counts_token(const PolicySequence& s, int64_t i) {
  return s.mask == nullptr || s.mask[i] != 0;
}

// What is known of a sequence before its terms, the same for all threads.
struct SequenceBefore {
  SequenceState state;
  double length;  // 1 where nothing asks for it
};

template <SurrogateKind kSurrogate>
RLKERN_DEVICE void before_terms(const PolicyOptions& o, const PolicySequence& s, Slot* slots,
                                SequenceBefore* before) {
  const bool sums = o.needs_sums();
  const bool counts = s.mask != nullptr && o.aggregation == Aggregation::kSeqMeanTokenMean;
  if (!sums && !counts) {
    if (threadIdx.x == 0)
      *before = {sequence_defaults(), at_least_one(static_cast<double>(s.size))};
    __syncthreads();
    return;
  }
  constexpr int kCount = BeforeSum::kCount + 1;
  clear_slots(slots, kCount, 0);
  float chain[kCount] = {};
  for_tokens(
      s.size,
      [&](int64_t i) {
        if (!counts_token(s, i)) return;
        chain[BeforeSum::kCount] += 1.0f;
        if (!sums) return;
        add_before<kSurrogate>(o, s.rollout_logprobs != nullptr, true, policy_input(s, i), chain);
      },
      [&] { flush_chain(slots, chain); });
  reduce_slots(slots, kCount, kCount);
  if (threadIdx.x == 0) {
    double total[BeforeSum::kCount];
#pragma unroll
    for (int i = 0; i < BeforeSum::kCount; ++i) total[i] = slots[i][0];
    before->length = at_least_one(slots[BeforeSum::kCount][0]);
    before->state =
        sums ? sequence_state<kSurrogate>(o, before->length, total) : sequence_defaults();
  }
  __syncthreads();
}

template <SurrogateKind kSurrogate>
__global__ void __launch_bounds__(kTokenThreads, kPolicyBlocks)
    policy_sequences(const __grid_constant__ PolicyArgs args, int64_t first_sequence) {
  __shared__ Slot slots[kSlots];
  __shared__ SequenceBefore before;
  __shared__ PolicyTotals totals;
  const PolicyOptions& o = args.options;
  const int64_t index = first_sequence + blockIdx.x;
  const PolicySequence s = policy_sequence(args.rows, index);
  before_terms<kSurrogate>(o, s, slots, &before);
  const SequenceShares shares = sequence_shares<kSurrogate>(o, before.length);
  const bool has_ref = s.ref_logprobs != nullptr;

  clear_slots(slots, kRange, 0);
  clear_slots(slots + kRange, 2, -__builtin_inf());
  float chain[kRange] = {};
  RatioRange<float> range;
  for_tokens(
      s.size,
      [&](int64_t i) {
        const bool counts = counts_token(s, i);
        float grad = 0, grad_entropy = 0;
        if (counts) {
          chain[kCounting] += 1.0f;
          const PolicyTerm<float> t =
              policy_term<kSurrogate>(o, before.state, has_ref, policy_input(s, i));
          add_term<kSurrogate>(o, has_ref, true, t, chain, &range);
          if (s.grad_logprobs != nullptr) grad = term_gradient(o, shares, has_ref, true, t, chain);
          if (s.entropy != nullptr) {
            const float entropy = s.entropy[i];
            chain[TermSum::kEntropy] += entropy;
            if (o.entropy_coef != 0) {
              const bool chosen = s.entropy_mask == nullptr || s.entropy_mask[i] != 0;
              grad_entropy = add_bonus(o, shares, chosen, entropy, chain);
            }
          }
        }
        if (s.grad_logprobs != nullptr) s.grad_logprobs[i] = grad;
        if (s.grad_entropy != nullptr) s.grad_entropy[i] = grad_entropy;
      },
      [&] { flush_chain(slots, chain); });
  slots[kRange][threadIdx.x] = range.max;
  slots[kRange + 1][threadIdx.x] = range.minus_min;
  reduce_slots(slots, kRange, kSlots);

  if (threadIdx.x == 0) {
    double sum[TermSum::kCount];
#pragma unroll
    for (int i = 0; i < TermSum::kCount; ++i) sum[i] = slots[i][0];
    const RatioRange<float> ends = {static_cast<float>(slots[kRange][0]),
                                    static_cast<float>(slots[kRange + 1][0])};
    totals.clear();
    add_sequence<kSurrogate>(o, s.one_advantage, s.advantage, before.state, shares,
                             slots[kCounting][0], sum, ends, &totals);
    // policy_finish sees it, and takes the whole result for worthless.
    if (!args.rows.grid.is_sound(index)) totals.sum[kSequences] = __builtin_nan("");
  }
  if (o.coupled() && s.grad_logprobs != nullptr) {
    const float each = shared_gradient(o, before.length, slots[TermSum::kShared][0]);
    // Each thread adds to what itself wrote.
    for (int64_t i = threadIdx.x; i < s.size; i += blockDim.x) {
      if (counts_token(s, i)) s.grad_logprobs[i] += each;
    }
  }
  __syncthreads();
  constexpr unsigned kValues = sizeof(PolicyTotals) / sizeof(double);
  if (threadIdx.x < kValues) {
    reinterpret_cast<double*>(args.totals + index)[threadIdx.x] =
        reinterpret_cast<const double*>(&totals)[threadIdx.x];
  }
}

// ---- all sequences ----------------------------------------------------------------------------

struct PolicyFinishArgs {
  PolicyOptions options;
  const PolicyTotals* totals;
  int64_t sequences;
  const double* normalizer;  // null: the options' number
  const double* num_sequences;
  const double* entropy_normalizer;
  float* loss;
  double* metrics;
  float* scale;
};

__global__ void __launch_bounds__(kFinishThreads)
    policy_finish(const __grid_constant__ PolicyFinishArgs args) {
  constexpr int kValues = sizeof(PolicyTotals) / sizeof(double);
  static_assert(kValues <= kLanes, "a lane for each value");
  __shared__ WarpSums of_warp;
  __shared__ PolicyTotals totals;
  __shared__ PolicyResult result;
  combine_rows(reinterpret_cast<const double*>(args.totals), args.sequences, kValues,
               kAllPolicySums, of_warp, reinterpret_cast<double*>(&totals));
  if (threadIdx.x == 0) {
    const PolicyOptions& o = args.options;
    const GivenDenominators denominators = {
        given_or(args.normalizer, o.normalizer), given_or(args.num_sequences, o.num_sequences),
        given_or(args.entropy_normalizer, o.entropy_normalizer)};
    result = policy_result(o, denominators, totals);
    // Offsets that do not rise from 0 to the total: some tokens were in no sequence or in several.
    const double poison = totals.sum[kSequences] == totals.sum[kSequences] ? 0 : __builtin_nan("");
    *args.loss = static_cast<float>(result.loss + poison);
    args.scale[0] = static_cast<float>(result.scale + poison);
    args.scale[1] = static_cast<float>(result.entropy_scale + poison);
  }
  __syncthreads();
  if (threadIdx.x < static_cast<unsigned>(kPolicyMetrics)) {
    args.metrics[threadIdx.x] = result.metrics[threadIdx.x];
  }
}

// ---- backward ---------------------------------------------------------------------------------

struct PolicyScaleArgs {
  const float* grad_loss;
  const float* scale;  // of each tensor
  const float* from[2];
  float* to[2];
  int64_t size[2];
  bool aligned;  // to 16 bytes, all four
};

RLKERN_INLINE int64_t scale_vectors(const PolicyScaleArgs& args, int tensor) {
  return (args.size[tensor] + 3) / 4;
}

// Four values a thread, the second tensor's after the first one's.
__global__ void __launch_bounds__(kScaleThreads)
    policy_scale(const __grid_constant__ PolicyScaleArgs args, int64_t first_block) {
  int64_t vector = (first_block + blockIdx.x) * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  const bool second = vector >= scale_vectors(args, 0);
  if (second) vector -= scale_vectors(args, 0);
  const float* from = second ? args.from[1] : args.from[0];
  float* to = second ? args.to[1] : args.to[0];
  const int64_t size = second ? args.size[1] : args.size[0];
  const float factor = *args.grad_loss * args.scale[second ? 1 : 0];
  const int64_t begin = vector * 4;
  if (args.aligned && begin + 4 <= size) {
    Pack pack = load_pack_streamed(from + begin);
    for (uint32_t& word : pack.word) word = float_to_bits(bits_to_float(word) * factor);
    store_pack(to + begin, pack);
    return;
  }
  for (int64_t i = begin; i < begin + 4 && i < size; ++i) to[i] = from[i] * factor;
}

}  // namespace rlkern

// The kernels of policy_rows: a row of logits is folded, one thread works out the loss's gradient
// with respect to its log-probability, and the row's gradient is written, over the logits if asked.
//
// In a cluster of blocks the row lies in shared memory between the two walks: one read, one write.
// Elsewhere a block reads it twice.
#pragma once

#include "../common/policy_token.h"
#include "cluster.cuh"
#include "row_gradient.cuh"

namespace rlkern {

template <typename Type>
struct PolicyRowsArgs {
  LogitRows<Type> rows;
  PolicyOptions options;
  TokenInputs tokens;
  int64_t slices;  // of a row; in a cluster its blocks
  int64_t vectors_per_slice;
  float* logprobs;
  float* entropy;               // null where it is not asked for
  float* upstream;              // per row: with respect to the log-probability and to the entropy
  typename Type::Scalar* grad;  // may be the logits themselves
  TokenGrid grad_grid;
};

// What a row's sums need to know before the row is read.
template <typename Type>
struct RowStart {
  TokenIndex token;
  int64_t id;
  float scale;
  bool counts;
  bool reads;  // a row that does not count is not read, and one without a temperature is all NaN

  RLKERN_HD RowStart(const LogitRows<Type>& rows, int64_t row)
      : token(rows.grid.index(row)),
        id(rows.ids[token]),
        scale(rows.scale(token)),
        counts(rows.counts(token)),
        reads(counts && scale == scale) {}
};

// The chosen logit. Read before anything is written over the row.
template <typename Type>
RLKERN_INLINE float chosen_logit(const LogitRows<Type>& rows, const RowStart<Type>& start) {
  return Type::widen(rows.row(start.token)[left_out(start.id, rows.vocab)]);
}

// The gradient of a row, from the state of all its values but the chosen one's; `writes` what the
// row comes to. By one thread, since it is a chain of dependent loads and pages of arithmetic.
template <typename Type>
RLKERN_DEVICE RowGradient finish_policy_row(const PolicyRowsArgs<Type>& args, int64_t row,
                                            const RowStart<Type>& start, SoftmaxState<float> others,
                                            float chosen, bool writes) {
  const LogitRows<Type>& rows = args.rows;
  RowResult result = RowResult::filled(start.counts ? __builtin_nanf("") : 0.0f);
  TokenUpstream up = {0, 0};
  if (start.reads) {
    result = row_result(others, chosen, rows.softcap, start.scale, is_inside(start.id, rows.vocab));
  }
  if (start.counts) {
    const float entropy = args.entropy != nullptr ? result.entropy : 0.0f;
    up = token_upstream(args.options, token_input(args.tokens, row, result.logprob, entropy));
  }
  if (writes) {
    args.logprobs[row] = result.logprob;
    if (args.entropy != nullptr) args.entropy[row] = result.entropy;
    args.upstream[2 * row] = up.logprob;
    args.upstream[2 * row + 1] = up.entropy;
  }
  if (!start.counts) return RowGradient::filled(0);
  return gradient_of(result, up.logprob, up.entropy, start.scale, start.id);
}

template <typename Type, bool kCapped, bool kSloped>
RLKERN_DEVICE void write_gradient(const GradientSlice<Type>& slice, const RowGradient& gradient,
                                  float softcap) {
  if (!gradient.compute) {
    fill_slice(slice, gradient.constant, threadIdx.x, blockDim.x);
  } else {
    write_slice<Type, kCapped, kSloped>(slice, gradient, softcap, threadIdx.x, blockDim.x);
  }
}

// One block a row.
template <typename Type, bool kCapped, bool kEntropy>
__global__ void __launch_bounds__(kRowThreads)
    policy_rows_two_reads(const __grid_constant__ PolicyRowsArgs<Type> args, int64_t first_row) {
  __shared__ RowGradient shared;
  const LogitRows<Type>& rows = args.rows;
  const int64_t row = first_row + blockIdx.x;
  const RowStart<Type> start(rows, row);
  const typename Type::Scalar* const x = rows.row(start.token);
  SoftmaxState<float> state = softmax_empty<float>();
  float chosen = 0;
  if (start.reads) {
    const Slice<Type> slice(x, rows.vocab, 0, rows.vocab);
    const int target = slice.place(left_out(start.id, rows.vocab));
    state = fold_slice<Type, kCapped, kEntropy>(state, slice, target, start.scale, rows.softcap,
                                                threadIdx.x, blockDim.x);
    state = merge_block<kEntropy>(state, start.scale);
    if (threadIdx.x == 0) chosen = chosen_logit(rows, start);
  }
  if (threadIdx.x == 0) shared = finish_policy_row(args, row, start, state, chosen, true);
  // Every thread has read the row before any thread writes over it.
  __syncthreads();
  const RowGradient gradient = shared;
  const GradientSlice<Type> slice(x, args.grad + args.grad_grid.offset(start.token), rows.vocab, 0,
                                  1, args.vectors_per_slice);
  write_gradient<Type, kCapped, kEntropy>(slice, gradient, rows.softcap);
}

// One cluster a row, a block for each slice. Dynamic shared memory: a vector for the block's state,
// then its slice, as vectors of the row whatever the row's alignment.
template <typename Type, bool kCapped, bool kEntropy>
__global__ void __launch_bounds__(kRowThreads)
    policy_rows_cluster(const __grid_constant__ PolicyRowsArgs<Type> args, int64_t first_row) {
#if RLKERN_HAS_CLUSTERS
  __shared__ RowGradient shared;
  const LogitRows<Type>& rows = args.rows;
  const unsigned blocks = static_cast<unsigned>(args.slices), rank = cluster_rank();
  const int64_t row = first_row + blockIdx.x / blocks;
  const RowStart<Type> start(rows, row);
  Pack* const published = dynamic_shared();
  Pack* const kept = published + 1;
  const int64_t elements = args.vectors_per_slice * Type::kLanes;
  const int64_t first = rank * elements < rows.vocab ? rank * elements : rows.vocab;
  const Slice<Type> slice(rows.row(start.token), rows.vocab, first, first + elements);
  float chosen = 0;
  if (start.reads) {
    const int target = slice.place(left_out(start.id, rows.vocab) - first);
    SoftmaxState<float> state = fold_slice<Type, kCapped, kEntropy>(
        softmax_empty<float>(), slice, target, start.scale, rows.softcap, threadIdx.x, blockDim.x,
        [kept](int v, const Pack& vector) { store_pack(kept + v, vector); });
    state = merge_block<kEntropy>(state, start.scale);
    if (threadIdx.x == 0) {
      chosen = chosen_logit(rows, start);
      store_pack(published, {{float_to_bits(state.max), float_to_bits(state.sum),
                              float_to_bits(state.weighted), 0u}});
    }
  }
  // Every block has read its slice and the chosen logit, kept the one and published its state.
  cluster_arrive();
  cluster_wait();
  if (threadIdx.x < 32) {
    SoftmaxState<float> state = softmax_empty<float>();
    if (threadIdx.x < blocks && start.reads) {
      const Pack p = load_pack_of_rank(published, threadIdx.x);
      state = {bits_to_float(p.word[0]), bits_to_float(p.word[1]), bits_to_float(p.word[2])};
    }
    // The same in every block, to the bit: cheaper than to pass on what one of them found.
    state = merge_warp<kEntropy>(state, start.scale);
    if (threadIdx.x == 0) {
      shared = finish_policy_row(args, row, start, state, chosen, rank == 0);
    }
  }
  __syncthreads();
  cluster_arrive();  // this block has read its peers' shared memory
  RowGradient gradient = shared;
  gradient.id -= first;
  const GradientSlice<Type> out(reinterpret_cast<const typename Type::Scalar*>(kept),
                                args.grad + args.grad_grid.offset(start.token) + first, slice.count,
                                0, 1, args.vectors_per_slice);
  write_gradient<Type, kCapped, kEntropy>(out, gradient, rows.softcap);
  cluster_wait();  // and they have read this one's
#endif
}

}  // namespace rlkern

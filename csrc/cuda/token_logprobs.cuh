// The kernels of token_logprobs: one read of the logits forward, one read and one write backward.
#pragma once

#include "row_gradient.cuh"
#include "row_pass.cuh"

namespace rlkern {

// ---- forward ----------------------------------------------------------------------------------

template <typename Type>
struct ForwardArgs {
  LogitRows<Type> rows;
  int64_t slices;
  int64_t vectors_per_slice;
  float* logprobs;
  float* entropy;              // null where it is not asked for
  float* state;                // per row: maximum of y, log of the sum relative to it
  SoftmaxState<float>* parts;  // one per row and slice, where there is more than one slice
};

template <typename Type>
RLKERN_DEVICE void write_forward(const ForwardArgs<Type>& args, int64_t row, const RowResult& r) {
  args.logprobs[row] = r.logprob;
  if (args.entropy != nullptr) args.entropy[row] = r.entropy;
  args.state[2 * row] = r.max;
  args.state[2 * row + 1] = r.log_sum;
}

// Of a row that counts, from its merged state.
template <typename Type>
RLKERN_DEVICE void finish_row(const ForwardArgs<Type>& args, int64_t row, TokenIndex token,
                              SoftmaxState<float> others, float scale) {
  const LogitRows<Type>& rows = args.rows;
  const int64_t id = rows.ids[token];
  const float target = Type::widen(rows.row(token)[left_out(id, rows.vocab)]);
  write_forward(args, row,
                row_result(others, target, rows.softcap, scale, is_inside(id, rows.vocab)));
}

// One block per slice of a row; a row of one slice is finished here.
template <typename Type, bool kCapped, bool kEntropy>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerMultiprocessor)
    token_logprobs_forward(const ForwardArgs<Type> args, int64_t first_item) {
  const LogitRows<Type>& rows = args.rows;
  const SliceIndex at = slice_index(first_item + blockIdx.x, args.slices);
  const TokenIndex token = rows.grid.index(at.row);
  const bool counts = rows.counts(token);
  const float scale = rows.scale(token);
  if (!counts || scale != scale) {
    if (args.slices == 1 && threadIdx.x == 0) {
      write_forward(args, at.row, RowResult::filled(counts ? scale : 0.0f));
    }
    return;
  }
  const int64_t begin = at.slice * args.vectors_per_slice * Type::kLanes;
  const Slice<Type> slice(rows.row(token), rows.vocab, begin,
                          begin + args.vectors_per_slice * Type::kLanes);
  const int target = slice.place(left_out(rows.ids[token], rows.vocab) - begin);
  SoftmaxState<float> state = fold_slice<Type, kCapped, kEntropy>(
      softmax_empty<float>(), slice, target, scale, rows.softcap, threadIdx.x, blockDim.x);
  state = merge_block<kEntropy>(state, scale);
  if (threadIdx.x != 0) return;
  if (args.slices == 1) {
    finish_row(args, at.row, token, state, scale);
  } else {
    args.parts[at.row * args.slices + at.slice] = state;
  }
}

// Merges the slices of rows that have several, in order; one thread a row.
template <typename Type>
__global__ void __launch_bounds__(kMaxThreads)
    token_logprobs_merge(const ForwardArgs<Type> args, int64_t first_row, int64_t row_count) {
  const int64_t row = first_row + static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= row_count) return;
  const TokenIndex token = args.rows.grid.index(row);
  const bool counts = args.rows.counts(token);
  const float scale = args.rows.scale(token);
  if (!counts || scale != scale) {
    write_forward(args, row, RowResult::filled(counts ? scale : 0.0f));
    return;
  }
  const SoftmaxState<float>* parts = args.parts + row * args.slices;
  SoftmaxState<float> state = parts[0];
  for (int64_t i = 1; i < args.slices; ++i) state = softmax_merge(state, parts[i], scale);
  finish_row(args, row, token, state, scale);
}

// ---- backward ---------------------------------------------------------------------------------

template <typename Type>
struct BackwardArgs {
  LogitRows<Type> rows;
  int64_t slices;
  int64_t vectors_per_slice;
  TokenSpan<const float> grad_logprobs;
  TokenSpan<const float> grad_entropy;
  TokenSpan<const float> logprobs;
  TokenSpan<const float> entropy;
  const float* state;
  typename Type::Scalar* grad;  // may be the logits themselves
  TokenGrid grad_grid;
};

template <typename Type>
RLKERN_DEVICE RowGradient row_gradient(const BackwardArgs<Type>& args, int64_t row,
                                       TokenIndex token) {
  // All loads first: they wait for memory together, and the whole block waits for them.
  const bool counts = args.rows.counts(token);
  const float max = args.state[2 * row], log_sum = args.state[2 * row + 1];
  const float logprob = args.logprobs[token];
  const float g = args.grad_logprobs ? args.grad_logprobs[token] : 0.0f;
  const float h = args.grad_entropy ? args.grad_entropy[token] : 0.0f;
  const float entropy = args.entropy ? args.entropy[token] : 0.0f;
  const float scale = args.rows.scale(token);
  const int64_t id = args.rows.ids[token];
  if (!counts) return RowGradient::filled(0);
  return gradient_of({logprob, entropy, max, log_sum}, g, h, scale, id);
}

// One block per slice of a row. Slices are cut from the first 16-byte boundary of the gradient's
// row; the elements before it belong to the first slice, those after the last vector to the last.
template <typename Type, bool kCapped, bool kSloped>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerMultiprocessor)
    token_logprobs_backward(const BackwardArgs<Type> args, int64_t first_item) {
  __shared__ RowGradient shared;
  const SliceIndex at = slice_index(first_item + blockIdx.x, args.slices);
  const TokenIndex token = args.rows.grid.index(at.row);
  // One thread, since it is a chain of dependent loads and a page of arithmetic.
  if (threadIdx.x == 0) shared = row_gradient(args, at.row, token);
  __syncthreads();
  const RowGradient gradient = shared;
  const GradientSlice<Type> slice(args.rows.row(token), args.grad + args.grad_grid.offset(token),
                                  args.rows.vocab, at.slice, args.slices, args.vectors_per_slice);
  if (!gradient.compute) {
    fill_slice(slice, gradient.constant, threadIdx.x, blockDim.x);
  } else {
    write_slice<Type, kCapped, kSloped>(slice, gradient, args.rows.softcap, threadIdx.x,
                                        blockDim.x);
  }
}

}  // namespace rlkern

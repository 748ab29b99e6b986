// The kernels of vocab_divergence: a block takes a row of the policy's logits and one of the
// reference's. Forward reads both twice, for the sums of their exponentials and for the divergence,
// the second time from the second-level cache where the rows at work fit in; backward reads both
// once and writes the gradient, over one of them if asked to.
#pragma once

#include "../common/divergence.h"
#include "../common/token_grid.h"
#include "block_sums.cuh"
#include "row_slice.cuh"
#include "softcap.cuh"

namespace rlkern {

template <typename Type>
struct LogitPairs {
  using Scalar = typename Type::Scalar;
  const Scalar* x;
  const Scalar* ref;
  TokenGrid grid, ref_grid;
  int64_t vocab;
  TokenSpan<const bool> mask;
  TokenSpan<const float> token_temperature;
  float inv_temperature;
  float softcap;  // 0: none
  Divergence kind;
  float beta;

  RLKERN_HD bool counts(TokenIndex token) const { return !mask || mask[token]; }
  // NaN where the temperature is not a positive finite number.
  RLKERN_HD float scale(TokenIndex token) const {
    const float inv = token_temperature ? 1.0f / token_temperature[token] : inv_temperature;
    return inv > 0 && inv < __builtin_inff() ? inv : __builtin_nanf("");
  }
};

// A softcap, or none.
struct MaybeCap {
  bool capped;
  Softcap cap;

  RLKERN_HD explicit MaybeCap(float softcap) : capped(softcap > 0), cap(capped ? softcap : 1.0f) {}
  RLKERN_HD float value(float x) const { return capped ? cap.value(x) : x; }
  RLKERN_HD float derivative(float x) const { return capped ? cap.derivative(cap.decay(x)) : 1.0f; }
};

struct RunningSum {
  float max = -__builtin_inff();
  float sum = 0;
};

// exp((y - base) * scale) with k = scale / log 2.
RLKERN_INLINE float exp_below(float y, float base, float k) {
  return exp2_fast(mul(add(y, -base), k));
}

// The first `room` elements of a vector; those behind the row's end are -inf.
template <typename Type>
RLKERN_INLINE void fold_vector(const Pack& pack, int room, const MaybeCap& cap, float k,
                               RunningSum* run) {
  float y[Type::kLanes];
  Type::widen(pack, y);
  float max = run->max;
#pragma unroll
  for (int i = 0; i < Type::kLanes; ++i) {
    if (i < room) y[i] = cap.value(y[i]);
    max = larger(max, y[i]);
  }
  if (max > run->max) run->sum = mul(run->sum, exp_below(run->max, max, k));
  run->max = max;
  // Of a maximum of -inf no difference may be taken: the exponentials are 0 all the same.
  const float base = max == -__builtin_inff() ? 0.0f : max;
#pragma unroll
  for (int i = 0; i < Type::kLanes; ++i) run->sum = add(run->sum, exp_below(y[i], base, k));
}

// Two rows element by element, with what the state says of them.
struct PairTerms {
  Divergence kind;
  float beta, scale, k;
  MaybeCap cap;
  float max, inv_sum, ref_max, ref_inv_sum, shift, offset;

  template <typename Type>
  RLKERN_HD PairTerms(const LogitPairs<Type>& rows, const DivergenceState& s, float scale_)
      : kind(rows.kind),
        beta(rows.beta),
        scale(scale_),
        k(kLog2e * scale_),
        cap(rows.softcap),
        max(s.max),
        inv_sum(rl_exp(-s.log_sum)),
        ref_max(s.ref_max),
        ref_inv_sum(rl_exp(-s.ref_log_sum)),
        shift(divergence_shift(s.max, s.ref_max)),
        offset(s.offset) {}

  RLKERN_HD DivergenceTerms<float> at(float x, float ref) const {
    x = cap.value(x);
    ref = cap.value(ref);
    float t = add(mul(add(add(x, -shift), -ref), scale), -offset);
    // -inf - -inf: neither has it.
    if (x == -__builtin_inff() && ref == x) t = 0;
    const float larger =
        t >= 0 ? mul(exp_below(x, max, k), inv_sum) : mul(exp_below(ref, ref_max, k), ref_inv_sum);
    switch (kind) {
      case Divergence::kKl:
        return divergence_terms<Divergence::kKl>(larger, t, beta);
      case Divergence::kReverseKl:
        return divergence_terms<Divergence::kReverseKl>(larger, t, beta);
      default:
        return divergence_terms<Divergence::kJensenShannon>(larger, t, beta);
    }
  }

  // upstream * p (f - mean) with respect to the logit.
  RLKERN_HD float gradient(float x, float ref, float mean, float upstream) const {
    // What cannot be drawn has no gradient; of reverse KL it would be -q.
    if (x == -__builtin_inff()) return 0;
    const DivergenceTerms<float> terms = at(x, ref);
    const float g = mul(fused(-terms.p, mean, terms.slope), mul(upstream, scale));
    return mul(g, cap.derivative(x));
  }
};

template <typename Type>
struct DivergenceArgs {
  LogitPairs<Type> rows;
  float* value;
  DivergenceState* state;
};

template <typename Type>
__global__ void __launch_bounds__(kTokenThreads, 3)
    divergence_forward(const __grid_constant__ DivergenceArgs<Type> args, int64_t first_row) {
  __shared__ Slot slots[4];
  __shared__ DivergenceRowBegin begun;
  const LogitPairs<Type>& rows = args.rows;
  const int64_t row = first_row + blockIdx.x;
  const TokenIndex token = rows.grid.index(row);
  if (!rows.counts(token)) {
    if (threadIdx.x == 0) {
      args.value[row] = 0;
      args.state[row] = {0, 0, 0, 0, 0, 0};
    }
    return;
  }
  const float scale = rows.scale(token), k = kLog2e * scale;
  const Slice<Type> x(rows.x + rows.grid.offset(token), rows.vocab, 0, rows.vocab);
  const Slice<Type> ref(rows.ref + rows.ref_grid.offset(token), rows.vocab, 0, rows.vocab);
  const int vectors = (x.count + Type::kLanes - 1) / Type::kLanes;
  const int thread = threadIdx.x, threads = blockDim.x;

  const MaybeCap cap(rows.softcap);
  RunningSum of_x, of_ref;
  for (int v = thread; v < vectors; v += threads) {
    const int room = x.count - v * Type::kLanes;
    fold_vector<Type>(load_vector<Type, true>(x, v), room, cap, k, &of_x);
    fold_vector<Type>(load_vector<Type, true>(ref, v), room, cap, k, &of_ref);
  }
  // Sums first, as reduce_slots takes them; the maxima must be known before those.
  slots[2][thread] = of_x.max;
  slots[3][thread] = of_ref.max;
  reduce_slots(slots + 2, 0, 2);
  const float max = static_cast<float>(slots[2][0]), ref_max = static_cast<float>(slots[3][0]);
  slots[0][thread] = max == of_x.max ? of_x.sum : mul(of_x.sum, exp_below(of_x.max, max, k));
  slots[1][thread] =
      ref_max == of_ref.max ? of_ref.sum : mul(of_ref.sum, exp_below(of_ref.max, ref_max, k));
  reduce_slots(slots, 2, 2);
  if (thread == 0) {
    // Of nothing but -inf the sum is 0, and its logarithm is not asked for.
    const double sum = slots[0][0], ref_sum = slots[1][0];
    begun = divergence_begin(rows.kind, rows.beta, max, sum == 0 ? 0 : rl_log(sum), ref_max,
                             ref_sum == 0 ? 0 : rl_log(ref_sum), scale);
  }
  __syncthreads();
  double value = 0, mean = 0;
  if (!begun.settled) {
    const PairTerms pair(rows, begun.state, scale);
    for (int v = thread; v < vectors; v += threads) {
      float y[Type::kLanes], ref_y[Type::kLanes];
      Type::widen(load_vector<Type, false>(x, v), y);
      Type::widen(load_vector<Type, false>(ref, v), ref_y);
      float of_vector[2] = {};
#pragma unroll
      for (int i = 0; i < Type::kLanes; ++i) {
        // A cap would make numbers of what stands for the elements behind the row's end.
        if (v * Type::kLanes + i >= x.count) break;
        const DivergenceTerms<float> terms = pair.at(y[i], ref_y[i]);
        of_vector[0] = add(of_vector[0], terms.value);
        of_vector[1] = add(of_vector[1], terms.slope);
      }
      value += of_vector[0];
      mean += of_vector[1];
    }
  }
  slots[0][thread] = value;
  slots[1][thread] = mean;
  reduce_slots(slots, 2, 2);
  if (thread != 0) return;
  DivergenceState state = begun.state;
  if (!begun.settled) state.mean = static_cast<float>(slots[1][0]);
  args.value[row] = static_cast<float>(begun.settled ? begun.value : slots[0][0]);
  args.state[row] = state;
}

template <typename Type>
struct DivergenceGradientArgs {
  LogitPairs<Type> rows;
  TokenSpan<const float> upstream;
  const DivergenceState* state;
  typename Type::Scalar* grad;
  TokenGrid grad_grid;
};

template <typename Type>
__global__ void __launch_bounds__(kTokenThreads, 4)
    divergence_backward(const __grid_constant__ DivergenceGradientArgs<Type> args,
                        int64_t first_row) {
  using Scalar = typename Type::Scalar;
  constexpr int kLanes = Type::kLanes;
  const LogitPairs<Type>& rows = args.rows;
  const int64_t row = first_row + blockIdx.x;
  const TokenIndex token = rows.grid.index(row);
  const int thread = threadIdx.x, threads = blockDim.x;
  const DivergenceState state = args.state[row];
  Scalar* grad = args.grad + args.grad_grid.offset(token);
  const bool counts = rows.counts(token);
  const float upstream = counts ? args.upstream[token] : 0.0f;
  const DivergenceGradient kind = divergence_gradient(state, counts, upstream);
  if (kind != DivergenceGradient::kComputed) {
    const float fill = kind == DivergenceGradient::kZero ? 0.0f : __builtin_nanf("");
    for (int64_t j = thread; j < rows.vocab; j += threads) grad[j] = Type::narrow(fill);
    return;
  }
  const Scalar* x = rows.x + rows.grid.offset(token);
  const Scalar* ref = rows.ref + rows.ref_grid.offset(token);
  const PairTerms pair(rows, state, rows.scale(token));
  // Vectors are cut where the gradient's lie, so that a row under it is cut in the same places:
  // every thread reads of it what it writes, and nothing else.
  const unsigned past = static_cast<unsigned>(reinterpret_cast<uintptr_t>(grad) & 15u);
  int64_t head = static_cast<int64_t>((16u - past) % 16u / sizeof(Scalar));
  head = head < rows.vocab ? head : rows.vocab;
  const Slice<Type> of_x(x, rows.vocab, head, rows.vocab);
  const Slice<Type> of_ref(ref, rows.vocab, head, rows.vocab);
  const int vectors = of_x.count / kLanes;
  for (int v = thread; v < vectors; v += threads) {
    float y[kLanes], ref_y[kLanes];
    Type::widen(load_vector<Type, false>(of_x, v), y);
    Type::widen(load_vector<Type, false>(of_ref, v), ref_y);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) y[i] = pair.gradient(y[i], ref_y[i], state.mean, upstream);
    store_pack(grad + head + v * kLanes, Type::narrow(y));
  }
  const int single = static_cast<int>(head) + of_x.count % kLanes;
  for (int s = thread; s < single; s += threads) {
    const int64_t j = s < head ? s : s + static_cast<int64_t>(vectors) * kLanes;
    grad[j] =
        Type::narrow(pair.gradient(Type::widen(x[j]), Type::widen(ref[j]), state.mean, upstream));
  }
}

}  // namespace rlkern

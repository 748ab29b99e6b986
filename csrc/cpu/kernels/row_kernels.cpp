// The row pass over logits, compiled once per instruction set (see CMakeLists.txt).
//
// Forward reads a row once, in blocks that stay in the first-level cache: a block is widened to
// float and its maximum taken, then one exponential an element is summed relative to the running
// maximum. Backward reads the row once more and writes its gradient, over the row if asked to.

#include "row_kernels.h"

#include "leaf.h"
#include "row_values.h"

namespace rlkern {
namespace {

// 4 KiB of floats: small beside a 32 KiB first-level cache, long enough to hide its reductions.
constexpr long long kBlock = kRowBlock;
// Independent sums hide the latency of an addition, and keep rounding errors apart.
constexpr int kSums = 4;
constexpr long long kStep = kSums * kLanes;
// Elements between what the backward pass works on and what it asks memory for.
constexpr long long kAhead = 1024;
static_assert(kBlock % kStep == 0, "a block is a whole number of unrolled steps");
// Whether exponentials may lie in the row itself, of which there is nothing behind its end.
template <typename Type>
constexpr bool kFitsInRow = sizeof(typename Type::Scalar) == sizeof(float);

template <typename Type, bool kCapped>
RLKERN_INLINE float value_at(const typename Type::Scalar* x, long long j, const Cap& cap) {
  vfloat v = load_partial<Type>(x + j, 1);
  if (kCapped) v = cap.value(v);
  return v[0];
}

// Widens up to kBlock values into `values`, pair by pair (see slot), padded with -inf to a whole
// step; returns their maximum, which ignores NaN (the sums see it).
template <typename Type, bool kCapped>
RLKERN_INLINE float load_block(const typename Type::Scalar* x, long long count, const Cap& cap,
                               float* values) {
  vfloat best[kSums];
  for (int s = 0; s < kSums; ++s) best[s] = broadcast(-kInf);
  long long j = 0;
  const auto capped = [&](VectorPair v) __attribute__((always_inline)) {
    return kCapped ? VectorPair{cap.value(v.first), cap.value(v.second)} : v;
  };
  const auto raise = [&](int s, const VectorPair& v) __attribute__((always_inline)) {
    best[s] = max_drop_nan(best[s], v.first);
    best[s + 1] = max_drop_nan(best[s + 1], v.second);
  };
  for (; j + kStep <= count; j += kStep) {
    for (int s = 0; s < kSums; s += 2) {
      const VectorPair v = capped(Type::load_pair(x + j + s * kLanes));
      raise(s, v);
      FloatType::store_pair(values + j + s * kLanes, v);
    }
  }
  for (; j < count; j += kPair) {
    const long long rest = count - j < kPair ? count - j : kPair;
    FloatType::store_pair(values + j, capped(load_partial_pair<Type>(x + j, rest)));
    for (long long i = rest; i < kPair; ++i) values[slot<Type>(j + i)] = -kInf;
    raise(0, FloatType::load_pair(values + j));
  }
  for (; j % kStep != 0; j += kLanes) FloatType::store(values + j, broadcast(-kInf));
  return reduce_max(max_drop_nan(max_drop_nan(best[0], best[1]), max_drop_nan(best[2], best[3])));
}

// Asks for one step's elements, so that arithmetic hides their way from memory. Past the end of
// the row these are the next row's, or nothing: a prefetch cannot fault.
template <typename Scalar>
RLKERN_INLINE void prefetch_step(const Scalar* x) {
  for (long long j = 0; j < kStep; j += 64 / static_cast<long long>(sizeof(Scalar))) {
    __builtin_prefetch(x + j);
  }
}

// `kept` takes the exponentials where it is not null.
template <bool kEntropy, bool kKeep, typename Scalar>
RLKERN_INLINE void sum_block(const float* values, long long padded, float max, Exp2Scale scale,
                             const Scalar* next, float* kept, SoftmaxState<double>* state) {
  vfloat sum[kSums] = {}, weighted[kSums] = {};
  for (long long j = 0; j < padded; j += kStep) {
    prefetch_step(next + j);
    for (int s = 0; s < kSums; ++s) {
      const Exp2 e = exp2_scaled(FloatType::load(values + j + s * kLanes) - max, scale);
      const vfloat value = e.value();
      if (kKeep) FloatType::store(kept + j + s * kLanes, value);
      sum[s] += value;
      if (kEntropy) weighted[s] += e.clamped * value;
    }
  }
  state->sum += reduce_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
  if (kEntropy) {
    state->weighted += reduce_sum((weighted[0] + weighted[1]) + (weighted[2] + weighted[3]));
  }
}

template <typename Type, bool kCapped, bool kEntropy, bool kKeep>
void forward_row(const LogitRow& row, const RowKept& kept, RowForward* out) {
  const auto* x = static_cast<const typename Type::Scalar*>(row.x);
  const Cap cap(row.softcap);
  const Exp2Scale scale(kLog2e * row.inv_temperature);
  const double inv_temperature = row.inv_temperature;
  alignas(64) float values[kBlock];

  const float target = row.target < 0 ? -kInf : value_at<Type, kCapped>(x, row.target, cap);
  float max = target;
  SoftmaxState<double> state{0, 0, 0};  // its maximum stands in `max`: sums in units of y - max
  for (long long begin = 0; begin < row.size; begin += kBlock) {
    const long long count = row.size - begin < kBlock ? row.size - begin : kBlock;
    const float block_max = load_block<Type, kCapped>(x + begin, count, cap, values);
    if (block_max > max) {
      if (state.sum != 0) {
        const double shift = (double)max - (double)block_max;
        const double factor = rl_exp(shift * inv_temperature);
        state.weighted = factor == 0 ? 0 : (state.weighted + shift * state.sum) * factor;
        state.sum = factor == 0 ? state.sum * 0 : state.sum * factor;
      }
      max = block_max;
    }
    if (row.target >= begin && row.target < begin + count) {
      values[slot<Type>(row.target - begin)] = -kInf;
    }
    // A maximum of -inf has seen nothing but -inf, of which no difference may be taken, and NaN,
    // which must still reach the sum.
    const float base = max == -kInf ? 0.0f : max;
    // A detour for the last block of a row that ends at its end.
    constexpr bool kDetour = kKeep && kFitsInRow<Type>;
    alignas(64) float last[kDetour ? kBlock : 1];
    float* const place = kKeep ? kept.exponentials + begin : nullptr;
    const bool direct = !kDetour || count == kBlock;
    sum_block<kEntropy, kKeep>(values, (count + kStep - 1) / kStep * kStep, base, scale,
                               x + begin + kBlock, direct ? place : last, &state);
    if constexpr (kDetour) {
      if (!direct) __builtin_memcpy(place, last, count * sizeof(float));
    }
    if (kKeep) kept.maxima[begin / kBlock] = max;
  }
  out->others = {max * inv_temperature, state.sum, state.weighted * inv_temperature};
  out->target = ((double)target - (double)max) * inv_temperature;
  out->max = max;
}

template <typename Type, bool kKeep>
RLKERN_INLINE void forward_as_asked(const LogitRow& row, bool entropy, const RowKept& kept,
                                    RowForward* out) {
  if (row.softcap > 0) {
    entropy ? forward_row<Type, true, true, kKeep>(row, kept, out)
            : forward_row<Type, true, false, kKeep>(row, kept, out);
  } else {
    entropy ? forward_row<Type, false, true, kKeep>(row, kept, out)
            : forward_row<Type, false, false, kKeep>(row, kept, out);
  }
}

template <typename Type>
void forward(const LogitRow& row, bool entropy, RowForward* out) {
  forward_as_asked<Type, false>(row, entropy, {nullptr, nullptr}, out);
}

template <typename Type>
void forward_keeping(const LogitRow& row, bool entropy, const RowKept& kept, RowForward* out) {
  forward_as_asked<Type, true>(row, entropy, kept, out);
}

// Whether one of the first `count` values of a block is `wanted`.
template <typename Type>
RLKERN_INLINE bool holds(const float* values, long long count, float wanted) {
  vint found = {};
  const long long pairs = count / kPair * kPair;
  for (long long i = 0; i < pairs; i += kLanes) found |= FloatType::load(values + i) == wanted;
  bool any = false;
  for (int lane = 0; lane < kLanes; ++lane) any |= found[lane] != 0;
  for (long long i = pairs; i < count; ++i) any |= values[slot<Type>(i)] == wanted;
  return any;
}

template <typename Type, bool kCapped>
void outputs_row(const LogitRow& row, float max, RowOutputs* out) {
  const auto* x = static_cast<const typename Type::Scalar*>(row.x);
  const Cap cap(row.softcap);
  const Exp2Scale scale(2 * kLog2e * row.inv_temperature);
  const float base = max == -kInf ? 0.0f : max;
  alignas(64) float values[kBlock];
  const bool leads = row.target >= 0 && value_at<Type, kCapped>(x, row.target, cap) == max;
  *out = {0, 0, leads};
  for (long long begin = 0; begin < row.size; begin += kBlock) {
    const long long count = row.size - begin < kBlock ? row.size - begin : kBlock;
    load_block<Type, kCapped>(x + begin, count, cap, values);
    vfloat sum[kSums] = {}, squares[kSums] = {};
    long long j = 0;
    for (; j + kStep <= count; j += kStep) {
      for (int s = 0; s < kSums; ++s) {
        const vfloat v = FloatType::load(values + j + s * kLanes);
        sum[s] += v;
        squares[s] += exp2_scaled(v - base, scale).value();
      }
    }
    out->sum += reduce_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
    // The block is padded with -inf, which has no square and would be the sum.
    for (long long i = j; i < count; ++i) out->sum += values[slot<Type>(i)];
    for (; j < count; j += kLanes) {
      squares[0] += exp2_scaled(FloatType::load(values + j) - base, scale).value();
    }
    out->squares += reduce_sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
    // An equal one before the target leads instead of it.
    const long long before = row.target - begin < count ? row.target - begin : count;
    if (out->leads && before > 0) out->leads = !holds<Type>(values, before, max);
  }
}

template <typename Type>
void outputs(const LogitRow& row, float max, RowOutputs* out) {
  row.softcap > 0 ? outputs_row<Type, true>(row, max, out)
                  : outputs_row<Type, false>(row, max, out);
}

template <typename Type, bool kCapped, bool kSloped>
void backward_row(const LogitRow& row, const RowBackward& grad, void* out) {
  const auto* x = static_cast<const typename Type::Scalar*>(row.x);
  auto* dx = static_cast<typename Type::Scalar*>(out);
  const Cap cap(row.softcap);
  const Exp2Scale scale(kLog2e * row.inv_temperature);
  // p_j = exp(z_j - max - log_sum): as a shift of y the sum's logarithm costs nothing, but a
  // large maximum would swallow it. So it is a factor, and the maximum is taken off exactly.
  const float inv_sum = rl_exp(-grad.log_sum);
  const float max = grad.max;
  const float constant = plain_nan(grad.constant * row.inv_temperature * inv_sum);
  const float slope = plain_nan(grad.slope * row.inv_temperature * row.inv_temperature * inv_sum);

  const auto gradient = [&](vfloat v) __attribute__((always_inline)) {
    vfloat factor = broadcast(1.0f);
    if (kCapped) {
      factor = cap.derivative(v);
      v = cap.value(v);
    }
    const Exp2 e = exp2_scaled(v - max, scale);
    vfloat g = e.value() * (kSloped ? constant + slope * e.clamped : broadcast(constant));
    if (kCapped) g *= factor;
    return g;
  };

  float target_grad = plain_nan(grad.target * row.inv_temperature);
  // Read before the row is written over. A gradient of 0 stays 0 where the logit is not finite.
  if (kCapped && row.target >= 0 && target_grad != 0) {
    target_grad *= cap.derivative(load_partial<Type>(x + row.target, 1))[0];
  }
  long long j = 0;
  for (; j + kStep <= row.size; j += kStep) {
    prefetch_step(x + j + kAhead);
    for (int s = 0; s < kSums; s += 2) {
      const long long i = j + s * kLanes;
      const VectorPair v = Type::load_pair(x + i);
      Type::store_pair(dx + i, {gradient(v.first), gradient(v.second)});
    }
  }
  for (; j < row.size; j += kPair) {
    const long long rest = row.size - j < kPair ? row.size - j : kPair;
    const VectorPair v = load_partial_pair<Type>(x + j, rest);
    store_partial_pair<Type>(dx + j, {gradient(v.first), gradient(v.second)}, rest);
  }
  if (row.target >= 0) store_partial<Type>(dx + row.target, broadcast(target_grad), 1);
}

template <typename Type>
void backward(const LogitRow& row, const RowBackward& grad, void* out) {
  const bool sloped = grad.slope != 0;
  if (row.softcap > 0) {
    sloped ? backward_row<Type, true, true>(row, grad, out)
           : backward_row<Type, true, false>(row, grad, out);
  } else {
    sloped ? backward_row<Type, false, true>(row, grad, out)
           : backward_row<Type, false, false>(row, grad, out);
  }
}

// As backward_row without a cap, from the exponentials that forward kept.
template <typename Type, bool kSloped>
void backward_kept_row(const LogitRow& row, const RowBackward& grad, const RowKept& kept,
                       void* out) {
  const auto* x = static_cast<const typename Type::Scalar*>(row.x);
  auto* dx = static_cast<typename Type::Scalar*>(out);
  const Exp2Scale scale(kLog2e * row.inv_temperature);
  const float inv_sum = rl_exp(-grad.log_sum);
  const float constant = plain_nan(grad.constant * row.inv_temperature * inv_sum);
  const float slope = plain_nan(grad.slope * row.inv_temperature * row.inv_temperature * inv_sum);
  for (long long begin = 0; begin < row.size; begin += kBlock) {
    const long long end = begin + kBlock < row.size ? begin + kBlock : row.size;
    const float then = kept.maxima[begin / kBlock];
    // Nothing but -inf until then: every exponential is 0, and so is the factor, never 0 * inf.
    const float shift =
        then == -kInf ? 0.0f
                      : (float)rl_exp(((double)then - (double)grad.max) * row.inv_temperature);
    const auto gradient = [&](vfloat e, vfloat v) __attribute__((always_inline)) {
      e *= shift;
      if (!kSloped) return e * constant;
      // -inf has exponential 0, of which no slope may make NaN.
      const vfloat d = max_keep_nan(scale.low, v - grad.max);
      return e * (constant + slope * d);
    };
    const auto both = [&](const VectorPair& e, const VectorPair& v) __attribute__((always_inline)) {
      return VectorPair{gradient(e.first, v.first), gradient(e.second, v.second)};
    };
    const float* exponentials = kept.exponentials;
    long long j = begin;
    for (; j + kPair <= end; j += kPair) {
      const VectorPair v = kSloped ? Type::load_pair(x + j) : VectorPair{};
      Type::store_pair(dx + j, both(FloatType::load_pair(exponentials + j), v));
    }
    for (; j < end; j += kPair) {
      const VectorPair v = kSloped ? load_partial_pair<Type>(x + j, end - j) : VectorPair{};
      const long long there = kFitsInRow<Type> ? end - j : kPair;
      const VectorPair e = load_partial_pair<FloatType>(exponentials + j, there);
      store_partial_pair<Type>(dx + j, both(e, v), end - j);
    }
  }
  store_partial<Type>(dx + row.target, broadcast(plain_nan(grad.target * row.inv_temperature)), 1);
}

template <typename Type>
void backward_from_kept(const LogitRow& row, const RowBackward& grad, const RowKept& kept,
                        void* out) {
  // A cap's derivative takes an exponential of its own anyway.
  if (row.softcap > 0) return backward<Type>(row, grad, out);
  grad.slope != 0 ? backward_kept_row<Type, true>(row, grad, kept, out)
                  : backward_kept_row<Type, false>(row, grad, kept, out);
}

}  // namespace
}  // namespace rlkern

extern "C" const rlkern::RowKernels RLKERN_LEAF(rlkern_row_kernels) = {
    RLKERN_ISA_NAME,
    {rlkern::forward<rlkern::FloatType>, rlkern::forward<rlkern::HalfType>,
     rlkern::forward<rlkern::BFloat16Type>},
    {rlkern::backward<rlkern::FloatType>, rlkern::backward<rlkern::HalfType>,
     rlkern::backward<rlkern::BFloat16Type>},
    {rlkern::forward_keeping<rlkern::FloatType>, rlkern::forward_keeping<rlkern::HalfType>,
     rlkern::forward_keeping<rlkern::BFloat16Type>},
    {rlkern::backward_from_kept<rlkern::FloatType>, rlkern::backward_from_kept<rlkern::HalfType>,
     rlkern::backward_from_kept<rlkern::BFloat16Type>},
    {rlkern::outputs<rlkern::FloatType>, rlkern::outputs<rlkern::HalfType>,
     rlkern::outputs<rlkern::BFloat16Type>},
};

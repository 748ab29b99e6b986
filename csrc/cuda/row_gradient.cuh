// The row pass over logits, backward: the gradient of a row, written where the caller says, over
// the logits too. Every thread reads what it writes before it writes it, and nothing else.
#pragma once

#include "row_pass.cuh"

namespace rlkern {

// The gradient of a row of logits: p_j * (constant + slope * (y_j - max)), the target's whole; or
// one value for the whole row, whose logits are then not read.
struct RowGradient {
  bool compute;
  float max;
  float scale;
  float constant;
  float slope;
  float target;
  int64_t id;

  RLKERN_HD static RowGradient filled(float value) { return {false, 0, 1, value, 0, 0, 0}; }
  // p_j = exp(z_j - max - log_sum): a large maximum would swallow the sum's logarithm, so the
  // maximum is taken off exactly, and the sum is a factor.
  RLKERN_HD static RowGradient computed(const TokenGradient<float>& z, float max, float log_sum,
                                        float scale, int64_t id) {
    const float inv_sum = rl_exp(-log_sum);
    return {true,
            max,
            scale,
            z.constant * scale * inv_sum,
            z.slope * scale * scale * inv_sum,
            z.target * scale,
            id};
  }
};

// Of a row that counts, for upstream gradients g of its log-probability and h of its entropy.
RLKERN_INLINE RowGradient gradient_of(const RowResult& row, float g, float h, float scale,
                                      int64_t id) {
  if (row.log_sum != row.log_sum || row.logprob != row.logprob) {
    return RowGradient::filled(__builtin_nanf(""));
  }
  if (row.logprob == kMinusInf) g = 0;
  if ((g == 0 && h == 0) || row.max == kMinusInf) return RowGradient::filled(0);
  return RowGradient::computed(token_gradient(g, h, row.logprob, row.entropy, row.log_sum), row.max,
                               row.log_sum, scale, id);
}

// A slice of a row as the backward pass cuts it: whole vectors of the gradient, and for the first
// and the last slice up to a vector's worth of single elements.
template <typename Type>
struct GradientSlice {
  using Scalar = typename Type::Scalar;
  Slice<Type> source;
  Scalar* grad;   // of the slice's first vector
  int64_t begin;  // element of the row at which the first vector begins
  int vectors;
  int head;  // elements before the first vector
  int tail;  // elements after the last one

  RLKERN_HD GradientSlice(const Scalar* row, Scalar* grad_row, int64_t vocab, int64_t slice,
                          int64_t slices, int64_t vectors_per_slice)
      : GradientSlice(row, grad_row, vocab, head_of(grad_row, vocab), slice, slices,
                      vectors_per_slice) {}

 private:
  RLKERN_HD static int head_of(const Scalar* grad_row, int64_t vocab) {
    const unsigned past = static_cast<unsigned>(reinterpret_cast<uintptr_t>(grad_row) & 15u);
    const int head = static_cast<int>((16u - past) % 16u / sizeof(Scalar));
    return head < vocab ? head : static_cast<int>(vocab);
  }
  RLKERN_HD GradientSlice(const Scalar* row, Scalar* grad_row, int64_t vocab, int row_head,
                          int64_t slice, int64_t slices, int64_t vectors_per_slice)
      : source(row, vocab, row_head + clipped(slice, vocab, row_head, vectors_per_slice),
               row_head + clipped(slice + 1, vocab, row_head, vectors_per_slice)),
        begin(row_head + clipped(slice, vocab, row_head, vectors_per_slice)) {
    grad = grad_row + begin;
    vectors = source.count / Type::kLanes;
    head = slice == 0 ? row_head : 0;
    tail = slice == slices - 1 ? static_cast<int>((vocab - row_head) % Type::kLanes) : 0;
  }
  // Elements of whole vectors before a slice.
  RLKERN_HD static int64_t clipped(int64_t slice, int64_t vocab, int row_head, int64_t per_slice) {
    const int64_t whole = (vocab - row_head) / Type::kLanes;
    const int64_t v = slice * per_slice;
    return (v < whole ? v : whole) * Type::kLanes;
  }
};

template <typename Type>
RLKERN_INLINE void fill_slice(const GradientSlice<Type>& slice, float value, int thread,
                              int threads) {
  float x[Type::kLanes];
  for (int i = 0; i < Type::kLanes; ++i) x[i] = value;
  const Pack pack = Type::narrow(x);
  for (int v = thread; v < slice.vectors; v += threads) {
    store_pack(slice.grad + v * Type::kLanes, pack);
  }
  if (thread < slice.head) slice.grad[thread - slice.head] = Type::narrow(value);
  if (thread < slice.tail) {
    slice.grad[slice.vectors * Type::kLanes + thread] = Type::narrow(value);
  }
}

template <bool kCapped, bool kSloped>
struct GradientOf {
  float max;
  float constant;
  float slope;
  float target;
  Exponent exponent;
  Softcap cap;

  RLKERN_HD GradientOf(const RowGradient& row, float softcap)
      : max(row.max),
        constant(row.constant),
        slope(row.slope),
        target(row.target),
        exponent(row.scale),
        cap(kCapped ? softcap : 1.0f) {}

  RLKERN_HD float at(float x, bool is_target) const {
    const float decay = kCapped ? cap.decay(x) : 0.0f;
    const float d = add(kCapped ? cap.value(x, decay) : x, -max);
    const float p = exponent.of(d);
    float g = mul(p, kSloped ? fused(slope, exponent.clamped(d), constant) : constant);
    if (is_target) g = target;
    // A gradient of 0 stays 0 where the logit is not finite.
    return kCapped && g != 0 ? mul(g, cap.derivative(decay)) : g;
  }
};

template <typename Type, bool kCapped, bool kSloped>
RLKERN_INLINE void write_slice(const GradientSlice<Type>& slice, const RowGradient& row,
                               float softcap, int thread, int threads) {
  constexpr int kLanes = Type::kLanes;
  const GradientOf<kCapped, kSloped> gradient(row, softcap);
  // The target as an element counted from the first vector; far away where it is elsewhere.
  const int64_t offset = row.id - slice.begin;
  const int target =
      offset >= -kLanes && offset < slice.source.count + kLanes ? static_cast<int>(offset) : -1024;
  for (int v = thread; v < slice.vectors; v += kUnroll * threads) {
    Pack raw[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      raw[u] = load_vector<Type, false>(slice.source, v + u * threads);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int begin = (v + u * threads) * kLanes;
      if (v + u * threads >= slice.vectors) break;
      float x[kLanes];
      Type::widen(raw[u], x);
      if (static_cast<unsigned>(target - begin) < static_cast<unsigned>(kLanes)) {
#pragma unroll
        for (int i = 0; i < kLanes; ++i) x[i] = gradient.at(x[i], begin + i == target);
      } else {
#pragma unroll
        for (int i = 0; i < kLanes; ++i) x[i] = gradient.at(x[i], false);
      }
      store_pack(slice.grad + begin, Type::narrow(x));
    }
  }
  if (thread < slice.head + slice.tail) {
    const int j =
        thread < slice.head ? thread - slice.head : slice.vectors * kLanes + thread - slice.head;
    slice.grad[j] = Type::narrow(gradient.at(Type::widen(slice.source.x[j]), j == target));
  }
}

}  // namespace rlkern

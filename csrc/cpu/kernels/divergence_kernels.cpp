// The divergence between two rows of logits and its gradient, compiled once per instruction set
// (see CMakeLists.txt). Two exponentials an element: the larger of p and q, and the ratio of both.

#include "leaf.h"
#include "row_values.h"
#include "simd_log.h"

// After those, whose overloads the formulas are to find.
#include "divergence_kernels.h"

namespace rlkern {
namespace {

// In fp32 no longer than this, then in double.
constexpr long long kBlock = kRowBlock;
// Independent chains, which hide the latency of an element's arithmetic.
constexpr int kChains = 2;

// One vector of both rows: values, and the terms of the divergence.
template <typename Type, bool kCapped, Divergence kKind>
struct Elements {
  typedef typename Type::Scalar Scalar;
  const DivergenceRow& row;
  const Scalar* x;
  const Scalar* ref;
  Cap cap;
  Exp2Scale scale;

  explicit __attribute__((always_inline)) Elements(const DivergenceRow& r)
      : row(r),
        x(static_cast<const Scalar*>(r.x)),
        ref(static_cast<const Scalar*>(r.ref)),
        cap(r.softcap),
        scale(kLog2e * r.inv_temperature) {}

  __attribute__((always_inline)) vfloat capped(vfloat v) const {
    return kCapped ? cap.value(v) : v;
  }

  // `count` below kLanes leaves the rest without probability.
  __attribute__((always_inline)) DivergenceTerms<vfloat> at(long long j, long long count,
                                                            vfloat* raw) const {
    vfloat y, ref_y;
    if (count >= kLanes) {
      *raw = Type::load(x + j);
      y = capped(*raw);
      ref_y = capped(Type::load(ref + j));
    } else {
      *raw = load_partial<Type>(x + j, count);
      y = capped(*raw);
      ref_y = capped(load_partial<Type>(ref + j, count));
      for (long long i = count; i < kLanes; ++i) y[i] = ref_y[i] = -kInf;
    }
    vfloat t = ((y - row.shift) - ref_y) * row.inv_temperature - row.offset;
    // -inf - -inf: neither has it.
    t = ((y == -kInf) & (ref_y == -kInf)) ? vfloat{} : t;
    const vint rises = t >= 0.0f;
    const vfloat below = rises ? y - row.max : ref_y - row.ref_max;
    const vfloat inv_sum = rises ? broadcast(row.inv_sum) : broadcast(row.ref_inv_sum);
    return divergence_terms<kKind>(exp2_scaled(below, scale).value() * inv_sum, t, row.beta);
  }
};

template <typename Type, bool kCapped, Divergence kKind>
RLKERN_INLINE void sums_of_row(const DivergenceRow& row, DivergenceSums* out) {
  const Elements<Type, kCapped, kKind> elements(row);
  *out = {0, 0};
  for (long long begin = 0; begin < row.size; begin += kBlock) {
    const long long end = begin + kBlock < row.size ? begin + kBlock : row.size;
    vfloat value[kChains] = {}, slope[kChains] = {};
    vfloat raw;
    long long j = begin;
    for (; j + kChains * kLanes <= end; j += kChains * kLanes) {
      for (int c = 0; c < kChains; ++c) {
        const auto terms = elements.at(j + c * kLanes, kLanes, &raw);
        value[c] += terms.value;
        slope[c] += terms.slope;
      }
    }
    for (; j < end; j += kLanes) {
      const auto terms = elements.at(j, end - j, &raw);
      value[0] += terms.value;
      slope[0] += terms.slope;
    }
    out->value += reduce_sum(value[0] + value[1]);
    out->mean += reduce_sum(slope[0] + slope[1]);
  }
}

template <typename Type, bool kCapped, Divergence kKind>
RLKERN_INLINE void gradient_of_row(const DivergenceRow& row, float mean, float upstream,
                                   void* out) {
  auto* dx = static_cast<typename Type::Scalar*>(out);
  const Elements<Type, kCapped, kKind> elements(row);
  const float factor = plain_nan(upstream * row.inv_temperature);
  const auto gradient = [&](long long j, long long count) __attribute__((always_inline)) {
    vfloat raw;
    const auto terms = elements.at(j, count, &raw);
    vfloat g = (terms.slope - terms.p * mean) * factor;
    if (kCapped) g *= elements.cap.derivative(raw);
    // What cannot be drawn has no gradient; of reverse KL it would be -q.
    return raw == -kInf ? vfloat{} : g;
  };
  long long j = 0;
  for (; j + kLanes <= row.size; j += kLanes) Type::store(dx + j, gradient(j, kLanes));
  if (j < row.size) store_partial<Type>(dx + j, gradient(j, row.size - j), row.size - j);
}

template <Divergence kKind, typename Type>
void sums(const DivergenceRow& row, DivergenceSums* out) {
  row.softcap > 0 ? sums_of_row<Type, true, kKind>(row, out)
                  : sums_of_row<Type, false, kKind>(row, out);
}

template <Divergence kKind, typename Type>
void gradient(const DivergenceRow& row, float mean, float upstream, void* grad) {
  row.softcap > 0 ? gradient_of_row<Type, true, kKind>(row, mean, upstream, grad)
                  : gradient_of_row<Type, false, kKind>(row, mean, upstream, grad);
}

}  // namespace
}  // namespace rlkern

#define RLKERN_OF_TYPES(function, kind)                                                 \
  {rlkern::function<kind, rlkern::FloatType>, rlkern::function<kind, rlkern::HalfType>, \
   rlkern::function<kind, rlkern::BFloat16Type>}
#define RLKERN_OF_KINDS(function)                             \
  {RLKERN_OF_TYPES(function, rlkern::Divergence::kKl),        \
   RLKERN_OF_TYPES(function, rlkern::Divergence::kReverseKl), \
   RLKERN_OF_TYPES(function, rlkern::Divergence::kJensenShannon)}

extern "C" const rlkern::DivergenceKernels RLKERN_LEAF(rlkern_divergence_kernels) = {
    RLKERN_ISA_NAME,
    RLKERN_OF_KINDS(sums),
    RLKERN_OF_KINDS(gradient),
};

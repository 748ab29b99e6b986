// The value loss over one sequence and the KL penalty over any tokens, compiled once per
// instruction set (see CMakeLists.txt).

// clang-format off: the formulas find the vectors' exp and log by their declarations before them.
#include "token_blocks.h"
#include "value_kernels.h"
// clang-format on
#include "leaf.h"

namespace rlkern {
namespace {

void count(const ValueSequence& s, ValueTotals* out) {
  const long long tokens = count_both(s.mask, nullptr, s.size);
  out->sum[kValueTokens] += (double)tokens;
  out->sum[kValueSequences] += 1;
  out->sum[kValueNonEmpty] += tokens > 0;
}

void value(const ValueOptions& o, const ValueSequence& s, float scale, ValueTotals* out) {
  const long long count = count_both(s.mask, nullptr, s.size);
  const bool mean = o.aggregation == Aggregation::kSeqMeanTokenMean;
  const double share = mean && count > 1 ? 1.0 / (double)count : 1.0;
  const float of_gradient = (float)share * scale;
  enum { kLossSum, kClippedSum, kV, kR, kRSquared, kE, kESquared, kCount };
  Sums<kCount> sums;
  const auto terms = [&](const auto& block) __attribute__((always_inline)) {
    const vfloat v = block.load(s.values), target = block.load(s.returns);
    const vfloat old = s.old_values != nullptr ? block.load(s.old_values) : v;
    const ValueTerm<vfloat> t = value_term(o.clip, v, old, target);
    sums.chain[kLossSum] += t.loss;
    sums.chain[kClippedSum] += t.clipped;
    sums.chain[kV] += v;
    sums.chain[kR] += target;
    sums.chain[kRSquared] += target * target;
    sums.chain[kE] += t.residual;
    sums.chain[kESquared] += t.residual * t.residual;
    if (s.grad_values != nullptr) block.store(s.grad_values, of_gradient * t.slope);
  };
  for_blocks(s, &sums, terms, s.grad_values);
  double* t = out->sum;
  t[kValueTokens] += (double)count;
  t[kValueSequences] += 1;
  t[kValueNonEmpty] += count > 0;
  t[kValueLoss] += sums.total(kLossSum) * share;
  t[kValueClipped] += sums.total(kClippedSum);
  t[kValue] += sums.total(kV);
  t[kReturn] += sums.total(kR);
  t[kReturnSquared] += sums.total(kRSquared);
  t[kResidual] += sums.total(kE);
  t[kResidualSquared] += sums.total(kESquared);
}

void kl(KlEstimator estimator, KlClamp clamp, const KlTokens& s) {
  Sums<1> none;
  const auto estimate = [&](const auto& block) __attribute__((always_inline)) {
    const vfloat x = block.load(s.ref_logprobs) - block.load(s.logprobs);
    const Kl<vfloat> k = kl_estimate(estimator, clamp, x);
    const vfloat result =
        s.upstream != nullptr ? product(block.load(s.upstream), k.slope) : k.value;
    block.store(s.out, block.counts ? result : vfloat{});
  };
  for_blocks(s, &none, estimate, s.out);
}

}  // namespace
}  // namespace rlkern

extern "C" const rlkern::ValueKernels RLKERN_LEAF(rlkern_value_kernels) = {
    rlkern::value,
    rlkern::count,
    rlkern::kl,
};

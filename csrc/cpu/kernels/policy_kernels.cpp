// A policy loss over one sequence, compiled once per instruction set (see CMakeLists.txt).
//
// At most three walks over the sequence, which stays in the cache: sums that the terms need (only
// for losses that have a sequence's ratio or weight), the terms with gradient and metrics, and,
// where the tokens share a ratio, its gradient. Sums run in floats over chains of at most
// kChain vectors, then in doubles, in an order that depends on the sequence's length alone.

#include "policy_kernels.h"

// clang-format off: the formulas find the vectors' exp and log by their declarations before them.
#include "token_blocks.h"
#include "../../common/policy_formulas.h"
// clang-format on

namespace rlkern {
namespace {

template <typename Block>
RLKERN_INLINE PolicyInput<vfloat> policy_input(const PolicySequence& s, const Block& block) {
  PolicyInput<vfloat> in;
  in.logprob = block.load(s.logprobs);
  in.old = s.old_logprobs != nullptr ? block.load(s.old_logprobs) : in.logprob;
  in.ref = s.ref_logprobs != nullptr ? block.load(s.ref_logprobs) : vfloat{};
  in.rollout = s.rollout_logprobs != nullptr ? block.load(s.rollout_logprobs) : vfloat{};
  const vfloat same = vfloat{} + s.advantage;
  in.advantage =
      s.advantages != nullptr ? block.load(s.advantages) : (block.counts ? same : vfloat{});
  in.weight = s.token_weights != nullptr ? block.load(s.token_weights)
                                         : (block.counts ? vfloat{} + 1.0f : vfloat{});
  return in;
}

// ---- what the terms need to know of the whole sequence -----------------------------------------

template <SurrogateKind kSurrogate>
SequenceState sequence_state(const PolicyOptions& o, const PolicySequence& s, double length,
                             double* gmpo_loss) {
  SequenceState state = sequence_defaults();
  *gmpo_loss = 0;
  if (!o.needs_sums()) return state;
  constexpr bool kGmpo = kSurrogate == SurrogateKind::kGmpo;
  constexpr bool kVespo = kSurrogate == SurrogateKind::kVespo;
  enum { kD, kCorrection, kDrift, kLogWeight, kClipped, kWeight, kAdvantage, kCount };
  Sums<kCount> sums;
  for_blocks(s, &sums, [&](const auto& block) __attribute__((always_inline)) {
    const PolicyInput<vfloat> in = policy_input(s, block);
    const vfloat d = in.logprob - in.old;
    sums.chain[kD] += kVespo ? clamped(d, -o.log_ratio_clamp, o.log_ratio_clamp) : d;
    const vfloat e = or_zero(in.old - in.rollout);
    if (o.sequence_correction()) sums.chain[kCorrection] += e;
    if (o.off_policy()) {
      const vfloat sampler = s.rollout_logprobs != nullptr ? in.rollout : in.old;
      sums.chain[kDrift] += or_zero(sampler - in.logprob);
    }
    if ((kGmpo || kVespo) && o.correction == CorrectionLevel::kToken) {
      vfloat log_weight = rl_log(rollout_weight_of(o, e));
      if (kVespo) log_weight = clamped(log_weight, kVespoLogFloor, kLogBound);
      sums.chain[kLogWeight] += block.counts ? log_weight : vfloat{};
    }
    if (kGmpo) {
      sums.chain[kClipped] += product(in.weight, gmpo_term(o, d, in.advantage).clipped);
      sums.chain[kWeight] += in.weight;
      sums.chain[kAdvantage] += in.advantage;
    }
  });
  const double* total = sums.total;
  state.near = !(total[kDrift] / length > o.off_policy_threshold);
  if (o.sequence_correction()) {
    const bool mean = o.correction == CorrectionLevel::kGeometric;
    const double e = mean ? total[kCorrection] / length : total[kCorrection];
    state.rollout_weight = rollout_weight_of(o, (float)e);
  }
  if (o.level == RatioLevel::kSequenceSum) {
    set_log_ratio(o, (float)total[kD], &state);
  } else if (o.level != RatioLevel::kToken) {
    set_log_ratio(o, (float)(total[kD] / length), &state);
  }
  if (kVespo) {
    const float log_w = (float)(total[kD] + total[kLogWeight]);
    const float bounded = clamped(log_w, kVespoLogFloor, kLogBound);
    state.phi_pos = vespo_phi(bounded, o.vespo_k_pos, o.vespo_lambda_pos);
    state.phi_neg = vespo_phi(bounded, o.vespo_k_neg, o.vespo_lambda_neg);
  }
  if (kGmpo) {
    const double count = at_least_one(total[kWeight]);
    const double advantage = total[kAdvantage] / length;
    double log_weight = total[kLogWeight] / length;
    if (o.sequence_correction()) log_weight = rl_log((double)state.rollout_weight);
    const bool kept = advantage >= 0 || state.near;
    const double ratio = product(rl_exp((double)(total[kClipped] / count)), rl_exp(log_weight));
    *gmpo_loss = kept ? -product(advantage, ratio) : 0;
    state.gmpo = (float)(*gmpo_loss / count);
  }
  return state;
}

// ---- the terms --------------------------------------------------------------------------------

template <SurrogateKind kSurrogate>
void sequence(const PolicyOptions& o, const PolicySequence& s, PolicyTotals* out) {
  const long long count = count_tokens(s);
  const double length = count > 1 ? (double)count : 1.0;
  double gmpo_loss;
  const SequenceState state = sequence_state<kSurrogate>(o, s, length, &gmpo_loss);
  const float share =
      o.aggregation == Aggregation::kSeqMeanTokenMean ? (float)(1.0 / length) : 1.0f;
  const float policy_share = kSurrogate == SurrogateKind::kGmpo ? 1.0f : share;
  const float kl_share = o.kl_coef * share;
  const float bonus_share = o.entropy_same ? share : 1.0f;
  const bool has_ref = s.ref_logprobs != nullptr;
  const bool coupled = o.coupled();
  const bool corrected = o.correction != CorrectionLevel::kNone;
  const bool has_dual = kSurrogate == SurrogateKind::kClip && o.dual_clip < kInf;

  enum {
    kLoss,
    kKlSum,
    kApprox,
    kLow,
    kHigh,
    kDual,
    kCispo,
    kRatioSum,
    kWeight,
    kSquared,
    kKeep,
    kPhi,
    kShared,
    kEntropySum,
    kBonusSum,
    kBonusTokens,
    kCount
  };
  Sums<kCount> sums;
  vfloat ratio_max = vfloat{} - kInf, minus_ratio_min = ratio_max;
  for_blocks(s, &sums, [&](const auto& block) __attribute__((always_inline)) {
    const vint counts = block.counts;
    const PolicyTerm<vfloat> t = policy_term<kSurrogate>(o, state, has_ref, policy_input(s, block));
    vfloat* sum = sums.chain;
    sum[kLoss] += t.policy.loss;
    sum[kApprox] += t.approx_kl;
    sum[kLow] += counts ? t.policy.low : vfloat{};
    sum[kHigh] += counts ? t.policy.high : vfloat{};
    const vfloat ratio = counts ? t.ratio : vfloat{};
    sum[kRatioSum] += ratio;
    ratio_max = max_drop_nan(ratio_max, counts ? t.ratio : vfloat{} - kInf);
    minus_ratio_min = max_drop_nan(minus_ratio_min, counts ? -t.ratio : vfloat{} - kInf);
    if (has_dual) sum[kDual] += t.policy.dual;
    if (kSurrogate == SurrogateKind::kCispo) sum[kCispo] += t.policy.cispo;
    if (kSurrogate == SurrogateKind::kVespo) sum[kPhi] += counts ? t.phi : vfloat{};
    if (corrected) {
      const vfloat weight = counts ? t.rollout_weight : vfloat{};
      sum[kWeight] += weight;
      sum[kSquared] += weight * weight;
    }
    if (o.off_policy()) sum[kKeep] += counts ? t.kept : vfloat{};
    if (has_ref) sum[kKlSum] += t.kl.value;

    if (s.grad_logprobs != nullptr) {
      vfloat grad = policy_share * t.policy.direct;
      if (has_ref && o.kl_coef != 0) grad += kl_share * t.kl.slope;
      vfloat through = policy_share * t.policy.from_ratio;
      if (o.kl_ratio_weighted && o.kl_coef != 0) through += kl_share * t.kl_from_ratio;
      if (coupled) {
        sum[kShared] += counts ? through : vfloat{};
      } else {
        grad += product(through, t.ratio_open);
      }
      block.store(s.grad_logprobs, counts ? grad : vfloat{});
    }
    if (s.entropy != nullptr) {
      const vfloat entropy = block.load(s.entropy);
      sum[kEntropySum] += entropy;
      if (o.entropy_coef != 0) {
        const vint chosen =
            s.entropy_mask != nullptr ? counts & block.flags(s.entropy_mask) : counts;
        sum[kBonusSum] += chosen ? entropy : vfloat{};
        sum[kBonusTokens] += chosen ? vfloat{} + 1.0f : vfloat{};
        if (s.grad_entropy != nullptr) {
          block.store(s.grad_entropy, chosen ? vfloat{} - o.entropy_coef * bonus_share : vfloat{});
        }
      }
    }
  });
  const double* sum = sums.total;

  if (coupled && s.grad_logprobs != nullptr) {
    const bool mean = o.level == RatioLevel::kSequence;
    const float each = (float)(mean ? sum[kShared] / length : sum[kShared]);
    Sums<1> none;
    for_blocks(s, &none, [&](const auto& block) __attribute__((always_inline)) {
      const vfloat own = block.load(s.grad_logprobs);
      block.store(s.grad_logprobs, block.counts ? own + each : vfloat{});
    });
  }

  PolicyTotals& t = *out;
  const bool by_sequence = o.level == RatioLevel::kSequence;
  const double metric_share = by_sequence ? 1.0 / length : 1.0;
  t.sum[kTokens] += (double)count;
  t.sum[kSequences] += 1;
  t.sum[kNonEmpty] += count > 0;
  t.sum[kRatioUnits] += by_sequence ? 1.0 : (double)count;
  t.sum[kPolicyLoss] +=
      kSurrogate == SurrogateKind::kGmpo ? gmpo_loss : sum[kLoss] * (double)policy_share;
  t.sum[kKl] += sum[kKlSum];
  t.sum[kAggregatedKl] += sum[kKlSum] * (double)share;
  t.sum[kEntropy] += sum[kEntropySum];
  t.sum[kBonus] += sum[kBonusSum] * (double)bonus_share;
  t.sum[kBonusCount] += sum[kBonusTokens];
  t.sum[kApproxKl] += sum[kApprox];
  t.sum[kClipLow] += sum[kLow] * metric_share;
  t.sum[kClipHigh] += sum[kHigh] * metric_share;
  t.sum[kDualClip] += sum[kDual] * metric_share;
  t.sum[kCispoClip] += sum[kCispo] * metric_share;
  t.sum[kRatio] += by_sequence ? (double)state.ratio : sum[kRatioSum];
  t.sum[kRolloutWeight] += corrected ? sum[kWeight] : (double)count;
  t.sum[kRolloutWeightSquared] += corrected ? sum[kSquared] : (double)count;
  t.sum[kKept] += o.off_policy() ? sum[kKeep] : (double)count;
  if (kSurrogate == SurrogateKind::kVespo) {
    const double phi = s.advantage >= 0 ? state.phi_pos : state.phi_neg;
    t.sum[kVespoPhi] += s.one_advantage ? phi : sum[kPhi];
    t.sum[kVespoUnits] += s.one_advantage ? 1.0 : (double)count;
  }
  t.raise(kRatioMax, by_sequence ? state.ratio : reduce_max(ratio_max));
  t.raise(kMinusRatioMin, by_sequence ? -state.ratio : reduce_max(minus_ratio_min));
  if (by_sequence || count > 0) {
    const double low = sum[kLow] / length, high = sum[kHigh] / length;
    t.raise(kClipLowMax, low);
    t.raise(kMinusClipLowMin, -low);
    t.raise(kClipHighMax, high);
    t.raise(kMinusClipHighMin, -high);
  }
}

void policy(const PolicyOptions& o, const PolicySequence& s, PolicyTotals* out) {
  switch (o.surrogate) {
    case SurrogateKind::kClip:
      return sequence<SurrogateKind::kClip>(o, s, out);
    case SurrogateKind::kCispo:
      return sequence<SurrogateKind::kCispo>(o, s, out);
    case SurrogateKind::kSapo:
      return sequence<SurrogateKind::kSapo>(o, s, out);
    case SurrogateKind::kGmpo:
      return sequence<SurrogateKind::kGmpo>(o, s, out);
    case SurrogateKind::kVespo:
      return sequence<SurrogateKind::kVespo>(o, s, out);
    case SurrogateKind::kDppoTv:
    case SurrogateKind::kDppoKl:
      return sequence<SurrogateKind::kDppoKl>(o, s, out);
    case SurrogateKind::kReinforce:
      return sequence<SurrogateKind::kReinforce>(o, s, out);
  }
}

}  // namespace
}  // namespace rlkern

#define RLKERN_JOIN_(a, b) a##b
#define RLKERN_JOIN(a, b) RLKERN_JOIN_(a, b)

extern "C" const rlkern::TokenKernels RLKERN_JOIN(rlkern_token_kernels_, RLKERN_ISA) = {
    rlkern::policy,
};

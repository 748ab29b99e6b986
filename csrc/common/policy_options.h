// A policy-gradient objective as numbers, parsed once per call from what rlkern/ops/policy_loss.py
// sends.
#pragma once

#include "macros.h"

namespace rlkern {

enum class SurrogateKind { kClip, kCispo, kSapo, kGmpo, kVespo, kDppoTv, kDppoKl, kReinforce };
enum class RatioLevel { kToken, kSequence, kSequenceToken, kSequenceSum };
enum class KlEstimator { kK1, kAbs, kK2, kK3, kK1St, kAbsSt, kK3St };
enum class KlClamp { kNone, kVerl, kOpenRlhf };
enum class CorrectionLevel { kNone = -1, kToken, kSequence, kGeometric };
enum class Aggregation {
  kTokenMean,
  kSeqMeanTokenMean,
  kSeqMeanTokenSum,
  kSeqMeanTokenSumNorm,
  kTokenSum
};

// Bounds of verl's and TRL's code that no option changes.
constexpr float kLogBound = 20.0f;
constexpr float kSequenceTokenLogBound = 10.0f;
constexpr float kVespoLogFloor = -18.420680743952367f;  // log(1e-8)
constexpr float kKlLogBound = 20.0f;
constexpr float kKlValueBound = 10.0f;
constexpr float kDppoEps = 1e-8f;

struct PolicyOptions {
  SurrogateKind surrogate;
  RatioLevel level;
  float clip_low;  // offsets, as gmpo and dppo use them
  float clip_high;
  float ratio_low;  // bounds of the ratio
  float ratio_high;
  float dual_clip;
  float ratio_cap;
  float log_ratio_clamp;
  float least_ratio;  // exp(-log_ratio_clamp), and its inverse
  float largest_ratio;
  float kl_coef;
  KlEstimator kl_estimator;
  KlClamp kl_clamp;
  bool kl_ratio_weighted;
  float entropy_coef;
  bool entropy_same;
  Aggregation aggregation;
  bool skip_empty;
  float off_policy_threshold;
  CorrectionLevel correction;
  bool correction_masks;
  float correction_low;
  float correction_high;
  float sapo_tau_pos;
  float sapo_tau_neg;
  float vespo_k_pos;
  float vespo_lambda_pos;
  float vespo_k_neg;
  float vespo_lambda_neg;
  double normalizer;  // NaN where not given as a number
  double num_sequences;
  double entropy_normalizer;

  // A sequence's ratio couples the gradients of its tokens.
  RLKERN_HD bool coupled() const {
    return level == RatioLevel::kSequence || level == RatioLevel::kSequenceSum;
  }
  // Something is summed over the whole sequence before a token's term is known, beyond its length.
  RLKERN_HD bool needs_sums() const {
    return level != RatioLevel::kToken || surrogate == SurrogateKind::kGmpo ||
           surrogate == SurrogateKind::kVespo || off_policy() || sequence_correction();
  }
  RLKERN_HD bool off_policy() const {
    return off_policy_threshold < static_cast<float>(__builtin_inf());
  }
  RLKERN_HD bool sequence_correction() const {
    return correction == CorrectionLevel::kSequence || correction == CorrectionLevel::kGeometric;
  }
};

constexpr int kPolicyOptionCount = 29;

inline PolicyOptions policy_options(const double* v) {
  PolicyOptions o;
  const auto number = [&v] { return static_cast<float>(*v++); };
  const auto index = [&v] { return static_cast<int>(*v++); };
  o.surrogate = static_cast<SurrogateKind>(index());
  o.level = static_cast<RatioLevel>(index());
  o.ratio_low = static_cast<float>(1.0 - *v);
  o.clip_low = number();
  o.ratio_high = static_cast<float>(1.0 + *v);
  o.clip_high = number();
  o.dual_clip = number();
  o.ratio_cap = number();
  o.least_ratio = static_cast<float>(rl_exp(-*v));
  o.largest_ratio = static_cast<float>(rl_exp(*v));
  o.log_ratio_clamp = number();
  o.kl_coef = number();
  o.kl_estimator = static_cast<KlEstimator>(index());
  o.kl_clamp = static_cast<KlClamp>(index());
  o.kl_ratio_weighted = index() != 0;
  o.entropy_coef = number();
  o.entropy_same = index() != 0;
  o.aggregation = static_cast<Aggregation>(index());
  o.skip_empty = index() != 0;
  o.off_policy_threshold = number();
  o.correction = static_cast<CorrectionLevel>(index());
  o.correction_masks = index() != 0;
  o.correction_low = number();
  o.correction_high = number();
  o.sapo_tau_pos = number();
  o.sapo_tau_neg = number();
  o.vespo_k_pos = number();
  o.vespo_lambda_pos = number();
  o.vespo_k_neg = number();
  o.vespo_lambda_neg = number();
  o.normalizer = *v++;
  o.num_sequences = *v++;
  o.entropy_normalizer = *v++;
  return o;
}

}  // namespace rlkern

// Where the tokens of a return scan and of its backward lie in memory. No torch in here, so that
// kernels and their tests without a GPU use it too.
#pragma once

#include "sequence_grid.h"

namespace rlkern {

// Null where an argument was not given.
struct ReturnRows {
  SequenceGrid grid;
  TokenRows<const float> rewards, values, log_ratios;
  TokenRows<const bool> mask, dones;
  const float* bootstrap_value = nullptr;  // [B]
  const float* lam = nullptr;              // [B], instead of the options'
  TokenRows<float> first, second;
};

struct ReturnGradRows {
  SequenceGrid grid;
  TokenRows<const float> grad_first, grad_second;
  TokenRows<const bool> mask, dones;
  const float* lam = nullptr;
  TokenRows<float> grad_rewards, grad_values;
  float* grad_bootstrap = nullptr;  // [B]
};

// The tokens of one sequence, consecutive in memory.
struct ReturnSequence {
  long long size;
  const float* rewards;
  const float* values;
  const float* log_ratios;
  const unsigned char* mask;
  const unsigned char* dones;
  double bootstrap_value;
  double lam;
  float* first;
  float* second;
};

struct ReturnGradSequence {
  long long size;
  const float* grad_first;
  const float* grad_second;
  const unsigned char* mask;
  const unsigned char* dones;
  double lam;
  float* grad_rewards;
  float* grad_values;
  float* grad_bootstrap;
};

RLKERN_INLINE ReturnSequence return_sequence(const ReturnRows& rows, double lam, int64_t i) {
  const SequenceSpan at = rows.grid.span(i);
  return {at.size,
          rows.rewards.row(i, at),
          rows.values.row(i, at),
          rows.log_ratios.row(i, at),
          flag_bytes(rows.mask.row(i, at)),
          flag_bytes(rows.dones.row(i, at)),
          rows.bootstrap_value != nullptr ? rows.bootstrap_value[i] : 0.0,
          rows.lam != nullptr ? rows.lam[i] : lam,
          rows.first.row(i, at),
          rows.second.row(i, at)};
}

RLKERN_INLINE ReturnGradSequence return_grad_sequence(const ReturnGradRows& rows, double lam,
                                                      int64_t i) {
  const SequenceSpan at = rows.grid.span(i);
  return {at.size,
          rows.grad_first.row(i, at),
          rows.grad_second.row(i, at),
          flag_bytes(rows.mask.row(i, at)),
          flag_bytes(rows.dones.row(i, at)),
          rows.lam != nullptr ? rows.lam[i] : lam,
          rows.grad_rewards.row(i, at),
          rows.grad_values.row(i, at),
          rows.grad_bootstrap + i};
}

}  // namespace rlkern

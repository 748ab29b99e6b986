// CPU implementations of the operators that rlkern/_schema.py defines.

#include <torch/csrc/stable/library.h>

#include "cpu/group_advantages.h"
#include "cpu/policy_loss.h"
#include "cpu/policy_rows.h"
#include "cpu/return_scan.h"
#include "cpu/sum.h"
#include "cpu/token_logprobs.h"
#include "cpu/value_loss.h"
#include "cpu/vocab_divergence.h"
#include "cpu/whiten.h"

STABLE_TORCH_LIBRARY_IMPL(rlkern, CPU, m) {
  m.impl("add_widened_", TORCH_BOX(&rlkern::add_widened_cpu));
  m.impl("group_advantages", TORCH_BOX(&rlkern::group_advantages_cpu));
  m.impl("masked_moments", TORCH_BOX(&rlkern::masked_moments_cpu));
  m.impl("whiten", TORCH_BOX(&rlkern::whiten_cpu));
  m.impl("kl_penalty", TORCH_BOX(&rlkern::kl_penalty_cpu));
  m.impl("kl_penalty_bwd", TORCH_BOX(&rlkern::kl_penalty_bwd_cpu));
  m.impl("value_loss", TORCH_BOX(&rlkern::value_loss_cpu));
  m.impl("value_loss_bwd", TORCH_BOX(&rlkern::value_loss_bwd_cpu));
  m.impl("policy_loss", TORCH_BOX(&rlkern::policy_loss_cpu));
  m.impl("policy_loss_bwd", TORCH_BOX(&rlkern::policy_loss_bwd_cpu));
  m.impl("policy_rows", TORCH_BOX(&rlkern::policy_rows_cpu));
  m.impl("return_scan", TORCH_BOX(&rlkern::return_scan_cpu));
  m.impl("return_scan_bwd", TORCH_BOX(&rlkern::return_scan_bwd_cpu));
  m.impl("vocab_divergence", TORCH_BOX(&rlkern::vocab_divergence_cpu));
  m.impl("vocab_divergence_bwd", TORCH_BOX(&rlkern::vocab_divergence_bwd_cpu));
  m.impl("vocab_divergence_bwd_", TORCH_BOX(&rlkern::vocab_divergence_bwd_into_cpu));
  m.impl("token_logprobs", TORCH_BOX(&rlkern::token_logprobs_cpu));
  m.impl("token_logprobs_outputs", TORCH_BOX(&rlkern::token_logprobs_outputs_cpu));
  m.impl("token_logprobs_bwd", TORCH_BOX(&rlkern::token_logprobs_bwd_cpu));
  m.impl("token_logprobs_bwd_", TORCH_BOX(&rlkern::token_logprobs_bwd_inplace_cpu));
}

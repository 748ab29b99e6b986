// CUDA implementations of the operators that rlkern/_schema.py defines.

#include <torch/csrc/stable/library.h>

#include "cuda/gradient_scale.h"
#include "cuda/group_advantages.h"
#include "cuda/policy_loss.h"
#include "cuda/policy_rows.h"
#include "cuda/return_scan.h"
#include "cuda/sum.h"
#include "cuda/token_logprobs.h"
#include "cuda/value_loss.h"
#include "cuda/vocab_divergence.h"
#include "cuda/whiten.h"

STABLE_TORCH_LIBRARY_IMPL(rlkern, CUDA, m) {
  m.impl("add_widened_", TORCH_BOX(&rlkern::add_widened_cuda));
  m.impl("group_advantages", TORCH_BOX(&rlkern::group_advantages_cuda));
  m.impl("masked_moments", TORCH_BOX(&rlkern::masked_moments_cuda));
  m.impl("whiten", TORCH_BOX(&rlkern::whiten_cuda));
  m.impl("return_scan", TORCH_BOX(&rlkern::return_scan_cuda));
  m.impl("return_scan_bwd", TORCH_BOX(&rlkern::return_scan_bwd_cuda));
  m.impl("policy_loss", TORCH_BOX(&rlkern::policy_loss_cuda));
  m.impl("policy_loss_bwd", TORCH_BOX(&rlkern::policy_loss_bwd_cuda));
  m.impl("policy_rows", TORCH_BOX(&rlkern::policy_rows_cuda));
  m.impl("scale_", TORCH_BOX(&rlkern::scale_cuda));
  m.impl("kl_penalty", TORCH_BOX(&rlkern::kl_penalty_cuda));
  m.impl("kl_penalty_bwd", TORCH_BOX(&rlkern::kl_penalty_bwd_cuda));
  m.impl("value_loss", TORCH_BOX(&rlkern::value_loss_cuda));
  m.impl("value_loss_bwd", TORCH_BOX(&rlkern::value_loss_bwd_cuda));
  m.impl("vocab_divergence", TORCH_BOX(&rlkern::vocab_divergence_cuda));
  m.impl("vocab_divergence_bwd", TORCH_BOX(&rlkern::vocab_divergence_bwd_cuda));
  m.impl("vocab_divergence_bwd_", TORCH_BOX(&rlkern::vocab_divergence_bwd_into_cuda));
  m.impl("token_logprobs", TORCH_BOX(&rlkern::token_logprobs_cuda));
  m.impl("token_logprobs_bwd", TORCH_BOX(&rlkern::token_logprobs_bwd_cuda));
  m.impl("token_logprobs_bwd_", TORCH_BOX(&rlkern::token_logprobs_bwd_inplace_cuda));
}

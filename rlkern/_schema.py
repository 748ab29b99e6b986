"""Every operator schema of ``torch.ops.rlkern``, one list, defined without a compiler.

``rlkern::x`` is implemented in C++ (CPU, CUDA). The other backends are operators of their own,
``rlkern::x_triton`` and ``rlkern::x_reference``, with the same schema: two owners of one dispatch
key would clash.
"""

from __future__ import annotations

import torch

_TOKEN_LOGPROBS = (
    "Tensor token_ids, Tensor? mask, Tensor? token_temperature, float temperature, float? softcap"
)
# One value per token, contiguous, and the numbers of the loss whose aggregation is a plain sum.
_POLICY_TOKENS = (
    "Tensor advantages, Tensor? old_logprobs, Tensor? ref_logprobs, Tensor? rollout_logprobs, "
    "Tensor? token_weights, Tensor? entropy_mask, Tensor scales, float[] token_options"
)
_POLICY_WHOLE = (
    "Tensor? offsets, Tensor? normalizer, Tensor? num_sequences, Tensor? entropy_normalizer, "
    "float[] options"
)
# divergence: a place in DIVERGENCES of reference/vocab_divergence.py. beta: of Jensen-Shannon.
_VOCAB_DIVERGENCE = (
    "Tensor? mask, Tensor? token_temperature, float temperature, float? softcap, int divergence, "
    "float beta"
)
# Of a loss with the exact KL; kl_scale as in policy_loss_logits.
_EXACT_KL = "Tensor? ref_hidden, Tensor? ref_weight, Tensor? ref_bias, Tensor? kl_scale"
_TOKEN_LOGPROBS_SAVED = "Tensor logprobs, Tensor entropy, Tensor state"

SCHEMAS = {
    # -> logprobs [...], entropy [...] or [0], state [..., 2]: maximum of the (capped) logits and
    # log of the sum of exponentials relative to it.
    "token_logprobs": (
        f"(Tensor logits, {_TOKEN_LOGPROBS}, bool return_entropy) -> (Tensor, Tensor, Tensor)"
    ),
    # The same, and outputs [..., 3], without a gradient: the mean of the logits, the log of the sum
    # of squared probabilities, and 1 where the token is the most probable one, the first of equals.
    "token_logprobs_outputs": (
        f"(Tensor logits, {_TOKEN_LOGPROBS}, bool return_entropy) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "token_logprobs_bwd": (
        f"(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor logits, {_TOKEN_LOGPROBS}, "
        f"{_TOKEN_LOGPROBS_SAVED}) -> Tensor"
    ),
    # The same, the gradient written over the logits.
    "token_logprobs_bwd_": (
        f"(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor(a!) logits, {_TOKEN_LOGPROBS}, "
        f"{_TOKEN_LOGPROBS_SAVED}) -> ()"
    ),
    # Of two distributions, logits and ref_logits [..., V] in one dtype. -> divergence [...], state
    # [..., 6], see reference/vocab_divergence.py.
    "vocab_divergence": (
        f"(Tensor logits, Tensor ref_logits, {_VOCAB_DIVERGENCE}) -> (Tensor, Tensor)"
    ),
    # The gradient of logits.
    "vocab_divergence_bwd": (
        "(Tensor grad_value, Tensor logits, Tensor ref_logits, "
        f"{_VOCAB_DIVERGENCE}, Tensor state) -> Tensor"
    ),
    # The same, written to grad, which may be logits or ref_logits.
    "vocab_divergence_bwd_": (
        "(Tensor grad_value, Tensor(a!) grad, Tensor logits, Tensor ref_logits, "
        f"{_VOCAB_DIVERGENCE}, Tensor state) -> ()"
    ),
    # -> loss [], metrics [sums, maxima] in float64, the gradients with respect to logprobs and
    # entropy (or [0]), and what each is still to be multiplied by, [2]: one over the batch's
    # denominators on a GPU, where the kernel that counts them has not ended; 1 on the CPU.
    "policy_loss": (
        "(Tensor logprobs, Tensor advantages, Tensor? mask, Tensor? old_logprobs, "
        "Tensor? ref_logprobs, Tensor? rollout_logprobs, Tensor? entropy, Tensor? token_weights, "
        "Tensor? entropy_mask, Tensor? offsets, Tensor? normalizer, Tensor? num_sequences, "
        "Tensor? entropy_normalizer, float[] options, bool grad_logprobs, bool grad_entropy) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "policy_loss_bwd": (
        "(Tensor grad_loss, Tensor grad_logprobs, Tensor grad_entropy, Tensor scale) "
        "-> (Tensor, Tensor)"
    ),
    # Of a loss that is separable by token: the gradient of logits [..., V] is written to
    # grad, which may be the logits themselves. The rest is contiguous with one value per token;
    # scales [..., 2] multiply the gradients with respect to log-probability and entropy, whose
    # aggregation is a plain sum. -> logprobs, entropy [...] or [0], and those gradients [..., 2].
    "policy_rows": (
        f"(Tensor logits, Tensor(a!) grad, {_TOKEN_LOGPROBS}, {_POLICY_TOKENS}, "
        "bool return_entropy) -> (Tensor, Tensor, Tensor)"
    ),
    # sum, in float32, += part, in any of the logits' dtypes; contiguous tensors of one size.
    "add_widened_": "(Tensor(a!) sum, Tensor part) -> ()",
    # -> loss [], metrics in float64, the gradient (or [0]), and what it is still to be multiplied
    # by, [1].
    "value_loss": (
        "(Tensor values, Tensor returns, Tensor? mask, Tensor? old_values, Tensor? offsets, "
        "Tensor? normalizer, Tensor? num_sequences, float[] options, bool grad_values) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "value_loss_bwd": "(Tensor grad_loss, Tensor grad_values, Tensor scale) -> Tensor",
    # Contiguous tensors of one shape; numbers are places in the lists of reference/kl_penalty.py.
    "kl_penalty": (
        "(Tensor logprobs, Tensor ref_logprobs, Tensor? mask, int estimator, int clamp) -> Tensor"
    ),
    "kl_penalty_bwd": (
        "(Tensor grad, Tensor logprobs, Tensor ref_logprobs, Tensor? mask, int estimator, "
        "int clamp) -> Tensor"
    ),
    # gae, discounted_returns and vtrace, which one is said by what is given: values none for
    # returns, log_ratios for vtrace. lam [B] and bootstrap_value [B] are per sequence. options:
    # csrc/common/return_scan.h. -> advantages and returns; returns and [0]; vtrace's values and
    # advantages.
    "return_scan": (
        "(Tensor rewards, Tensor? values, Tensor? log_ratios, Tensor? mask, Tensor? dones, "
        "Tensor? bootstrap_value, Tensor? lam, Tensor? offsets, float[] options) "
        "-> (Tensor, Tensor)"
    ),
    # Of gae and discounted_returns: the gradients of rewards, values (or [0]) and bootstrap_value.
    "return_scan_bwd": (
        "(Tensor grad_first, Tensor? grad_second, Tensor? mask, Tensor? dones, Tensor? lam, "
        "Tensor? offsets, float[] options) -> (Tensor, Tensor, Tensor)"
    ),
    # rewards [N, K], contiguous; groups of group_size, or by group_ids [N] (int64). lengths [N],
    # given [N, K], weights [K]. options: csrc/common/group_advantages.h. -> advantages [N].
    "group_advantages": (
        "(Tensor rewards, int group_size, Tensor? group_ids, Tensor? lengths, Tensor? given, "
        "Tensor? weights, float[] options) -> Tensor"
    ),
    # Contiguous tensors of one shape. moments: count, mean and sum of squared deviations of the
    # counting values, [3] in float64. options: csrc/common/whitening.h.
    "masked_moments": "(Tensor x, Tensor? mask) -> Tensor",
    "whiten": "(Tensor x, Tensor? mask, Tensor moments, float[] options) -> Tensor",
}

# Operators in Python over the others, the same for all backends: which one serves the row pass
# is an argument.
COMPOSITES = {
    # rows: of a chunk. wide: logits in float32, whatever the factors are. -> logprobs [N], entropy
    # [N] or [0], state [N, 2], outputs [N, 3] or [0], as of token_logprobs_outputs.
    "linear_token_logprobs": (
        f"(Tensor hidden, Tensor weight, Tensor? bias, {_TOKEN_LOGPROBS}, bool return_entropy, "
        "bool outputs, int rows, bool invariant, bool wide, str backend) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    ),
    # A separable policy loss (policy_rows) with what its losses and metrics need beside it. With
    # ref_logits the exact KL is one of them: kl_scale [...] multiplies a token's, None: it is only
    # measured. -> loss [], metrics, and the gradient of the logits for an upstream of 1.
    "policy_loss_logits": (
        f"(Tensor logits, Tensor? ref_logits, Tensor? kl_scale, {_TOKEN_LOGPROBS}, "
        f"{_POLICY_TOKENS}, {_POLICY_WHOLE}, "
        "bool return_entropy, str backend) -> (Tensor, Tensor, Tensor)"
    ),
    # x [..., V] times a number on its device, in place. A GPU's kernel leaves x alone where that is
    # 1, without the host's looking.
    "scale_": "(Tensor(a!) x, Tensor factor) -> ()",
    # active: where a token's gradient may differ from 0; others are left out of its products.
    # -> loss [], metrics, and the gradients of hidden, weight and bias, [0] where not needed.
    "policy_loss_hidden": (
        f"(Tensor hidden, Tensor weight, Tensor? bias, {_EXACT_KL}, {_TOKEN_LOGPROBS}, "
        f"{_POLICY_TOKENS}, {_POLICY_WHOLE}, bool return_entropy, Tensor? active, bool metrics, "
        "bool compact, int rows, bool invariant, bool wide, str backend, bool[] needs) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    # The same of a loss that couples the tokens of a sequence. denominators [3], float64:
    # normalizer, num_sequences and entropy_normalizer of the whole batch, NaN where there is none.
    "policy_loss_sequences": (
        f"(Tensor hidden, Tensor weight, Tensor? bias, {_EXACT_KL}, {_TOKEN_LOGPROBS}, "
        "Tensor advantages, Tensor? old_logprobs, Tensor? ref_logprobs, Tensor? rollout_logprobs, "
        "Tensor? token_weights, Tensor? entropy_mask, Tensor denominators, "
        f"{_POLICY_WHOLE}, bool return_entropy, bool compact, int rows, bool invariant, bool wide, "
        "str backend, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    # rows: of a chunk, of the policy's and of the reference's logits. -> divergence [N], state.
    "linear_kl_divergence": (
        "(Tensor hidden, Tensor weight, Tensor? bias, Tensor ref_hidden, Tensor ref_weight, "
        f"Tensor? ref_bias, {_VOCAB_DIVERGENCE}, int rows, bool invariant, bool wide, str backend) "
        "-> (Tensor, Tensor)"
    ),
    # -> the gradients of hidden, weight and bias, [0] where it is not needed.
    "linear_kl_divergence_bwd": (
        "(Tensor grad_value, Tensor hidden, Tensor weight, Tensor? bias, Tensor ref_hidden, "
        f"Tensor ref_weight, Tensor? ref_bias, {_VOCAB_DIVERGENCE}, Tensor state, int rows, "
        "bool invariant, bool wide, str backend, bool[] needs) -> (Tensor, Tensor, Tensor)"
    ),
    # -> the gradients of hidden, weight and bias, [0] where it is not needed.
    "linear_token_logprobs_bwd": (
        "(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor hidden, Tensor weight, Tensor? bias, "
        f"{_TOKEN_LOGPROBS}, {_TOKEN_LOGPROBS_SAVED}, int rows, bool invariant, bool wide, "
        "str backend, bool[] needs) -> (Tensor, Tensor, Tensor)"
    ),
}

# Backend -> suffix of its operators' names.
SUFFIXES = {"native": "", "triton": "_triton", "eager": "_reference"}

# Operators whose eager form is the definition itself, differentiated by autograd.
WITHOUT_REFERENCE = tuple(
    op for op in SCHEMAS if not op.startswith(("token_logprobs", "vocab_divergence"))
)

# Elsewhere torch's own serves.
NATIVE_ONLY = ("add_widened_",)

LIBRARY = torch.library.Library("rlkern", "DEF")


def operator_name(op: str, backend: str) -> str:
    """``token_logprobs_bwd_`` of eager is ``token_logprobs_bwd_reference_``: the underscore that
    marks a mutation stays last."""
    suffix = SUFFIXES[backend]
    return f"{op[:-1]}{suffix}_" if op.endswith("_") else f"{op}{suffix}"


def backends(op: str) -> tuple[str, ...]:
    """The backends that have an operator of their own for it."""
    if op in NATIVE_ONLY:
        return ("native",)
    return tuple(b for b in SUFFIXES if b != "eager" or op not in WITHOUT_REFERENCE)


def _define(name: str, schema: str) -> None:
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))


for _op, _schema in SCHEMAS.items():
    for _backend in backends(_op):
        _define(operator_name(_op, _backend), _schema)
for _op, _schema in COMPOSITES.items():
    _define(_op, _schema)

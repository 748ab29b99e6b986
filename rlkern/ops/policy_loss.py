"""policy_loss: a policy-gradient objective with its gradient and metrics from one pass.

The public front is rlkern.PolicyLoss. Eager PyTorch differentiates the definition by autograd; the
kernels return the gradient for an upstream of 1 and what it is still to be multiplied by: on a GPU
the batch's denominators, so that nothing waits for a count over the batch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlkern import _backend
from rlkern.ops import _register
from rlkern.reference import policy_loss as reference
from rlkern.reference.aggregation import AGGREGATIONS, Denominators
from rlkern.reference.kl_penalty import CLAMPS, ESTIMATORS

SURROGATES = ("clip", "cispo", "sapo", "gmpo", "vespo", "dppo_tv", "dppo_kl", "reinforce")
RATIO_LEVELS = ("token", "sequence", "sequence_token", "sequence_sum")
CORRECTION_LEVELS = ("token", "sequence", "geometric")
CORRECTION_MODES = ("truncate", "mask")
#: Of the metrics' vector that the operator returns.
METRICS = len(reference.SUMS) + len(reference.MAXIMA)


def policy_loss(loss: Any, batch: reference.Batch, given: Denominators) -> tuple[Tensor, Tensor]:
    """The loss and the metrics' vector, float64 and without gradient.

    Args:
        loss: a PolicyLoss.
        batch: checked tensors of one dtype, consecutive along a sequence.
        given: the denominators that the caller gave.
    """
    logprobs = batch.logprobs
    backend = _backend.choose("policy_loss", logprobs.device.type, logprobs.dtype)
    if backend == "eager":
        return reference.policy_loss(loss, batch, given)
    grad = torch.is_grad_enabled()
    entropy_grad = (
        grad
        and loss.entropy_coef != 0
        and batch.entropy is not None
        and batch.entropy.requires_grad
    )
    logprobs_grad = grad and logprobs.requires_grad
    tensors = [value if isinstance(value, Tensor) else None for value in given]
    args = (*batch, *tensors, options(loss, given), logprobs_grad, entropy_grad)
    value, vector = _call(backend, args, logprobs_grad or entropy_grad)
    return value, vector


def options(loss: Any, given: Denominators) -> list[float]:
    """The objective as numbers, in the order of csrc/common/policy_options.h.

    A denominator that was not given, or comes as a tensor, as NaN.
    """
    denominators = [
        math.nan if value is None or isinstance(value, Tensor) else float(value) for value in given
    ]
    return [*loss._numbers, *denominators]


def numbers(loss: Any) -> tuple[float, ...]:
    """The objective's part of the options, the same at every call: names as their place in their
    list; a bound that is left out as infinity.
    """

    def bound(value: float | None, otherwise: float = math.inf) -> float:
        return otherwise if value is None else value

    def or_zero(value: float | None) -> float:
        return 0.0 if value is None else value

    correction = loss.correction
    result = [
        SURROGATES.index(loss.surrogate),
        RATIO_LEVELS.index(loss.ratio_level),
        bound(loss.clip_low),
        bound(loss.clip_high),
        bound(loss.dual_clip),
        bound(loss.ratio_cap),
        bound(loss.log_ratio_clamp),
        loss.kl_coef,
        ESTIMATORS.index(loss.kl_estimator),
        0 if loss.kl_clamp is None else 1 + CLAMPS.index(loss.kl_clamp),
        loss.kl_ratio_weighted,
        loss.entropy_coef,
        loss.entropy_aggregation == "same",
        AGGREGATIONS.index(loss.aggregation),
        loss.skip_empty,
        bound(loss.off_policy_threshold),
        -1 if correction is None else CORRECTION_LEVELS.index(correction.level),
        0 if correction is None else CORRECTION_MODES.index(correction.mode),
        -math.inf if correction is None else bound(correction.low, -math.inf),
        math.inf if correction is None else bound(correction.high),
        or_zero(loss.sapo_tau_pos),
        or_zero(loss.sapo_tau_neg),
        or_zero(loss.vespo_k_pos),
        or_zero(loss.vespo_lambda_pos),
        or_zero(loss.vespo_k_neg),
        or_zero(loss.vespo_lambda_neg),
    ]
    return tuple(float(number) for number in result)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[2:])
    ctx.has_gradient = inputs[-2:]


def _backward(
    ctx: Any, backend: str, grad_loss: Tensor, *_: Any
) -> tuple[Tensor | None, Tensor | None]:
    _register.refuse_create_graph("policy_loss")
    grad_logprobs, grad_entropy, scale = ctx.saved_tensors
    if not _register.is_final(backend, grad_loss):
        scaled = _register.overload("policy_loss_bwd", backend)
        grad_logprobs, grad_entropy = scaled(grad_loss, grad_logprobs, grad_entropy, scale)
    logprobs, entropy = ctx.has_gradient
    return grad_logprobs if logprobs else None, grad_entropy if entropy else None


def _fake(logprobs, *rest):
    grad_logprobs, grad_entropy = rest[-2:]
    none = (0,)
    return (
        logprobs.new_empty(()),
        logprobs.new_empty((METRICS,), dtype=torch.float64),
        logprobs.new_empty(logprobs.shape if grad_logprobs else none),
        logprobs.new_empty(logprobs.shape if grad_entropy else none),
        logprobs.new_empty((2,)),
    )


def _fake_backward(grad_loss, grad_logprobs, grad_entropy, scale):
    return torch.empty_like(grad_logprobs), torch.empty_like(grad_entropy)


_backend.register("policy_loss")
_register.register_fake("policy_loss", _fake)
_register.register_fake("policy_loss_bwd", _fake_backward)
_register.register_triton("policy_loss", "policy_loss", "forward")
_register.register_triton("policy_loss_bwd", "policy_loss", "backward")
_call = _register.differentiable(
    "policy_loss",
    (reference.Batch._fields.index("logprobs"), reference.Batch._fields.index("entropy")),
    2,
    _setup_context,
    _backward,
)
_register.forbid_second_derivative("policy_loss_bwd")

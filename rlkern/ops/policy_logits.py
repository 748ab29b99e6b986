"""A policy loss from logits: one read and one write of each row where the loss allows it.

A loss that is separable by token takes its gradient in the forward pass (policy_rows); the backward
multiplies it by the upstream gradient, if that is not 1. Losses that couple the tokens of a
sequence, and calls without a gradient, are token_logprobs and policy_loss one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlkern import _backend
from rlkern.ops import _register, policy_rows
from rlkern.ops._exact_kl import ReferenceLogits, with_kl
from rlkern.ops._logits_kl import in_steps, rows_with_kl
from rlkern.ops.policy_loss import METRICS, options, policy_loss
from rlkern.ops.policy_rows import RowArguments, TokenArguments
from rlkern.ops.token_logprobs import require_consecutive, require_writable, token_logprobs
from rlkern.reference import policy_loss as definition
from rlkern.reference.aggregation import Denominators


class WholeArguments(NamedTuple):
    """What the loss and the metrics of all tokens need beside TokenArguments."""

    offsets: Tensor | None
    normalizer: Tensor | None
    num_sequences: Tensor | None
    entropy_normalizer: Tensor | None
    options: list[float]


def whole_arguments(loss: Any, batch: definition.Batch, given: Denominators) -> WholeArguments:
    normalizer, num_sequences, entropy_normalizer = (
        value if isinstance(value, Tensor) else None for value in given
    )
    return WholeArguments(
        batch.offsets, normalizer, num_sequences, entropy_normalizer, options(loss, given)
    )


def loss_and_metrics(
    backend: str,
    logprobs: Tensor,
    entropy: Tensor | None,
    mask: Tensor | None,
    given: Sequence[Any],
    whole: WholeArguments,
) -> tuple[Tensor, Tensor]:
    """Of all tokens, without gradients. `given`: advantages, old_logprobs, ref_logprobs,
    rollout_logprobs, token_weights and entropy_mask."""
    advantages, old, ref, rollout, weights, entropy_mask = given
    value, vector, *_ = _register.overload("policy_loss", backend)(
        logprobs, advantages, mask, old, ref, rollout, entropy, weights, entropy_mask, *whole,
        False, False,
    )  # fmt: skip
    return value, vector


def policy_loss_logits(
    loss: Any,
    logits: Tensor,
    rows: RowArguments,
    batch: definition.Batch,
    given: Denominators,
    return_entropy: bool,
    inplace: bool,
    reference: ReferenceLogits | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss and the metrics' vector. `batch` has a stand-in of the right shape for logprobs."""
    needs_grad = torch.is_grad_enabled() and logits.requires_grad
    inplace = inplace and needs_grad
    if inplace:
        require_writable(logits, "inplace=True")
    backend = _backend.choose("policy_loss", logits.device.type, logits.dtype)
    if backend == "eager" or not needs_grad or not policy_rows.is_separable(loss):
        if reference is not None:
            return in_steps(
                loss, logits, rows, batch, given, return_entropy, inplace, reference, backend
            )
        out = token_logprobs(
            logits, rows.token_ids, **rows.keywords(), return_entropy=True,
            inplace_backward=inplace,
        )  # fmt: skip
        entropy = out.entropy if return_entropy else None
        return policy_loss(loss, batch._replace(logprobs=out.logprobs, entropy=entropy), given)
    if logits.stride(-1) != 1:
        if inplace:
            require_consecutive(logits, "inplace=True")
        logits = logits.contiguous()
    tokens = policy_rows.token_arguments(loss, batch, given)
    whole = whole_arguments(loss, batch, given)
    if inplace and not torch.compiler.is_compiling():
        return _Inplace.apply(logits, reference, rows, tokens, whole, return_entropy, backend)
    value, vector, _ = torch.ops.rlkern.policy_loss_logits(
        logits, *(reference or (None, None)), *rows, *tokens, *whole, return_entropy, backend
    )
    return value, vector


def _into(
    grad: Tensor,
    logits: Tensor,
    reference: ReferenceLogits | None,
    rows: RowArguments,
    tokens: TokenArguments,
    whole: WholeArguments,
    return_entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    kl = None
    if reference is None:
        logprobs, entropy, _ = policy_rows.run(backend, logits, grad, rows, tokens, return_entropy)
    else:
        logprobs, entropy, kl = rows_with_kl(
            backend, logits, grad, reference, rows, tokens, return_entropy
        )
    kept = entropy if return_entropy else None
    value, vector = loss_and_metrics(backend, logprobs, kept, rows.mask, tokens[:6], whole)
    if reference is None or kl is None:
        return value, vector
    return with_kl(value, vector, kl, reference.scale)


class _Inplace(torch.autograd.Function):
    """The gradient takes the place of the logits in the forward pass already.

    A function of eager mode: an operator that mutates its input cannot have a gradient.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        # Shares memory and version counter: whoever saved the logits, or uses them again, is told.
        memory = logits.detach()
        value, vector = _into(memory, memory, *args)
        torch.autograd.graph.increment_version(memory)
        ctx.backend = args[-1]
        ctx.save_for_backward(memory)
        ctx.mark_non_differentiable(vector)
        ctx.used = False
        return value, vector

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        _register.refuse_create_graph("policy_loss_logits")
        if ctx.used:
            raise RuntimeError(
                "inplace=True: expected one backward, got a second one: the first has scaled the "
                "gradient that lies over the logits"
            )
        ctx.used = True
        (grad,) = ctx.saved_tensors
        if ctx.backend != "native" or grad.device.type != "cpu" or grads[0].item() != 1:
            torch.ops.rlkern.scale_(grad, grads[0])
        return grad, *[None] * 6


# ---- the operator ------------------------------------------------------------------------------


def _forward(logits: Tensor, ref_logits: Any, kl_scale: Any, *args: Any) -> Any:
    reference = None if ref_logits is None else ReferenceLogits(ref_logits, kl_scale)
    rows, tokens = RowArguments(*args[:5]), TokenArguments(*args[5:13])
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    whole = WholeArguments(*args[13:18])
    value, vector = _into(grad, logits, reference, rows, tokens, whole, *args[18:])
    return value, vector, grad


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # Or the backward would be handed zeros in the shape of each result, gradients included.
    ctx.set_materialize_grads(False)
    _, vector, grad = output
    ctx.mark_non_differentiable(vector, grad)
    ctx.save_for_backward(grad)
    ctx.arguments, ctx.backend = len(inputs), inputs[-1]


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> Any:
    _register.refuse_create_graph("policy_loss_logits")
    (grad,) = ctx.saved_tensors
    return _register.scaled(ctx.backend, grad, grad_loss), *[None] * (ctx.arguments - 1)


def _fake(logits, *rest):
    return (
        logits.new_empty((), dtype=torch.float32),
        logits.new_empty((METRICS,), dtype=torch.float64),
        logits.new_empty(logits.shape),
    )


def _scale(x: Tensor, factor: Tensor) -> None:
    x.mul_(factor)


def _scale_fake(x: Tensor, factor: Tensor) -> None:
    return None


_register.register_composite("scale_", _scale, _scale_fake)
_register.register_composite("policy_loss_logits", _forward, _fake)
torch.library.register_autograd(
    "rlkern::policy_loss_logits", _backward, setup_context=_setup_context, lib=_register.LIBRARY
)

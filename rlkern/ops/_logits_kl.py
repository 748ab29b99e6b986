"""The exact KL beside a policy loss from logits: where the gradient is written, and in steps.

A policy's row is read for both, and no second gradient of all logits is ever in memory where the
loss forms its gradient in the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rlkern.ops import _register, policy_rows
from rlkern.ops._exact_kl import ReferenceLogits, divergence_arguments, with_kl
from rlkern.ops._head import chunk_rows, default_budget
from rlkern.ops.kl_divergence import divergence_of
from rlkern.ops.policy_loss import policy_loss
from rlkern.ops.policy_rows import RowArguments, TokenArguments
from rlkern.ops.token_logprobs import require_consecutive, token_logprobs
from rlkern.reference import policy_loss as definition
from rlkern.reference.aggregation import Denominators


def rows_with_kl(
    backend: str,
    logits: Tensor,
    grad: Tensor,
    reference: ReferenceLogits,
    rows: RowArguments,
    tokens: TokenArguments,
    return_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As policy_rows.run, with the KL's gradient in `grad`, which may be the logits; logprobs,
    entropy (or [0]) and kl.

    In blocks of rows: the KL's gradient waits in a buffer until the policy's is written.
    """
    shape, vocab = logits.shape[:-1], logits.shape[-1]
    total = shape.numel()
    logprobs = logits.new_empty(total, dtype=torch.float32)
    entropy = logits.new_empty(total if return_entropy else 0, dtype=torch.float32)
    kl = torch.empty_like(logprobs)
    scale = None if reference.scale is None else reference.scale.reshape(-1)
    rows, tokens = rows.flat(), tokens.flat()
    count = chunk_rows(vocab * logits.element_size(), default_budget(logits.device))
    buffer = logits.new_empty(0 if scale is None else min(count, total), vocab)
    for span, z, r, g in _blocks((logits, reference.logits, grad), count):
        ids, mask, temperature = (x if x is None else x[span] for x in rows[:3])
        assert ids is not None
        of_rows = RowArguments(ids, mask, temperature, *rows[3:])
        of_kl = divergence_arguments(of_rows)
        kl[span], state = _register.overload("vocab_divergence", backend)(z, r, *of_kl)
        waiting = buffer[: z.shape[0]]
        if scale is not None:
            _register.overload("vocab_divergence_bwd_", backend)(
                scale[span], waiting, z, r, *of_kl, state
            )
        logprobs[span], found, _ = policy_rows.run(
            backend, z, g, of_rows, tokens.rows(span), return_entropy
        )
        if return_entropy:
            entropy[span] = found
        if scale is not None:
            g.add_(waiting)
    return logprobs.view(shape), entropy.view(shape) if return_entropy else entropy, kl.view(shape)


def _blocks(tensors: tuple[Tensor, ...], rows: int) -> Iterator[tuple[Any, ...]]:
    """Of tensors [..., V] at most `rows` rows at a time, as [n, V], behind the tokens' places."""
    first = tensors[0]
    if first.dim() == 2:
        pieces = [tensors]
    elif all(x.is_contiguous() for x in tensors):
        pieces = [tuple(x.view(-1, x.shape[-1]) for x in tensors)]
    else:
        pieces = list(zip(*(x.unbind(0) for x in tensors), strict=True))
    done = 0
    for piece in pieces:
        for begin in range(0, piece[0].shape[0], rows):
            parts = [x[begin : begin + rows] for x in piece]
            span = slice(done, done + parts[0].shape[0])
            yield span, *parts
            done = span.stop


def in_steps(
    loss: Any,
    logits: Tensor,
    rows: RowArguments,
    batch: definition.Batch,
    given: Denominators,
    return_entropy: bool,
    inplace: bool,
    reference: ReferenceLogits,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and KL first, then the loss of both."""
    if inplace and not torch.compiler.is_compiling():
        measured = reference.scale is None
        logprobs, entropy, kl = _InplaceBackward.apply(
            logits, reference.logits, rows, backend, measured
        )
    else:
        logprobs, entropy = token_logprobs(
            logits, rows.token_ids, **rows.keywords(), return_entropy=True
        )
        kl = divergence_of(logits, reference.logits, divergence_arguments(rows), backend)
    batch = batch._replace(logprobs=logprobs, entropy=entropy if return_entropy else None)
    return with_kl(*policy_loss(loss, batch, given), kl, reference.scale)


class _InplaceBackward(torch.autograd.Function):
    """logprobs, entropy and KL, whose backward writes the gradient of all three over the logits.

    One function of both: the one's gradient takes the place of the logits that the other's needs.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ref: Tensor, rows: RowArguments, backend: str, measured: bool
    ) -> Any:
        require_consecutive(logits, "inplace=True")
        logprobs, entropy, state = _register.overload("token_logprobs", backend)(
            logits, *rows, True
        )
        kl, kl_state = _register.overload("vocab_divergence", backend)(
            logits, ref, *divergence_arguments(rows)
        )
        ctx.rows, ctx.backend, ctx.measured = rows, backend, measured
        ctx.save_for_backward(logits, ref, logprobs, entropy, state, kl_state)
        return logprobs, entropy, kl

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        _register.refuse_create_graph("policy_loss_logits")
        logits, ref, logprobs, entropy, state, kl_state = ctx.saved_tensors
        logits = logits.detach()  # shares memory and version counter
        g, h, of_kl = (x.contiguous() for x in grads)
        waiting = None
        if not ctx.measured:  # or a NaN of the reference would be the policy's
            waiting = _register.overload("vocab_divergence_bwd", ctx.backend)(
                of_kl, logits, ref, *divergence_arguments(ctx.rows), kl_state
            )
        _register.overload("token_logprobs_bwd_", ctx.backend)(
            g, h, logits, *ctx.rows, logprobs, entropy, state
        )
        if waiting is not None:
            logits.add_(waiting)
        return logits, *[None] * 4

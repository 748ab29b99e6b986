"""A policy loss from hidden states: three products per chunk of tokens, nothing recomputed.

A chunk's gradient is known as soon as its logits are, where the loss is separable by token, or the
chunk holds its sequences whole: logits, hidden gradient and weight gradient, the last two only
where they are needed. Of a sequence that is longer than a chunk, whose tokens the loss couples, the
log-probabilities come first and the logits are made twice: four products.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlkern import _backend
from rlkern.ops import _register, policy_rows
from rlkern.ops._exact_kl import ChunkedKl, ReferenceHead, divergence_arguments, with_kl
from rlkern.ops._head import (
    Chunk,
    Cut,
    Head,
    HeadGradients,
    Logits,
    chunks,
    fake_gradients,
    padded,
    product_rows,
)
from rlkern.ops.linear_kl_divergence import head_divergence
from rlkern.ops.linear_token_logprobs import head_logprobs
from rlkern.ops.policy_logits import WholeArguments, loss_and_metrics, whole_arguments
from rlkern.ops.policy_loss import METRICS, policy_loss
from rlkern.ops.policy_rows import RowArguments, TokenArguments
from rlkern.reference import policy_loss as definition
from rlkern.reference.aggregation import Denominators

# Of so many rows one that is left out pays for finding it: its two products take 0.3 ms at D = 1024
# and V = 32768, a chunk's count and the rows that move into the gaps a tenth of it for each.
_FEW = 64
# Rows that move at a time, so that what moves is small beside a chunk.
_MOVED = 64


class SequenceArguments(NamedTuple):
    """A loss by sequence: tensors as a call of it takes them, denominators of the whole batch."""

    advantages: Tensor
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    rollout_logprobs: Tensor | None
    token_weights: Tensor | None
    entropy_mask: Tensor | None
    denominators: Tensor


def policy_loss_hidden(
    loss: Any,
    head: Head,
    rows: RowArguments,
    batch: definition.Batch,
    given: Denominators,
    return_entropy: bool,
    metrics: bool,
    compact: bool,
    reference: ReferenceHead | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss and the metrics' vector. `batch` has a stand-in of the right shape for logprobs."""
    hidden, weight, bias = head[:3]
    backend = _backend.choose("policy_loss", hidden.device.type, hidden.dtype)
    needs = [factor is not None and factor.requires_grad for factor in (hidden, weight, bias)]
    if backend == "eager" or not torch.is_grad_enabled() or not any(needs):
        logprobs, entropy, _ = head_logprobs(head, rows, return_entropy)
        value, vector = policy_loss(loss, batch._replace(logprobs=logprobs, entropy=entropy), given)
        if reference is None:
            return value, vector
        kl = head_divergence(
            *head[:3], reference[:3], head.cut, divergence_arguments(rows), backend
        )
        return with_kl(value, vector, kl, reference.scale)
    of_kl = reference or (None,) * 4
    whole = whole_arguments(loss, batch, given)
    cut = (*head.cut, backend, needs)
    if not policy_rows.is_separable(loss):
        of_sequences = SequenceArguments(
            batch.advantages,
            batch.old_logprobs,
            batch.ref_logprobs,
            batch.rollout_logprobs,
            batch.token_weights,
            batch.entropy_mask,
            policy_rows.whole_denominators(loss, batch, given),
        )
        value, vector, *_ = torch.ops.rlkern.policy_loss_sequences(
            hidden, weight, bias, *of_kl, *rows, *of_sequences, *whole, return_entropy, compact,
            *cut,
        )  # fmt: skip
        return value, vector
    tokens = policy_rows.token_arguments(loss, batch, given)
    active = None
    no_kl = not loss.kl_coef and (reference is None or reference.scale is None)
    if compact and no_kl and not loss.entropy_coef:
        active = tokens.advantages != 0
    value, vector, *_ = torch.ops.rlkern.policy_loss_hidden(
        hidden, weight, bias, *of_kl, *rows, *tokens, *whole, return_entropy, active, metrics,
        compact, *cut,
    )  # fmt: skip
    return value, vector


# ---- what both operators do to a chunk ----------------------------------------------------------


class _Pass:
    """One call's results, filled chunk by chunk; all that has one value per token is flat."""

    def __init__(
        self,
        head: Head,
        reference: tuple[Any, ...],
        rows: RowArguments,
        return_entropy: bool,
        backend: str,
        needs: list[bool],
    ) -> None:
        self.head, self.rows, self.backend = head, rows, backend
        self.return_entropy = return_entropy
        self.logits = Logits(head)
        self.kl = None
        if reference[0] is not None:
            self.kl = ChunkedKl(ReferenceHead(*reference), rows, head.cut, backend)
        hidden, total = head.hidden, head.hidden.shape[0]
        self.logprobs = hidden.new_zeros(total, dtype=torch.float32)
        self.entropy = hidden.new_zeros(total if return_entropy else 0, dtype=torch.float32)
        self.grads = HeadGradients(head, backend, needs)

    def look(self, chunk: Chunk, z: Tensor) -> Tensor:
        """Log-probabilities and entropy; returns the row pass's state."""
        logprobs, entropy, state = _register.overload("token_logprobs", self.backend)(
            z[: chunk.count], *self.of_rows(chunk), self.return_entropy
        )
        self.keep(chunk, logprobs, entropy)
        return state

    def gradient_of_kl(self, chunk: Chunk, z: Tensor) -> Tensor | None:
        """From the logits, while they still stand there; none where there is no such term."""
        return None if self.kl is None else self.kl.gradient(chunk, z)

    def keep(self, chunk: Chunk, logprobs: Tensor, entropy: Tensor) -> None:
        self.logprobs[chunk.rows] = logprobs
        if self.return_entropy:
            self.entropy[chunk.rows] = entropy

    def of_rows(self, chunk: Chunk) -> RowArguments:
        ids, mask, temperature = (chunk.of(x) for x in self.rows[:3])
        assert ids is not None
        return RowArguments(ids, mask, temperature, self.rows.temperature, self.rows.softcap)

    def multiply(self, chunk: Chunk, h: Tensor, z: Tensor, of_kl: Tensor | None) -> None:
        """The gradients, from that of the logits, which has taken their place, and the KL's."""
        if of_kl is not None:
            z[: chunk.count] += of_kl
        self.grads.add(chunk, h, z)

    def loss(
        self, shape: torch.Size, mask: Tensor | None, given: tuple[Any, ...], whole: WholeArguments
    ) -> tuple[Tensor, Tensor]:
        """Of all tokens, and the metrics."""
        entropy = self.entropy.view(shape) if self.return_entropy else None
        value, vector = loss_and_metrics(
            self.backend, self.logprobs.view(shape), entropy, mask, given, whole
        )
        if self.kl is None:
            return value, vector
        return with_kl(value, vector, self.kl.value, self.kl.scale)

    def gradients(self, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        of_hidden, of_weight, of_bias = self.grads.results()
        if self.grads.of_hidden is not None:
            of_hidden = of_hidden.view(shape)
        return of_hidden, of_weight, of_bias


def _flat_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, *cut: Any) -> Head:
    return Head(hidden.reshape(-1, hidden.shape[-1]), weight, bias, Cut(*cut))


# ---- losses that are separable by token ----------------------------------------------------------


def _by_tokens(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Any:
    reference, args = rest[:4], rest[4:]
    rows, tokens = RowArguments(*args[:5]), TokenArguments(*args[5:13])
    whole = WholeArguments(*args[13:18])
    return_entropy, active, metrics, compact, count, invariant, wide, backend, needs = args[18:]
    shape = hidden.shape[:-1]
    head = _flat_head(hidden, weight, bias, count, invariant, wide)
    done = _Pass(head, reference, rows.flat(), return_entropy, backend, needs)
    flat = tokens.flat()
    total, mask = head.hidden.shape[0], done.rows.mask
    learns = mask
    if active is not None:
        active = active.reshape(-1)
        learns = active if mask is None else active & mask
        if metrics:
            silent = ~active if mask is None else mask & ~active
            for chunk in chunks(total, silent, count, compact=compact):
                z = done.logits.of(chunk)[1]
                done.look(chunk, z)
                if done.kl is not None:
                    done.kl.look(chunk, z)
    for chunk in chunks(total, learns, count, compact=compact):
        h, z = done.logits.of(chunk)
        grads = z[: chunk.count]
        of_kl = done.gradient_of_kl(chunk, z)
        logprobs, entropy, upstream = policy_rows.run(
            backend,
            grads,
            grads,
            done.of_rows(chunk),
            flat.rows(chunk.rows),
            return_entropy,
        )
        done.keep(chunk, logprobs, entropy)
        if compact and not invariant and of_kl is None:
            chunk, h, z = _moved_together(head.cut, chunk, h, z, logprobs, upstream)
        done.multiply(chunk, h, z, of_kl)
    return *done.loss(shape, rows.mask, tokens[:6], whole), *done.gradients(hidden.shape)


def _moved_together(
    cut: Cut, chunk: Chunk, h: Tensor, grads: Tensor, logprobs: Tensor, *upstream: Tensor | None
) -> tuple[Chunk, Tensor, Tensor]:
    """Leaves rows whose gradient is 0 (clipped ones) out of the products to come: those behind move
    into their places, without memory for a second copy. Upstream: of log-probability and entropy,
    [count] each or [count, 2]."""
    # Where a logit is NaN the gradient is, too, whatever multiplies it.
    moves = logprobs.isnan()
    for x in upstream:
        if x is not None:
            moves |= x.reshape(len(moves), -1).any(-1)
    count = int(moves.sum())
    if (len(moves) - count) * _FEW < len(moves):
        return chunk, h, grads
    holes = (~moves[:count]).nonzero().squeeze(1)
    behind = moves[count:].nonzero().squeeze(1) + count
    for to, origin in zip(holes.split(_MOVED), behind.split(_MOVED), strict=True):
        grads[to] = grads[origin]
    order = torch.arange(count, device=moves.device)
    order[holes] = behind
    rows = chunk.rows
    places = order + rows.start if isinstance(rows, slice) else rows[order]
    wanted = product_rows(count, h, cut)
    return Chunk(places, count), padded(h[order], wanted), grads[:wanted]


# ---- losses that couple the tokens of a sequence -------------------------------------------------


class _Run(NamedTuple):
    """Sequences that are worked on together, and their tokens."""

    first: int
    last: int
    begin: int
    end: int


def _runs(shape: torch.Size, offsets: Tensor | None, rows: int) -> Iterator[_Run]:
    """As many whole sequences as fit into a chunk; a longer one by itself. Packed ones on a GPU all
    at once: where they end is not known here without a wait."""
    if offsets is None:
        count, length = shape
        step = max(rows // max(length, 1), 1)
        for first in range(0, count, step):
            last = min(first + step, count)
            yield _Run(first, last, first * length, last * length)
        return
    count = offsets.shape[0] - 1
    if offsets.device.type != "cpu":
        yield _Run(0, count, 0, shape[0])
        return
    ends = offsets.tolist()
    first = 0
    while first < count:
        last = first + 1
        while last < count and ends[last + 1] - ends[first] <= rows:
            last += 1
        yield _Run(first, last, ends[first], ends[last])
        first = last


def _by_sequences(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Any:
    reference, args = rest[:4], rest[4:]
    rows, given = RowArguments(*args[:5]), SequenceArguments(*args[5:12])
    whole = WholeArguments(*args[12:17])
    return_entropy, compact, count, invariant, wide, backend, needs = args[17:]
    shape = hidden.shape[:-1]
    head = _flat_head(hidden, weight, bias, count, invariant, wide)
    done = _Pass(head, reference, rows.flat(), return_entropy, backend, needs)
    for run in _runs(shape, whole.offsets, count):
        parts = list(
            chunks(head.hidden.shape[0], done.rows.mask, count, run.begin, run.end, compact)
        )
        held, states = None, []
        for chunk in parts:
            held = done.logits.of(chunk)
            states.append(done.look(chunk, held[1]))
        g, e = _upstream(done, run, shape, rows.mask, given, whole, backend)
        for chunk, state in zip(parts, states, strict=True):
            h, z = held if len(parts) == 1 and held is not None else done.logits.of(chunk)
            of_kl = done.gradient_of_kl(chunk, z)
            _register.overload("token_logprobs_bwd_", backend)(
                chunk.of(g), chunk.of(e), z[: chunk.count], *done.of_rows(chunk),
                chunk.of(done.logprobs),
                chunk.of(done.entropy) if return_entropy else done.entropy, state,
            )  # fmt: skip
            if compact and not invariant and of_kl is None:
                logprobs = chunk.of(done.logprobs)
                assert logprobs is not None
                upstream = chunk.of(g), chunk.of(e)
                chunk, h, z = _moved_together(head.cut, chunk, h, z, logprobs, *upstream)
            done.multiply(chunk, h, z, of_kl)
    return *done.loss(shape, rows.mask, given[:6], whole), *done.gradients(hidden.shape)


def _upstream(
    done: _Pass,
    run: _Run,
    shape: torch.Size,
    mask: Tensor | None,
    given: SequenceArguments,
    whole: WholeArguments,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """The loss's gradients with respect to log-probability and entropy, flat, right in the run."""
    packed = whole.offsets is not None
    span = slice(run.begin, run.end) if packed else slice(run.first, run.last)
    offsets = None
    if whole.offsets is not None:
        offsets = whole.offsets[run.first : run.last + 1] - run.begin

    def part(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        by_sequence = (
            x.dim() == 1 and x is given.advantages and x.shape[0] == _sequences(shape, whole)
        )
        return x[run.first : run.last] if by_sequence else x[span]

    advantages, old, ref, rollout, weights, entropy_mask = (part(x) for x in given[:6])
    entropy = part(done.entropy.view(shape)) if done.return_entropy else None
    wants_entropy = whole.options[11] != 0  # entropy_coef
    _, _, g, e, scale = _register.overload("policy_loss", backend)(
        part(done.logprobs.view(shape)), advantages, part(mask), old, ref, rollout, entropy,
        weights, entropy_mask, offsets, *given.denominators.unbind(), whole.options, True,
        wants_entropy,
    )  # fmt: skip

    def placed(x: Tensor, factor: Tensor) -> Tensor:
        full = torch.zeros_like(done.logprobs)
        full[run.begin : run.end] = x.reshape(-1) * factor
        return full

    return placed(g, scale[0]), placed(e, scale[1]) if wants_entropy else None


def _sequences(shape: torch.Size, whole: WholeArguments) -> int:
    return shape[0] if whole.offsets is None else whole.offsets.shape[0] - 1


# ---- autograd ------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # Or the backward would be handed zeros in the shape of each result, gradients included.
    ctx.set_materialize_grads(False)
    _, *constants = output
    ctx.mark_non_differentiable(*constants)
    ctx.save_for_backward(*constants[1:])
    ctx.arguments, ctx.backend, ctx.needs = len(inputs), inputs[-2], inputs[-1]


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> Any:
    _register.refuse_create_graph("policy_loss_hidden")
    grads = [
        _register.scaled(ctx.backend, grad, grad_loss) if needs else None
        for grad, needs in zip(ctx.saved_tensors, ctx.needs, strict=True)
    ]
    return *grads, *[None] * (ctx.arguments - 3)


def _fake(hidden, weight, bias, *rest):
    needs = rest[-1]
    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty((METRICS,), dtype=torch.float64),
        *fake_gradients((hidden, weight, bias), needs),
    )


for _name, _function in (
    ("policy_loss_hidden", _by_tokens),
    ("policy_loss_sequences", _by_sequences),
):
    _register.register_composite(_name, _function, _fake)
    torch.library.register_autograd(
        f"rlkern::{_name}", _backward, setup_context=_setup_context, lib=_register.LIBRARY
    )

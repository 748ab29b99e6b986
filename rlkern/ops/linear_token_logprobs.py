"""linear_token_logprobs: log-probability and entropy of chosen tokens, from hidden states.

A loop over chunks of tokens: logits by torch.mm, then the row pass of token_logprobs, so that a
call has one chunk's logits in memory. The backward makes them once more: four products in all. On a
CPU, where a chunk is small, logits that are no more than that wait for it instead: three products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from rlkern import _backend
from rlkern.ops import _checks, _register, _vocab_parallel
from rlkern.ops._head import (
    Cut,
    Head,
    HeadGradients,
    Logits,
    checked_cut,
    checked_products,
    chunks,
    fake_gradients,
)
from rlkern.ops._vocab_parallel import Columns
from rlkern.ops.policy_rows import RowArguments
from rlkern.ops.token_logprobs import TokenLogprobs
from rlkern.reference import linear_token_logprobs as reference
from rlkern.reference.token_logprobs import wide_dtype

#: What linear_token_logprobs also gives of its pass over the logits, as its fields are ordered.
OUTPUTS = ("mean_logits", "is_top1", "log_sum_sq_probs")


class TokenOutputs(NamedTuple):
    """What linear_token_logprobs returns with ``outputs``."""

    logprobs: Tensor
    entropy: Tensor | None
    mean_logits: Tensor | None
    is_top1: Tensor | None
    log_sum_sq_probs: Tensor | None


@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = ...,
    mask: Tensor | None = ...,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    return_entropy: Literal[False] = ...,
    logits_dtype: torch.dtype | None = ...,
    memory_budget: int | None = ...,
    batch_invariant: bool = ...,
    vocab_group: Any = ...,
) -> Tensor: ...
@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = ...,
    mask: Tensor | None = ...,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    return_entropy: Literal[True],
    logits_dtype: torch.dtype | None = ...,
    memory_budget: int | None = ...,
    batch_invariant: bool = ...,
    vocab_group: Any = ...,
) -> TokenLogprobs: ...
@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = ...,
    mask: Tensor | None = ...,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    return_entropy: bool = ...,
    outputs: Sequence[str],
    logits_dtype: torch.dtype | None = ...,
    memory_budget: int | None = ...,
    batch_invariant: bool = ...,
    vocab_group: Any = ...,
) -> TokenOutputs: ...
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_entropy: bool = False,
    outputs: Sequence[str] = (),
    logits_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    batch_invariant: bool = False,
    vocab_group: Any = None,
) -> Tensor | TokenLogprobs | TokenOutputs:
    """Log-probability of chosen tokens from hidden states and the lm_head, the logits never whole.

    With z = softcap(logit_scale * (h W^T + b)) / temperature the results are those of
    :func:`token_logprobs`. The logits of a chunk of tokens at a time are in memory, in the dtype of
    the hidden states (under autocast, in autocast's), as lm_head(hidden) would give them. Gradients
    go to hidden, weight and bias, each product only where it is needed; first derivatives, in
    reverse mode, only. The chunks' parts of the weight's and the bias's gradient are added in fp32.

    Masked tokens cost nothing on a CPU: they are left out of every product. On a GPU that would
    make the host wait, so there their rows are multiplied, and nothing else.

    Args:
        hidden: [..., D], float32, bfloat16, float16, or float64 (which runs in eager PyTorch).
        weight: [V, D], of the lm_head, in the dtype of hidden (except under autocast).
        token_ids: [...], int64 or int32, in [0, V) where the mask is true.
        bias: [V], in the dtype of hidden (except under autocast).
        mask, temperature, softcap, return_entropy: as in token_logprobs.
        logit_scale: a positive number (1e-37 to 1e37) that multiplies h W^T + b, as in Cohere's
            models; 1 / logits_scaling in Granite's.
        outputs: more of the same pass over the logits, without gradient, by name: "mean_logits",
            the mean of z over the vocabulary; "is_top1", whether the token is the argmax of z, the
            first of equal ones; "log_sum_sq_probs", log sum_j p_j^2. The names are TRL's.
        logits_dtype: torch.float32 keeps the logits of 16-bit factors unrounded; their gradient is
            rounded for the products. On a GPU that costs the wider logits' traffic, on a CPU, which
            has no such product, the time of a product in fp32. None: the dtype of hidden.
        memory_budget: bytes of logits in memory at a time (None: 64 MiB on a CPU, 1 GiB on a GPU),
            at least enough for 64 tokens. Fewer, larger chunks are faster: the weight's gradient is
            read and written once a chunk. On a CPU the logits of a call whose tokens, masked ones
            included, fit into it wait for the backward in memory (in eager mode, without
            batch_invariant): each call whose backward is still to come holds its own.
        batch_invariant: every product has the same shape, whatever the number of tokens, by padding
            the last chunk with zeros; a token's results and the gradient of its hidden state then
            do not depend on the batch around it, on one machine with one number of threads.
        vocab_group: a torch.distributed process group over whose ranks the lm_head is spread: each
            holds V consecutive rows of it, in the order of the ranks, the same hidden states and
            the same of everything else; token_ids then count over all rows. As in token_logprobs,
            with one all-reduce more in the backward, of the gradient of hidden, which every rank
            gets whole.

    Returns:
        logprobs [...], float32 (float64 for float64 hidden); with return_entropy a
        TokenLogprobs (logprobs, entropy); with outputs a TokenOutputs (logprobs, entropy,
        mean_logits, is_top1, log_sum_sq_probs), of which what was not asked for is None.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device or range, as in token_logprobs.
        RuntimeError: a backend was asked for that cannot serve the call; an input with a
            forward-mode tangent.
    """
    hidden, weight, bias = checked_products(hidden, weight, bias)
    ids = _checks.require_ids(token_ids, "token_ids", hidden, "hidden")
    mask = _checks.optional_mask(mask, hidden, "hidden")
    number, per_token = _checks.token_temperature(temperature, hidden, "hidden")
    if softcap is not None:
        softcap = _checks.positive_number(softcap, "softcap")
    scale = _checks.positive_number(logit_scale, "logit_scale")
    cut = checked_cut(hidden, weight, memory_budget, batch_invariant, logits_dtype)
    names = _checked_outputs(outputs, vocab_group)
    columns = None
    if vocab_group is not None:
        columns = _vocab_parallel.Columns.of(weight.shape[0], vocab_group, hidden.device)
    vocab = weight.shape[0] if columns is None else columns.total
    _checks.check_token_values(ids, mask, per_token, vocab)
    number, per_token, softcap = reference.without_scale(scale, number, per_token, softcap)
    arguments = RowArguments(ids, mask, per_token, number, softcap)
    head = Head(hidden, weight, bias, cut)
    logprobs, entropy, more = head_logprobs(head, arguments, return_entropy, bool(names), columns)
    if names:
        mean, squares, top = more.unbind(-1)
        found = {"mean_logits": mean, "is_top1": top != 0, "log_sum_sq_probs": squares}
        return TokenOutputs(logprobs, entropy, *(found[n] if n in names else None for n in OUTPUTS))
    if entropy is None:
        return logprobs
    return TokenLogprobs(logprobs, entropy)


def _checked_outputs(outputs: object, vocab_group: object) -> frozenset[str]:
    if isinstance(outputs, str) or not isinstance(outputs, Sequence):
        raise TypeError(f"outputs: expected a sequence of names, got {outputs!r}")
    for name in outputs:
        _checks.one_of(name, OUTPUTS, "outputs")
    if outputs and vocab_group is not None:
        raise ValueError(f"outputs: expected none with a vocab_group, got {tuple(outputs)}")
    return frozenset(outputs)


def head_logprobs(
    head: Head,
    arguments: RowArguments,
    return_entropy: bool,
    outputs: bool = False,
    columns: Columns | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """logprobs [...] and entropy, differentiable, and outputs [..., 3], from checked arguments."""
    hidden, cut = head.hidden, head.cut
    backend = _backend.choose("token_logprobs", hidden.device.type, hidden.dtype)
    flat = head._replace(hidden=hidden.reshape(-1, hidden.shape[-1]))
    args = (*flat[:3], *arguments.flat(), return_entropy, outputs, *cut, backend)
    keeps = _keeps_logits(flat)
    if keeps or columns is not None:
        logprobs, entropy, more = _LinearTokenLogprobs.apply(columns, keeps, *args)
    else:
        logprobs, entropy, _, more = torch.ops.rlkern.linear_token_logprobs(*args)
    shape = hidden.shape[:-1]
    return (
        logprobs.view(shape),
        entropy.view(shape) if return_entropy else None,
        more.view(*shape, 3) if outputs else more,
    )


def _keeps_logits(head: Head) -> bool:
    """Whether the logits wait for the backward. A padded chunk would be many times the logits."""
    factors = [factor for factor in head[:3] if factor is not None]
    return (
        # First, since who traces must not be made to guard on the number of tokens.
        _register.is_plain_eager(*factors)
        and torch.is_grad_enabled()
        and any(factor.requires_grad for factor in factors)
        and head.hidden.device.type == "cpu"
        and not head.cut.invariant
        and head.hidden.shape[0] <= head.cut.rows
    )


# ---- the operator ------------------------------------------------------------------------------


def _forward(
    hidden, weight, bias, token_ids, mask, token_temperature, temperature, softcap, return_entropy,
    outputs, rows, invariant, wide, backend,
):  # fmt: skip
    return _row_passes(
        Logits(Head(hidden, weight, bias, Cut(rows, invariant, wide))), token_ids, mask,
        token_temperature, temperature, softcap, return_entropy, outputs, backend,
    )  # fmt: skip


def _row_passes(
    logits, token_ids, mask, token_temperature, temperature, softcap, return_entropy, outputs,
    backend,
):  # fmt: skip
    hidden = logits.hidden
    dtype = wide_dtype(hidden)
    total = hidden.shape[0]
    # Masked tokens, which no chunk may hold, stay 0.
    logprobs = hidden.new_zeros(total, dtype=dtype)
    entropy = hidden.new_zeros(total if return_entropy else 0, dtype=dtype)
    state = hidden.new_zeros((total, 2), dtype=dtype)
    more = hidden.new_zeros((total, 3) if outputs else 0, dtype=dtype)
    row_pass = _register.overload(
        "token_logprobs_outputs" if outputs else "token_logprobs", backend
    )
    for chunk in chunks(total, mask, logits.cut.rows):
        _, z = logits.of(chunk)
        logprobs[chunk.rows], found, state[chunk.rows], *also = row_pass(
            z[: chunk.count], chunk.of(token_ids), chunk.of(mask), chunk.of(token_temperature),
            temperature, softcap, return_entropy,
        )  # fmt: skip
        if return_entropy:
            entropy[chunk.rows] = found
        if outputs:
            more[chunk.rows] = also[0]
    return logprobs, entropy, state, more


def _backward(
    grad_logprobs, grad_entropy, hidden, weight, bias, token_ids, mask, token_temperature,
    temperature, softcap, logprobs, entropy, state, rows, invariant, wide, backend, needs, *,
    kept=None,
):  # fmt: skip
    head = Head(hidden, weight, bias, Cut(rows, invariant, wide))
    gradients = HeadGradients(head, backend, needs)
    row_pass = _register.overload("token_logprobs_bwd_", backend)
    logits = Logits(head, kept)
    for chunk in chunks(hidden.shape[0], mask, rows):
        h, z = logits.of(chunk)
        grads = z[: chunk.count]
        row_pass(
            chunk.of(grad_logprobs), chunk.of(grad_entropy), grads, chunk.of(token_ids),
            chunk.of(mask), chunk.of(token_temperature), temperature, softcap,
            chunk.of(logprobs), chunk.of(entropy) if entropy.numel() else entropy,
            state[chunk.rows],
        )  # fmt: skip
        gradients.add(chunk, h, z)
    return gradients.results()


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...], kept: Tensor | None = None
) -> None:
    hidden, weight, bias, ids, mask, per_token, *ctx.numbers = inputs
    logprobs, entropy, state, more = output
    ctx.mark_non_differentiable(state, more)
    ctx.taken = kept is None
    ctx.save_for_backward(
        kept, hidden, weight, bias, ids, mask, per_token, logprobs, entropy, state
    )


def _gradients(ctx: Any, grads: Sequence[Tensor | None], needs: Sequence[bool]) -> Any:
    temperature, softcap, return_entropy, _, rows, invariant, wide, backend = ctx.numbers
    kept, *tensors, logprobs, entropy, state = ctx.saved_tensors
    arguments = (
        grads[0], grads[1] if return_entropy else None, *tensors, temperature, softcap, logprobs,
        entropy, state, rows, invariant, wide, backend, list(needs),
    )  # fmt: skip
    # The gradient takes the place of the logits. A graph whose backward failed after that may run
    # again, and makes them anew.
    if not ctx.taken and all(_register.may_give_away(g) for g in grads if g is not None):
        ctx.taken = True
        # .data has a version of its own: to write over it is nobody's error.
        found = _backward(*arguments, kept=kept.data)
    else:
        found = torch.ops.rlkern.linear_token_logprobs_bwd(*arguments)
    return tuple(grad if needed else None for grad, needed in zip(found, needs, strict=True))


def _autograd(ctx: Any, *grads: Tensor | None) -> Any:
    return *_gradients(ctx, grads, ctx.needs_input_grad[:3]), *[None] * 11


class _LinearTokenLogprobs(torch.autograd.Function):
    """Of eager mode: torch.compile traces neither logits that wait for the backward, as many as the
    mask has tokens, nor the collectives of a lm_head that is spread over processes."""

    @staticmethod
    def forward(ctx: Any, columns: Columns | None, keeps: bool, *args: Any) -> tuple[Tensor, ...]:
        hidden, weight, bias, ids, mask, per_token, temperature, *numbers = args
        softcap, return_entropy, outputs, *cut, backend = numbers
        here = ids if columns is None else columns.own_ids(ids)
        logits = Logits(Head(hidden, weight, bias, Cut(*cut)))
        logprobs, entropy, state, more = _row_passes(
            logits, here, mask, per_token, temperature, softcap, return_entropy, outputs, backend
        )
        if columns is not None:
            inverse = 1.0 / temperature if per_token is None else 1.0 / per_token.double()
            logprobs, entropy, state = columns.merged(logprobs, entropy, state, here, mask, inverse)
        ctx.columns = columns
        _setup_context(
            ctx,
            (hidden, weight, bias, here, mask, per_token, temperature, *numbers),
            (logprobs, entropy, state, more),
            logits.memory if keeps else None,
        )
        return logprobs, entropy, more

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if ctx.columns is not None:
            _register.refuse_create_graph("linear_token_logprobs")
        of_hidden, *rest = _gradients(ctx, grads, ctx.needs_input_grad[2:5])
        if of_hidden is not None and ctx.columns is not None:
            of_hidden = ctx.columns.summed(of_hidden)
        return None, None, of_hidden, *rest, *[None] * 11


def _fake(hidden, weight, bias, *rest):
    dtype = wide_dtype(hidden)
    total, return_entropy, outputs = hidden.shape[0], rest[5], rest[6]
    return (
        hidden.new_empty((total,), dtype=dtype),
        hidden.new_empty((total if return_entropy else 0,), dtype=dtype),
        hidden.new_empty((total, 2), dtype=dtype),
        hidden.new_empty((total, 3) if outputs else (0,), dtype=dtype),
    )


def _fake_backward(grad_logprobs, grad_entropy, hidden, weight, bias, *rest):
    return fake_gradients((hidden, weight, bias), rest[-1])


_register.register_composite("linear_token_logprobs", _forward, _fake)
_register.register_composite("linear_token_logprobs_bwd", _backward, _fake_backward)
torch.library.register_autograd(
    "rlkern::linear_token_logprobs", _autograd, setup_context=_setup_context, lib=_register.LIBRARY
)
_register.forbid_second_derivative("linear_token_logprobs_bwd")

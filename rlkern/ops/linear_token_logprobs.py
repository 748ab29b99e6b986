"""linear_token_logprobs: log-probability and entropy of chosen tokens, from hidden states.

A loop over chunks of tokens: logits by torch.mm, then the row pass of token_logprobs, so that only
one chunk's logits are ever in memory. The backward makes them once more: four products in all, two
where neither the weight nor the bias needs a gradient, and the logits'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from rlkern import _backend
from rlkern.ops import _checks, _register, _vocab_parallel
from rlkern.ops._head import (
    MEMORY_BUDGET,
    GradientSum,
    Logits,
    checked_budget,
    checked_products,
    chunk_rows,
    chunks,
)
from rlkern.ops._vocab_parallel import Columns
from rlkern.ops.policy_rows import RowArguments
from rlkern.ops.token_logprobs import TokenLogprobs
from rlkern.reference import linear_token_logprobs as reference


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
    memory_budget: int = ...,
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
    memory_budget: int = ...,
    batch_invariant: bool = ...,
    vocab_group: Any = ...,
) -> TokenLogprobs: ...
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
    memory_budget: int = MEMORY_BUDGET,
    batch_invariant: bool = False,
    vocab_group: Any = None,
) -> Tensor | TokenLogprobs:
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
        memory_budget: bytes of logits in memory at a time, at least enough for 64 tokens. Fewer,
            larger chunks are faster: the weight's gradient is read and written once a chunk.
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
        TokenLogprobs (logprobs, entropy).

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
    rows = chunk_rows(weight.shape[0], hidden.element_size(), checked_budget(memory_budget))
    if not isinstance(batch_invariant, bool):
        raise TypeError(f"batch_invariant: expected a bool, got {batch_invariant!r}")
    columns = None
    if vocab_group is not None:
        columns = _vocab_parallel.Columns.of(weight.shape[0], vocab_group, hidden.device)
    vocab = weight.shape[0] if columns is None else columns.total
    _checks.check_token_values(ids, mask, per_token, vocab)
    number, per_token, softcap = reference.without_scale(scale, number, per_token, softcap)
    arguments = RowArguments(ids, mask, per_token, number, softcap)
    logprobs, entropy = head_logprobs(
        hidden, weight, bias, rows, batch_invariant, arguments, return_entropy, columns
    )
    if entropy is None:
        return logprobs
    return TokenLogprobs(logprobs, entropy)


def head_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: int,
    invariant: bool,
    arguments: RowArguments,
    return_entropy: bool,
    columns: Columns | None = None,
) -> tuple[Tensor, Tensor | None]:
    """logprobs [...] and entropy, differentiable, from checked arguments."""
    backend = _backend.choose("token_logprobs", hidden.device.type, hidden.dtype)
    flat = hidden.reshape(-1, hidden.shape[-1])
    args = (*arguments.flat(), return_entropy, rows, invariant, backend)
    if columns is None:
        logprobs, entropy, _ = torch.ops.rlkern.linear_token_logprobs(flat, weight, bias, *args)
    else:
        logprobs, entropy = _Parallel.apply(columns, flat, weight, bias, *args)
    shape = hidden.shape[:-1]
    return logprobs.view(shape), entropy.view(shape) if return_entropy else None


# ---- the operator ------------------------------------------------------------------------------


def _forward(
    hidden, weight, bias, token_ids, mask, token_temperature, temperature, softcap, return_entropy,
    rows, invariant, backend,
):  # fmt: skip
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    total = hidden.shape[0]
    # Masked tokens, which no chunk may hold, stay 0.
    logprobs = hidden.new_zeros(total, dtype=dtype)
    entropy = hidden.new_zeros(total if return_entropy else 0, dtype=dtype)
    state = hidden.new_zeros((total, 2), dtype=dtype)
    row_pass = _register.overload("token_logprobs", backend)
    logits = Logits(hidden, weight, bias, rows, invariant)
    for chunk in chunks(hidden.shape[0], mask, rows):
        _, z = logits.of(chunk)
        logprobs[chunk.rows], found, state[chunk.rows] = row_pass(
            z[: chunk.count], chunk.of(token_ids), chunk.of(mask), chunk.of(token_temperature),
            temperature, softcap, return_entropy,
        )  # fmt: skip
        if return_entropy:
            entropy[chunk.rows] = found
    return logprobs, entropy, state


def _backward(
    grad_logprobs, grad_entropy, hidden, weight, bias, token_ids, mask, token_temperature,
    temperature, softcap, logprobs, entropy, state, rows, invariant, backend, needs,
):  # fmt: skip
    needs_hidden, needs_weight, needs_bias = needs
    grad_hidden = torch.zeros_like(hidden) if needs_hidden else hidden.new_empty(0)
    of_weight = GradientSum(weight) if needs_weight else None
    of_bias = GradientSum(bias) if needs_bias else None
    row_pass = _register.overload("token_logprobs_bwd_", backend)
    logits = Logits(hidden, weight, bias, rows, invariant)
    for chunk in chunks(hidden.shape[0], mask, rows):
        h, z = logits.of(chunk)
        grads = z[: chunk.count]
        row_pass(
            chunk.of(grad_logprobs), chunk.of(grad_entropy), grads, chunk.of(token_ids),
            chunk.of(mask), chunk.of(token_temperature), temperature, softcap,
            chunk.of(logprobs), chunk.of(entropy) if entropy.numel() else entropy,
            state[chunk.rows],
        )  # fmt: skip
        z[chunk.count :] = 0
        if needs_hidden:
            grad_hidden[chunk.rows] = torch.mm(z, weight)[: chunk.count]
        if of_weight is not None:
            of_weight.add_product(grads, h[: chunk.count])
        if of_bias is not None:
            of_bias.add(grads)
    return (
        grad_hidden,
        hidden.new_empty(0) if of_weight is None else of_weight.result(),
        hidden.new_empty(0) if of_bias is None else of_bias.result(),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, ids, mask, per_token, *ctx.numbers = inputs
    logprobs, entropy, state = output
    ctx.mark_non_differentiable(state)
    ctx.save_for_backward(hidden, weight, bias, ids, mask, per_token, logprobs, entropy, state)


def _gradients(ctx: Any, grads: Sequence[Tensor | None], needs: Sequence[bool]) -> Any:
    temperature, softcap, return_entropy, rows, invariant, backend = ctx.numbers
    *tensors, logprobs, entropy, state = ctx.saved_tensors
    found = torch.ops.rlkern.linear_token_logprobs_bwd(
        grads[0], grads[1] if return_entropy else None, *tensors, temperature, softcap, logprobs,
        entropy, state, rows, invariant, backend, list(needs),
    )  # fmt: skip
    return tuple(grad if needed else None for grad, needed in zip(found, needs, strict=True))


def _autograd(ctx: Any, *grads: Tensor | None) -> Any:
    return *_gradients(ctx, grads, ctx.needs_input_grad[:3]), *[None] * 9


class _Parallel(torch.autograd.Function):
    """Of a lm_head that is spread over processes; of eager mode, for its collectives."""

    @staticmethod
    def forward(ctx: Any, columns: Columns, *args: Any) -> tuple[Tensor, Tensor]:
        hidden, weight, bias, ids, mask, per_token, temperature, *numbers = args
        here = columns.own_ids(ids)
        inputs = (hidden, weight, bias, here, mask, per_token, temperature, *numbers)
        inverse = 1.0 / temperature if per_token is None else 1.0 / per_token.double()
        logprobs, entropy, state = _forward(*inputs)
        output = columns.merged(logprobs, entropy, state, here, mask, inverse)
        ctx.columns = columns
        _setup_context(ctx, inputs, output)
        return output[0], output[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        _register.refuse_create_graph("linear_token_logprobs")
        of_hidden, *rest = _gradients(ctx, grads, ctx.needs_input_grad[1:4])
        if of_hidden is not None:
            of_hidden = ctx.columns.summed(of_hidden)
        return None, of_hidden, *rest, *[None] * 9


def _fake(hidden, weight, bias, *rest):
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    total, return_entropy = hidden.shape[0], rest[5]
    return (
        hidden.new_empty((total,), dtype=dtype),
        hidden.new_empty((total if return_entropy else 0,), dtype=dtype),
        hidden.new_empty((total, 2), dtype=dtype),
    )


def _fake_backward(grad_logprobs, grad_entropy, hidden, weight, bias, *rest):
    needed = zip((hidden, weight, bias), rest[-1], strict=True)
    return tuple(torch.empty_like(like) if needs else hidden.new_empty(0) for like, needs in needed)


_register.register_composite("linear_token_logprobs", _forward, _fake)
_register.register_composite("linear_token_logprobs_bwd", _backward, _fake_backward)
torch.library.register_autograd(
    "rlkern::linear_token_logprobs", _autograd, setup_context=_setup_context, lib=_register.LIBRARY
)
_register.forbid_second_derivative("linear_token_logprobs_bwd")

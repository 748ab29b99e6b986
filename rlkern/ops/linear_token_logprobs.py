"""linear_token_logprobs: log-probability and entropy of chosen tokens, from hidden states.

A loop over chunks of tokens: logits by torch.mm, then the row pass of token_logprobs, so that only
one chunk's logits are ever in memory. The backward makes them once more: four products in all, two
where neither the weight nor the bias needs a gradient, and the logits'.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, overload

import torch
from torch import Tensor

from rlkern import _backend
from rlkern.ops import _checks, _register
from rlkern.ops.token_logprobs import TokenLogprobs
from rlkern.reference import linear_token_logprobs as reference

#: Bytes of logits that a call holds at a time, unless it says otherwise.
MEMORY_BUDGET = 96 << 20
# Chunks are whole multiples of what the matrix kernels work on at a time.
_ROWS = 64
# Of the weight gradient that one chunk gives, before it is added to the sum.
_PART_BYTES = 16 << 20


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

    Returns:
        logprobs [...], float32 (float64 for float64 hidden); with return_entropy a
        TokenLogprobs (logprobs, entropy).

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device or range, as in token_logprobs.
        RuntimeError: a backend was asked for that cannot serve the call; an input with a
            forward-mode tangent.
    """
    hidden, weight, bias = _checked_products(hidden, weight, bias)
    ids = _checks.require_ids(token_ids, "token_ids", hidden, "hidden")
    mask = _checks.optional_mask(mask, hidden, "hidden")
    number, per_token = _checks.token_temperature(temperature, hidden, "hidden")
    if softcap is not None:
        softcap = _checks.positive_number(softcap, "softcap")
    scale = _checks.positive_number(logit_scale, "logit_scale")
    if isinstance(memory_budget, bool) or not isinstance(memory_budget, int):
        raise TypeError(f"memory_budget: expected an int, got {type(memory_budget).__name__}")
    if memory_budget < 1:
        raise ValueError(f"memory_budget: expected at least 1 byte, got {memory_budget}")
    if not isinstance(batch_invariant, bool):
        raise TypeError(f"batch_invariant: expected a bool, got {batch_invariant!r}")
    vocab = weight.shape[0]
    _checks.check_token_values(ids, mask, per_token, vocab)
    backend = _backend.choose("token_logprobs", hidden.device.type, hidden.dtype)
    shape = ids.shape
    number, per_token, softcap = reference.without_scale(scale, number, per_token, softcap)
    logprobs, entropy, _ = torch.ops.rlkern.linear_token_logprobs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        ids.reshape(-1),
        None if mask is None else mask.reshape(-1),
        None if per_token is None else per_token.reshape(-1),
        number,
        softcap,
        return_entropy,
        _chunk_rows(vocab, hidden.element_size(), memory_budget),
        batch_invariant,
        backend,
    )
    if not return_entropy:
        return logprobs.view(shape)
    return TokenLogprobs(logprobs.view(shape), entropy.view(shape))


def _chunk_rows(vocab: int, element_size: int, memory_budget: int) -> int:
    """Tokens of a chunk: not a matter of how many there are."""
    return max(memory_budget // (vocab * element_size) // _ROWS, 1) * _ROWS


def _checked_products(
    hidden: object, weight: object, bias: object
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The factors, under autocast in its dtype."""
    h = _checks.require_logits(hidden, "hidden", "[..., D] with D of at least 1")
    w = _checks.require_logits(weight, "weight", "[V, D] with D of at least 1")
    if w.dim() != 2 or w.shape[0] == 0 or w.shape[1] != h.shape[-1]:
        raise ValueError(
            f"weight: expected shape [V, {h.shape[-1]}] (hidden's last dimension) with V of at "
            f"least 1, got {list(w.shape)}"
        )
    b = None
    if bias is not None:
        b = _checks.require_logits(bias, "bias", "[V]")
        if b.shape != w.shape[:1]:
            raise ValueError(
                f"bias: expected shape [{w.shape[0]}] (weight's rows), got {list(b.shape)}"
            )
    for name, factor in (("hidden", h), ("weight", w), ("bias", b)):
        if factor is None:
            continue
        _checks.refuse_tangent(factor, name)
        if factor.device != h.device:
            raise ValueError(f"{name}: expected device {h.device} (hidden's), got {factor.device}")
    kind = h.device.type
    if torch.is_autocast_enabled(kind) and h.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        return h.to(dtype), w.to(dtype), None if b is None else b.to(dtype)
    for name, factor in (("weight", w), ("bias", b)):
        if factor is not None and factor.dtype != h.dtype:
            raise TypeError(f"{name}: expected {h.dtype} (hidden's dtype), got {factor.dtype}")
    return h, w, b


# ---- the operator ------------------------------------------------------------------------------


class _Chunk:
    """Some tokens: which, their hidden states, and a buffer's worth of their logits."""

    def __init__(self, rows: slice | Tensor, count: int) -> None:
        self.rows, self.count = rows, count

    def of(self, values: Tensor | None) -> Tensor | None:
        return None if values is None else values[self.rows]


def _chunks(hidden: Tensor, mask: Tensor | None, rows: int) -> Iterator[_Chunk]:
    """Chunks of at most `rows` tokens; without the masked ones where nobody waits for the count."""
    if mask is not None and mask.device.type == "cpu":
        places = mask.nonzero().squeeze(1)
        for part in places.split(rows):
            yield _Chunk(part, part.shape[0])
        return
    total = hidden.shape[0]
    for begin in range(0, total, rows):
        end = min(begin + rows, total)
        yield _Chunk(slice(begin, end), end - begin)


def _products(hidden: Tensor, chunk: _Chunk, rows: int, invariant: bool) -> Tensor:
    """The hidden states of a chunk, padded to the shape that every product has."""
    part = hidden[chunk.rows]
    if not invariant or chunk.count == rows:
        return part
    return torch.cat([part, part.new_zeros(rows - chunk.count, part.shape[1])])


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
    for chunk in _chunks(hidden, mask, rows):
        z = reference.logits(_products(hidden, chunk, rows, invariant), weight, bias)
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
    of_weight = _Sum(weight) if needs_weight else None
    of_bias = _Sum(bias) if needs_bias else None
    row_pass = _register.overload("token_logprobs_bwd_", backend)
    for chunk in _chunks(hidden, mask, rows):
        h = _products(hidden, chunk, rows, invariant)
        z = reference.logits(h, weight, bias)
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


class _Sum:
    """A gradient that several chunks give parts of, added in fp32 (fp64 for fp64)."""

    def __init__(self, like: Tensor) -> None:
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.dtype = like.dtype
        self.sum = torch.zeros(like.shape, dtype=wide, device=like.device)

    def add_product(self, grads: Tensor, hidden: Tensor) -> None:
        """Of the weight: grads^T hidden."""
        if self.sum.dtype == grads.dtype:
            self.sum.addmm_(grads.t(), hidden)
            return
        # By parts of the vocabulary: the product is rounded before it is added, and is not whole
        # in memory beside the sum.
        part = max(_PART_BYTES // (hidden.shape[1] * hidden.element_size()), 1)
        for begin in range(0, self.sum.shape[0], part):
            columns = slice(begin, begin + part)
            self.sum[columns] += torch.mm(grads[:, columns].t(), hidden)

    def add(self, grads: Tensor) -> None:
        """Of the bias."""
        self.sum += grads.sum(0, dtype=self.sum.dtype)

    def result(self) -> Tensor:
        return self.sum.to(self.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, ids, mask, per_token, *ctx.numbers = inputs
    logprobs, entropy, state = output
    ctx.mark_non_differentiable(state)
    ctx.save_for_backward(hidden, weight, bias, ids, mask, per_token, logprobs, entropy, state)


def _autograd(ctx: Any, *grads: Tensor | None) -> Any:
    temperature, softcap, return_entropy, rows, invariant, backend = ctx.numbers
    *tensors, logprobs, entropy, state = ctx.saved_tensors
    found = torch.ops.rlkern.linear_token_logprobs_bwd(
        grads[0], grads[1] if return_entropy else None, *tensors, temperature, softcap, logprobs,
        entropy, state, rows, invariant, backend, list(ctx.needs_input_grad[:3]),
    )  # fmt: skip
    needed = zip(found, ctx.needs_input_grad, strict=False)
    return (*(grad if needs else None for grad, needs in needed), *[None] * 9)


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

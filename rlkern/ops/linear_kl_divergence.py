"""linear_kl_divergence: the exact divergence over the vocabulary, from hidden states.

A loop over chunks of tokens: the policy's logits and the reference's by torch.mm, then the two-row
pass of kl_divergence, so that only one chunk of each is ever in memory. The backward makes both
once more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlkern import _backend
from rlkern.ops import _checks, _register
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
from rlkern.ops.kl_divergence import DivergenceArguments, checked_arguments
from rlkern.reference.linear_token_logprobs import without_scale
from rlkern.reference.token_logprobs import wide_dtype
from rlkern.reference.vocab_divergence import STATE


def linear_kl_divergence(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    mask: Tensor | None = None,
    divergence: str = "kl",
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    logits_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """The exact divergence from hidden states and lm_heads, neither's logits ever whole.

    With z = softcap(logit_scale * (h W^T + b)) / temperature, of the policy and of the reference
    alike, the results are those of :func:`kl_divergence`. Gradients go to hidden, weight and bias,
    each product only where it is needed; first derivatives, in reverse mode, only. Products of N D
    V: one for each logits, and backward both once more and the gradients'.

    Args:
        hidden: [..., D], float32, bfloat16, float16, or float64 (which runs in eager PyTorch).
        weight: [V, D], of the lm_head, in the dtype of hidden (except under autocast).
        ref_hidden: [..., D'], of the reference, whose hidden size may be another (a larger teacher
            with the same vocabulary); in the dtype of hidden (except under autocast).
        ref_weight: [V, D'].
        bias, ref_bias: [V].
        mask, divergence, beta, temperature, softcap: as in kl_divergence.
        logit_scale: a positive number (1e-37 to 1e37) that multiplies h W^T + b.
        memory_budget: bytes of logits in memory at a time, of both together, at least enough for 64
            tokens.
        logits_dtype, batch_invariant: as in linear_token_logprobs.

    Returns:
        [...], float32 (float64 for float64 hidden).

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device, name or range; a reference that
            requires a gradient.
        RuntimeError: a backend was asked for that cannot serve the call; an input with a
            forward-mode tangent.
    """
    hidden, weight, bias = checked_products(hidden, weight, bias)
    reference = checked_reference_head(hidden, weight, ref_hidden, ref_weight, ref_bias)
    given = checked_arguments(hidden, "hidden", mask, divergence, beta, temperature, softcap)
    scale = _checks.positive_number(logit_scale, "logit_scale")
    cut = checked_cut(hidden, weight, memory_budget, batch_invariant, logits_dtype, models=2)
    number, per_token, cap = without_scale(
        scale, given.temperature, given.token_temperature, given.softcap
    )
    given = given._replace(temperature=number, token_temperature=per_token, softcap=cap)
    backend = _backend.choose("vocab_divergence", hidden.device.type, hidden.dtype)
    return head_divergence(hidden, weight, bias, reference, cut, given, backend)


def checked_reference_head(
    hidden: Tensor, weight: Tensor, ref_hidden: object, ref_weight: object, ref_bias: object
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The reference's factors, which agree with the policy's in tokens and vocabulary."""
    h, w, b = checked_products(ref_hidden, ref_weight, ref_bias, "ref_")
    if h.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"ref_hidden: expected shape {[*hidden.shape[:-1], 'D']} (hidden's tokens), got "
            f"{list(h.shape)}"
        )
    if w.shape[0] != weight.shape[0]:
        raise ValueError(
            f"ref_weight: expected {weight.shape[0]} rows (weight's vocabulary), got {w.shape[0]}"
        )
    _checks.require_kind(h, "ref_hidden", hidden, "hidden")
    for name, factor in (("ref_hidden", h), ("ref_weight", w), ("ref_bias", b)):
        if factor is not None:
            _checks.without_gradient(factor, name)
    return h, w, b


def head_divergence(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reference: tuple[Tensor, Tensor, Tensor | None],
    cut: Cut,
    given: DivergenceArguments,
    backend: str,
) -> Tensor:
    """[...], differentiable, from checked arguments."""
    ref_hidden, ref_weight, ref_bias = reference
    value, _ = torch.ops.rlkern.linear_kl_divergence(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        ref_hidden.reshape(-1, ref_hidden.shape[-1]),
        ref_weight,
        ref_bias,
        *given.changed(lambda x: x.reshape(-1)),
        *cut,
        backend,
    )
    return value.view(hidden.shape[:-1])


# ---- the operator ------------------------------------------------------------------------------


def _forward(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, *args):
    given, (rows, invariant, wide, backend) = DivergenceArguments(*args[:6]), args[6:]
    value, state = _fake(hidden)
    # Masked tokens, which no chunk may hold, stay 0.
    value.zero_()
    state.zero_()
    row_pass = _register.overload("vocab_divergence", backend)
    cut = Cut(rows, invariant, wide)
    logits = Logits(Head(hidden, weight, bias, cut))
    ref_logits = Logits(Head(ref_hidden, ref_weight, ref_bias, cut))
    for chunk in chunks(hidden.shape[0], given.mask, rows):
        z, r = (each.of(chunk)[1][: chunk.count] for each in (logits, ref_logits))
        value[chunk.rows], state[chunk.rows] = row_pass(z, r, *given.changed(chunk.of))
    return value, state


def _backward(grad_value, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, *args):
    given = DivergenceArguments(*args[:6])
    state, rows, invariant, wide, backend, needs = args[6:]
    cut = Cut(rows, invariant, wide)
    head = Head(hidden, weight, bias, cut)
    gradients = HeadGradients(head, backend, needs)
    row_pass = _register.overload("vocab_divergence_bwd_", backend)
    logits = Logits(head)
    ref_logits = Logits(Head(ref_hidden, ref_weight, ref_bias, cut))
    for chunk in chunks(hidden.shape[0], given.mask, rows):
        h, whole = logits.of(chunk)
        z, r = whole[: chunk.count], ref_logits.of(chunk)[1][: chunk.count]
        row_pass(grad_value[chunk.rows], z, z, r, *given.changed(chunk.of), state[chunk.rows])
        gradients.add(chunk, h, whole)
    return gradients.results()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, temperature, softcap, kind, beta, rows, invariant, wide, backend = inputs
    ctx.numbers = (temperature, softcap, kind, beta)
    ctx.cut = (rows, invariant, wide, backend)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _autograd(ctx: Any, grad_value: Tensor, _: Any) -> Any:
    *tensors, state = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    found = torch.ops.rlkern.linear_kl_divergence_bwd(
        grad_value, *tensors, *ctx.numbers, state, *ctx.cut, needs
    )
    grads = (grad if needed else None for grad, needed in zip(found, needs, strict=True))
    return *grads, *[None] * 13


def _fake(hidden, *rest):
    dtype = wide_dtype(hidden)
    total = hidden.shape[0]
    return hidden.new_empty(total, dtype=dtype), hidden.new_empty((total, STATE), dtype=dtype)


def _fake_backward(grad_value, hidden, weight, bias, *rest):
    return fake_gradients((hidden, weight, bias), rest[-1])


_register.register_composite("linear_kl_divergence", _forward, _fake)
_register.register_composite("linear_kl_divergence_bwd", _backward, _fake_backward)
torch.library.register_autograd(
    "rlkern::linear_kl_divergence", _autograd, setup_context=_setup_context, lib=_register.LIBRARY
)
_register.forbid_second_derivative("linear_kl_divergence_bwd")

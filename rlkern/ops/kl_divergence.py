"""kl_divergence: the exact divergence of two distributions over the vocabulary, from logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlkern import _backend
from rlkern.ops import _checks, _register
from rlkern.reference import vocab_divergence as reference
from rlkern.reference.token_logprobs import per_row, wide_dtype


class DivergenceArguments(NamedTuple):
    """What vocab_divergence takes beside the two logits, checked."""

    mask: Tensor | None
    token_temperature: Tensor | None
    temperature: float
    softcap: float | None
    divergence: int = 0
    beta: float = 0.5

    def changed(self, change: Any) -> DivergenceArguments:
        """With the tensors changed by a function of one."""
        mask, temperature = (
            None if x is None else change(x) for x in (self.mask, self.token_temperature)
        )
        return self._replace(mask=mask, token_temperature=temperature)


def kl_divergence(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    mask: Tensor | None = None,
    divergence: str = "kl",
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """The exact divergence of a policy from a reference over the vocabulary, no softmax in memory.

    With z = softcap(logits) / temperature of both, p = softmax(z) of the policy, q of the
    reference, in nats:

    - "kl": KL(p || q) = sum_j p_j (log p_j - log q_j); d / d z_j = p_j (log p_j - log q_j - KL)
    - "reverse_kl": KL(q || p) = sum_j q_j (log q_j - log p_j); d / d z_j = p_j - q_j
    - "js": beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q;
      d / d z_j = beta p_j (log p_j - log m_j - KL(p || m))

    Gradient to logits only, first derivatives, in reverse mode, only. Sums of terms that are never
    negative: exact to fp32 also where p and q are nearly equal.

    A masked position is not read: its divergence and its gradient are 0. p_j = 0 counts 0 in the
    KL; q_j = 0 < p_j (a logit of -inf in the reference) makes it infinite, and the row's gradient
    NaN. In the reverse KL it is the other way around, and the gradient stays finite. A logit of
    -inf has gradient 0. A NaN, or without softcap a +inf, in a row that counts makes the row's
    result NaN.

    Args:
        logits: [..., V], float32, bfloat16, float16, or float64 (which runs in eager PyTorch).
            The arithmetic is fp32 (fp64 for float64).
        ref_logits: [..., V] in the same dtype; needs no gradient.
        mask: [...], bool or integer, true where a token counts. None: all do.
        divergence: "kl", "reverse_kl" or "js".
        beta: the policy's share of the mixture in "js", from 0.001 to 0.999: near 0 and 1, where
            the divergence becomes beta KL(p || q) and (1 - beta) KL(q || p), fp32 loses it.
        temperature: a positive number (1e-37 to 1e37), or a tensor that broadcasts to [...], one
            per token, for which no gradient is computed.
        softcap: the bound c of c tanh(x / c) (1e-37 to 1e37), or None.

    Returns:
        [...], float32 (float64 for float64 logits).

    Raises:
        TypeError: an argument of the wrong type or dtype, or a DTensor.
        ValueError: a wrong shape, device, name or range; ref_logits that requires a gradient; a
            temperature that is not positive (checked on the CPU always, on a GPU with
            RLKERN_DEBUG=1).
        RuntimeError: a backend was asked for that cannot serve the call; an input with a
            forward-mode tangent.
    """
    logits = _checks.require_logits(logits)
    _checks.refuse_tangent(logits, "logits")
    ref = checked_reference(logits, ref_logits)
    arguments = checked_arguments(logits, "logits", mask, divergence, beta, temperature, softcap)
    backend = _backend.choose("vocab_divergence", logits.device.type, logits.dtype)
    return divergence_of(logits, ref, arguments, backend)


def divergence_of(
    logits: Tensor, ref_logits: Tensor, arguments: DivergenceArguments, backend: str
) -> Tensor:
    """[...], differentiable, from checked arguments."""
    rows, ref = _rows(logits), _rows(ref_logits)
    if logits.dim() > 3:
        arguments = arguments.changed(lambda x: x.reshape(rows.shape[:-1]))
    graph = torch.is_grad_enabled() and logits.requires_grad
    (value,) = _call(backend, (rows, ref, *arguments), graph)
    return value.view(logits.shape[:-1])


def checked_reference(logits: Tensor, ref_logits: object) -> Tensor:
    ref = _checks.require_logits(ref_logits, "ref_logits")
    if ref.shape != logits.shape:
        raise ValueError(
            f"ref_logits: expected shape {list(logits.shape)} (logits'), got {list(ref.shape)}"
        )
    _checks.require_kind(ref, "ref_logits", logits, "logits")
    return consecutive(_checks.without_gradient(ref, "ref_logits"))


# m / p is 1 - (1 - beta) where q has nothing: good to 2^-24 / beta.
BETA = 1e-3


def checked_arguments(
    rows: Tensor, of: str, mask: object, divergence: object, beta: object, temperature: object,
    softcap: object,
) -> DivergenceArguments:  # fmt: skip
    flags = _checks.optional_mask(mask, rows, of)
    _checks.one_of(divergence, reference.DIVERGENCES, "divergence")
    share = _checks.number(beta, "beta", minimum=BETA, maximum=1 - BETA)
    if divergence != "js" and share != 0.5:
        raise ValueError(
            f"beta: expected its default, which {divergence!r} does not look at, got {beta}"
        )
    number, per_token = _checks.token_temperature(temperature, rows, of)
    cap = None if softcap is None else _checks.positive_number(softcap, "softcap")
    _checks.check_temperature_values(per_token, flags)
    kind = reference.DIVERGENCES.index(str(divergence))
    return DivergenceArguments(flags, per_token, number, cap, kind, share)


def _rows(logits: Tensor) -> Tensor:
    """Rows of consecutive values behind at most two dimensions of tokens."""
    return consecutive(logits.flatten(0, -3) if logits.dim() > 3 else logits)


def consecutive(rows: Tensor) -> Tensor:
    # A clone, because a tensor without rows is contiguous under any strides.
    return rows if rows.stride(-1) == 1 else rows.clone(memory_format=torch.contiguous_format)


# ---- autograd --------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, ref, *arguments = inputs
    mask, per_token, *ctx.numbers = arguments
    ctx.save_for_backward(logits, ref, mask, per_token, output[1])


def _backward(ctx: Any, backend: str, grad: Tensor, *_: Any) -> tuple[Tensor]:
    *tensors, state = ctx.saved_tensors
    bwd = _register.overload("vocab_divergence_bwd", backend)
    return (bwd(grad, *tensors, *ctx.numbers, state),)


# ---- shapes without values, and the backend in Python ------------------------------------------


def _fake(logits, *rest):
    dtype = wide_dtype(logits)
    shape = logits.shape[:-1]
    return (
        logits.new_empty(shape, dtype=dtype),
        logits.new_empty((*shape, reference.STATE), dtype=dtype),
    )


def _flat_arguments(logits, ref_logits, mask, token_temperature, temperature, softcap, kind, beta):
    return (
        logits.reshape(-1, logits.shape[-1]),
        ref_logits.reshape(-1, logits.shape[-1]),
        per_row(logits, mask, True),
        per_row(logits, token_temperature, temperature),
        softcap,
        reference.DIVERGENCES[kind],
        beta,
    )


def _reference_forward(*args: Any) -> tuple[Tensor, Tensor]:
    value, state = reference.forward(*_flat_arguments(*args))
    shape = args[0].shape[:-1]
    return value.view(shape), state.view(*shape, reference.STATE)


def _reference_backward(grad: Tensor, *args: Any) -> Tensor:
    *given, state = args
    flat: Any = (*_flat_arguments(*given), state.reshape(-1, reference.STATE))
    return reference.backward(grad.reshape(-1), *flat).view(given[0].shape)


def _reference_backward_into(grad_value: Tensor, grad: Tensor, *args: Any) -> None:
    grad.copy_(_reference_backward(grad_value, *args))


_backend.register("vocab_divergence")
_register.register_fake("vocab_divergence", _fake)
_register.register_fake(
    "vocab_divergence_bwd", lambda g, logits, *r: logits.new_empty(logits.shape)
)
_register.register_fake("vocab_divergence_bwd_", lambda *args: None)
# There is no Triton form: where Triton serves a loss around it, this one does.
for _name, _function in (
    ("vocab_divergence", _reference_forward),
    ("vocab_divergence_bwd", _reference_backward),
    ("vocab_divergence_bwd_", _reference_backward_into),
):
    for _backend_name in ("eager", "triton"):
        _register.register_python(_name, _backend_name, _function)
_call = _register.differentiable("vocab_divergence", (0,), 1, _setup_context, _backward)
_register.forbid_second_derivative("vocab_divergence_bwd")

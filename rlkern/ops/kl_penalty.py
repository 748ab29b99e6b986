"""kl_penalty: per-token KL estimators between two log-probabilities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlkern import _backend
from rlkern.ops import _checks, _register
from rlkern.reference import kl_penalty as reference
from rlkern.reference.token_logprobs import wide_dtype


def kl_penalty(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    *,
    estimator: str = "k3",
    clamp: str | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """A per-token estimate of KL(policy || reference) from the sampled token's log-probabilities.

    With x = ref_logprobs - logprobs (Schulman, "Approximating KL divergence"):

    - "k1": -x; "abs": |x|; "k2": x^2 / 2; "k3": expm1(x) - x
    - "k1_st", "abs_st", "k3_st": the same values with the gradient of the unclamped k2

    x and the value are exact near 0: k3 at x = 1e-4 is 5.0e-9, not 0. Gradient to logprobs only,
    first derivatives only.

    Args:
        logprobs: [...], float32, a 16-bit type that is widened, or float64 (eager PyTorch).
        ref_logprobs: [...], needs no gradient.
        estimator: one of the names above.
        clamp: None; "verl", for k3 and k3_st: x to +-20 and the value to +-10; "openrlhf": the
            same for every estimator. Outside, the gradient is 0, except of the "_st" forms.
        mask: [...], bool or integer. Masked tokens give 0 whatever they hold. None: all count.

    Returns:
        [...], float32 (float64 for float64 logprobs).

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device or name.
        RuntimeError: a backend was asked for that cannot serve the call.
    """
    logprobs = _float(logprobs, "logprobs")
    ref = _float(ref_logprobs, "ref_logprobs")
    for tensor, name in ((ref, "ref_logprobs"), (mask, "mask")):
        if tensor is None:
            continue
        _checks.require_tensor(tensor, name)
        if tensor.shape != logprobs.shape:
            raise ValueError(
                f"{name}: expected shape {list(logprobs.shape)} (logprobs'), "
                f"got {list(tensor.shape)}"
            )
        if tensor.device != logprobs.device:
            raise ValueError(
                f"{name}: expected device {logprobs.device} (logprobs'), got {tensor.device}"
            )
    _checks.refuse_tangent(logprobs, "logprobs")
    ref = _checks.without_gradient(ref, "ref_logprobs")
    if mask is not None:
        mask = _checks.as_flags(mask, "mask")
    _checks.one_of(estimator, reference.ESTIMATORS, "estimator")
    if clamp is not None:
        _checks.one_of(clamp, reference.CLAMPS, "clamp")
        if clamp == "verl" and not estimator.startswith("k3"):
            raise ValueError(
                f"clamp: expected None or 'openrlhf' with estimator {estimator!r} (verl clamps "
                "k3 alone), got 'verl'"
            )
    dtype = wide_dtype(logprobs)
    logprobs, ref = logprobs.to(dtype), ref.to(dtype)

    backend = _backend.choose("kl_penalty", logprobs.device.type, dtype)
    if backend == "eager":
        if mask is not None:
            logprobs, ref = logprobs.where(mask, 0.0), ref.where(mask, 0.0)
        value = reference.kl_penalty(logprobs, ref, estimator, clamp)
        return value if mask is None else value.where(mask, 0.0)
    args = (
        logprobs.contiguous(),
        ref.contiguous(),
        None if mask is None else mask.contiguous(),
        reference.ESTIMATORS.index(estimator),
        0 if clamp is None else 1 + reference.CLAMPS.index(clamp),
    )
    (value,) = _call(backend, args, torch.is_grad_enabled() and logprobs.requires_grad)
    return value


def _float(value: object, name: str) -> Tensor:
    tensor = _checks.require_tensor(value, name)
    if tensor.dtype not in _checks.LOGIT_DTYPES:
        raise TypeError(
            f"{name}: expected float32, bfloat16, float16 or float64, got {tensor.dtype}"
        )
    return tensor


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    logprobs, ref, mask, ctx.estimator, ctx.clamp = inputs
    ctx.save_for_backward(logprobs, ref, mask)


def _backward(ctx: Any, backend: str, grad: Tensor) -> tuple[Tensor]:
    bwd = _register.overload("kl_penalty_bwd", backend)
    return (bwd(grad.contiguous(), *ctx.saved_tensors, ctx.estimator, ctx.clamp),)


_backend.register("kl_penalty")
_register.register_fake("kl_penalty", lambda logprobs, *rest: torch.empty_like(logprobs))
_register.register_fake("kl_penalty_bwd", lambda grad, logprobs, *r: torch.empty_like(logprobs))
_call = _register.differentiable("kl_penalty", (0,), 1, _setup_context, _backward)
_register.forbid_second_derivative("kl_penalty_bwd")

"""gae, discounted_returns and vtrace: one linear recurrence over time, scanned from the end."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlkern import _backend
from rlkern.ops import _checks, _register
from rlkern.ops._layout import Layout
from rlkern.reference import return_scan as reference
from rlkern.reference.return_scan import MASK_MODES, ScanBatch, ScanOptions


class GAE(NamedTuple):
    """What gae returns; both in the shape of the rewards."""

    advantages: Tensor
    returns: Tensor


class VTrace(NamedTuple):
    """What vtrace returns; both in the shape of the rewards."""

    values: Tensor
    advantages: Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dones: Tensor | None = None,
    bootstrap_value: Tensor | None = None,
    mask_mode: str = "carry",
) -> GAE:
    """Generalised advantage estimation (Schulman et al., 2016, https://arxiv.org/abs/1506.02438).

        delta_t = r_t + gamma V_{t+1} - V_t
        A_t = delta_t + gamma lam A_{t+1},    returns_t = A_t + V_t

    Padded [B, T] with a mask, or packed [total] with cu_seqlens. What a masked position holds
    changes nothing, and there both results are 0. After the last counting token V is
    bootstrap_value and A is 0. Nothing is whitened: see :func:`whiten`.

    Gradients go to rewards, values and bootstrap_value; first derivatives only.

    Args:
        rewards: [B, T] or [total]; float32, a 16-bit type that is widened, or float64 (which runs
            in eager PyTorch). The rest are widened to the same.
        values: of the critic, one per token.
        gamma: discount, in [0, 1].
        lam: in [0, 1], a number or one per sequence, [B].
        mask: bool or integer, true where a token counts. None: all do.
        cu_seqlens: [B + 1] int32 or int64, 0 = first <= ... <= last = total.
        dones: bool or integer, true at the last counting token of an episode (at a masked one it
            means nothing): neither V nor A of what
            follows enters there, also where it is NaN or infinite.
        bootstrap_value: [B], V after a sequence's last counting token. None: 0.
        mask_mode: what a masked token between counting ones does. "carry" (verl): it hands on
            V_{t+1} and A_{t+1} unchanged. "break" (OpenRLHF): it enters as a token of value 0 and
            reward 0, and discounts. Masked tokens after the last counting one do nothing.

    Returns:
        GAE(advantages, returns), float32 (float64 for float64 rewards).

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device, name or range.
        RuntimeError: a backend was asked for that cannot serve the call.
    """
    layout = Layout("rewards", rewards, cu_seqlens)
    options, lams = _options(layout, gamma, lam, mask_mode)
    batch = ScanBatch(
        layout.values,
        _required(layout.tokens(values, "values"), "values"),
        None,
        layout.flags(mask, "mask"),
        layout.flags(dones, "dones"),
        layout.per_sequence(bootstrap_value, "bootstrap_value"),
        lams,
        layout.offsets,
    )
    _refuse_tangents(rewards=rewards, values=values, bootstrap_value=bootstrap_value)
    return GAE(*_scan(batch, options))


def discounted_returns(
    rewards: Tensor,
    *,
    gamma: float = 1.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dones: Tensor | None = None,
    bootstrap_value: Tensor | None = None,
    mask_mode: str = "carry",
) -> Tensor:
    """Discounted sums of the rewards to come: R_t = r_t + gamma R_{t+1}.

    Layouts, masks, ends, gradients (to rewards and bootstrap_value) and errors as in :func:`gae`,
    of which this is the case V = 0, lam = 1: a masked token hands R on unchanged ("carry") or
    discounts it once more ("break").

    Args:
        rewards: [B, T] or [total].
        gamma: discount, in [0, 1].
        mask, cu_seqlens, dones, mask_mode: as in gae.
        bootstrap_value: [B], R after a sequence's last counting token. None: 0.

    Returns:
        In the shape of rewards, float32 (float64 for float64 rewards), 0 at masked positions.
    """
    layout = Layout("rewards", rewards, cu_seqlens)
    options, _ = _options(layout, gamma, 1.0, mask_mode)
    batch = ScanBatch(
        layout.values,
        mask=layout.flags(mask, "mask"),
        dones=layout.flags(dones, "dones"),
        bootstrap_value=layout.per_sequence(bootstrap_value, "bootstrap_value"),
        offsets=layout.offsets,
    )
    _refuse_tangents(rewards=rewards, bootstrap_value=bootstrap_value)
    return _scan(batch, options)[0]


def vtrace(
    rewards: Tensor,
    values: Tensor,
    log_ratios: Tensor,
    *,
    gamma: float = 1.0,
    lam: float | Tensor = 1.0,
    rho_bar: float | None = 1.0,
    c_bar: float | None = 1.0,
    rho_pg_bar: float | None = 1.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dones: Tensor | None = None,
    bootstrap_value: Tensor | None = None,
    mask_mode: str = "carry",
) -> VTrace:
    """V-trace (Espeholt et al., 2018, https://arxiv.org/abs/1802.01561): returns corrected for data
    that another policy sampled.

        ratio = exp(log_ratios), rho = min(rho_bar, ratio), c = lam min(c_bar, ratio)
        delta_t = rho_t (r_t + gamma V_{t+1} - V_t)
        vs_t - V_t = delta_t + gamma c_t (vs_{t+1} - V_{t+1})
        advantage_t = min(rho_pg_bar, ratio_t)
                      (r_t + gamma (lam vs_{t+1} + (1 - lam) V_{t+1}) - V_t)

    After the last counting token V and vs are bootstrap_value. Layouts, masks, ends and errors as
    in :func:`gae`; a masked token that enters in mode "break" has ratio 1. The results are targets:
    no gradient is computed, and an input that needs one is refused.

    Args:
        rewards, values: [B, T] or [total].
        log_ratios: log-probability under the policy that learns minus that under the one that
            sampled.
        gamma: discount, in [0, 1].
        lam: in [0, 1], a number or one per sequence, [B].
        rho_bar, c_bar, rho_pg_bar: upper bounds of the ratio, above 0; None leaves one out.
        mask, cu_seqlens, dones, bootstrap_value, mask_mode: as in gae.

    Returns:
        VTrace(values, advantages), vs and the policy gradient's advantages, float32 (float64 for
        float64 rewards), 0 at masked positions.
    """
    layout = Layout("rewards", rewards, cu_seqlens)
    options, lams = _options(layout, gamma, lam, mask_mode)
    options = options._replace(
        rho_bar=_bar(rho_bar, "rho_bar"),
        c_bar=_bar(c_bar, "c_bar"),
        rho_pg_bar=_bar(rho_pg_bar, "rho_pg_bar"),
    )
    bootstrap = layout.per_sequence(bootstrap_value, "bootstrap_value")
    batch = ScanBatch(
        _checks.without_gradient(layout.values, "rewards"),
        _required(layout.constants(values, "values"), "values"),
        _required(layout.constants(log_ratios, "log_ratios"), "log_ratios"),
        layout.flags(mask, "mask"),
        layout.flags(dones, "dones"),
        None if bootstrap is None else _checks.without_gradient(bootstrap, "bootstrap_value"),
        lams,
        layout.offsets,
    )
    return VTrace(*_scan(batch, options))


def _options(
    layout: Layout, gamma: object, lam: object, mask_mode: object
) -> tuple[ScanOptions, Tensor | None]:
    """The checked options, and lam where it is one per sequence."""
    _checks.one_of(mask_mode, MASK_MODES, "mask_mode")
    discount = _checks.number(gamma, "gamma", minimum=0.0, maximum=1.0)
    breaks = mask_mode == "break"
    if not isinstance(lam, Tensor):
        return ScanOptions(
            discount, _checks.number(lam, "lam", minimum=0.0, maximum=1.0), breaks
        ), None
    lams = layout.per_sequence(lam, "lam")
    assert lams is not None
    lams = _checks.without_gradient(lams, "lam")
    if _checks.values_are_checked(lams):
        where = _checks.first_offence(~((lams >= 0) & (lams <= 1)), None)
        if where is not None:
            raise ValueError(
                f"lam: expected values in [0, 1], got {float(lams[where])} at [{where[0]}]"
            )
    return ScanOptions(discount, 1.0, breaks), lams


def _bar(value: object, name: str) -> float:
    return math.inf if value is None else _checks.number(value, name, above=0.0)


def _required(tensor: Tensor | None, name: str) -> Tensor:
    if tensor is None:
        raise TypeError(f"{name}: expected a torch.Tensor, got None")
    return tensor


def _refuse_tangents(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None:
            _checks.refuse_tangent(tensor, name)


def _scan(batch: ScanBatch, options: ScanOptions) -> tuple[Tensor, Tensor]:
    backend = _backend.choose("return_scan", batch.rewards.device.type, batch.rewards.dtype)
    if backend == "eager":
        return reference.return_scan(batch, options)
    tensors = [getattr(batch, name) for name in _DIFFERENTIABLE]
    graph = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    first, second = _call(backend, (*batch, [float(option) for option in options]), graph)
    return first, second


# ---- the operator ------------------------------------------------------------------------------

_DIFFERENTIABLE = ("rewards", "values", "bootstrap_value")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, values, log_ratios, mask, dones, bootstrap_value, lam, offsets, ctx.options = inputs
    assert log_ratios is None, "vtrace refuses inputs that need a gradient"
    ctx.has_values, ctx.has_bootstrap = values is not None, bootstrap_value is not None
    ctx.save_for_backward(mask, dones, lam, offsets)


def _backward(ctx: Any, backend: str, first: Tensor, second: Tensor) -> tuple[Tensor | None, ...]:
    rewards, values, bootstrap = _register.overload("return_scan_bwd", backend)(
        _dense(first),
        _dense(second) if ctx.has_values else None,
        *ctx.saved_tensors,
        ctx.options,
    )
    return (
        rewards,
        values if ctx.has_values else None,
        bootstrap if ctx.has_bootstrap else None,
    )


def _dense(grad: Tensor) -> Tensor:
    """Contiguous in its strides, too, which a tensor without elements need not be."""
    if grad.is_contiguous() and grad.numel():
        return grad
    return grad.clone(memory_format=torch.contiguous_format)


def _fake(rewards, values, *rest):
    shape = rewards.shape
    return rewards.new_empty(shape), rewards.new_empty((0,) if values is None else shape)


def _fake_backward(grad_first, grad_second, mask, dones, lam, offsets, options):
    shape = grad_first.shape
    sequences = shape[0] if offsets is None else offsets.shape[0] - 1
    return (
        grad_first.new_empty(shape),
        grad_first.new_empty((0,) if grad_second is None else shape),
        grad_first.new_empty((sequences,)),
    )


_backend.register("return_scan")
_register.register_fake("return_scan", _fake)
_register.register_fake("return_scan_bwd", _fake_backward)
_register.register_triton("return_scan", "return_scan", "forward")
_register.register_triton("return_scan_bwd", "return_scan", "backward")
_call = _register.differentiable(
    "return_scan",
    tuple(ScanBatch._fields.index(name) for name in _DIFFERENTIABLE),
    2,
    _setup_context,
    _backward,
    differentiable_outputs=2,
)
_register.forbid_second_derivative("return_scan_bwd")

"""whiten: values shifted to mean 0 and scaled to variance 1, masked, across processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlkern import _backend
from rlkern.ops import _checks, _register
from rlkern.reference import whiten as reference
from rlkern.reference.token_logprobs import wide_dtype
from rlkern.reference.whiten import EPS_MODES, WhitenOptions


def whiten(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    scale: bool = True,
    unbiased: bool = True,
    eps: float = 1e-8,
    eps_mode: str = "add",
    group: Any = None,
) -> Tensor:
    """Masked whitening: (x - mean) * rsqrt(var + eps), over everything that counts.

    Mean and variance are taken in float64, in two passes over values, by the kernels in a fixed
    order: of them the same call twice is bitwise equal, on a CPU with any number of threads. Eager
    PyTorch, where float64 runs, promises neither. No gradient is computed.

    Args:
        x: [...], advantages or rewards; float32, a 16-bit type that is widened, or float64 (which
            runs in eager PyTorch).
        mask: [...], bool or integer. Masked values may be anything, and give 0. None: all count.
        shift_mean: False keeps the mean: it is added back after the scaling.
        scale: False keeps the variance: x - mean.
        unbiased: the variance divides by n - 1 (verl), else by n (OpenRLHF).
        eps: at least 0. With 0, equal values have no deviation to be divided by: what comes out is
            NaN, or rounding where their mean is no float64.
        eps_mode: "add": rsqrt(var + eps) (verl); "clamp": rsqrt(max(var, eps)) (OpenRLHF).
        group: a torch.distributed process group whose processes' values count together, for example
            torch.distributed.group.WORLD: count, mean and squared deviation are gathered, one
            collective of three float64 values per process, which every process must enter.
            None: this process alone.

    Returns:
        In the shape of x, float32 (float64 for float64 x).

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device, name or range; with an unbiased
            variance also where fewer than two values count. That needs a look at the values: on
            the CPU always, on a GPU with RLKERN_DEBUG=1; elsewhere the result is NaN.
        RuntimeError: a backend was asked for that cannot serve the call.
    """
    tensor = _checks.require_tensor(x, "x")
    if tensor.dtype not in _checks.LOGIT_DTYPES:
        raise TypeError(f"x: expected float32, bfloat16, float16 or float64, got {tensor.dtype}")
    tensor = _checks.without_gradient(tensor, "x")
    counts = _checked_mask(mask, tensor)
    switches = {"shift_mean": shift_mean, "scale": scale, "unbiased": unbiased}
    for name, switch in switches.items():
        if not isinstance(switch, bool):
            raise TypeError(f"{name}: expected a bool, got {switch!r}")
    eps = _checks.number(eps, "eps", minimum=0.0)
    _checks.one_of(eps_mode, EPS_MODES, "eps_mode")
    if not scale:
        _check_only_shifts(shift_mean, unbiased, eps, eps_mode)
    if group is not None:
        _check_group(group)
    dtype = wide_dtype(tensor)
    tensor = tensor.to(dtype).contiguous()
    options = WhitenOptions(shift_mean, scale, unbiased, eps, eps_mode)

    backend = _backend.choose("whiten", tensor.device.type, dtype)
    if backend == "eager":
        moments = reference.masked_moments(tensor, counts)
    else:
        moments = _register.constant("masked_moments", backend, tensor, counts)
    if group is not None:
        moments = _merged(moments, group)
    if scale and unbiased and _checks.values_are_checked(moments) and moments[0] < 2:
        raise ValueError(
            "mask: expected at least two counting values for an unbiased variance, got "
            f"{int(moments[0])}"
        )
    if backend == "eager":
        return reference.whiten(tensor, counts, moments, options)
    return _register.constant("whiten", backend, tensor, counts, moments, options.numbers())


def _checked_mask(mask: object, x: Tensor) -> Tensor | None:
    if mask is None:
        return None
    counts = _checks.as_flags(_checks.require_tensor(mask, "mask"), "mask")
    if counts.shape != x.shape:
        raise ValueError(f"mask: expected shape {list(x.shape)} (x's), got {list(counts.shape)}")
    if counts.device != x.device:
        raise ValueError(f"mask: expected device {x.device} (x's), got {counts.device}")
    return counts.contiguous()


def _check_only_shifts(shift_mean: bool, unbiased: bool, eps: float, eps_mode: str) -> None:
    """Without scaling there is no variance, so what would change it is refused."""
    if not shift_mean:
        raise ValueError("shift_mean, scale: expected at least one of them, got False for both")
    defaults = WhitenOptions()
    for name, value in (("unbiased", unbiased), ("eps", eps), ("eps_mode", eps_mode)):
        if value != getattr(defaults, name):
            raise ValueError(f"{name}: expected its default with scale=False, got {value!r}")


def _check_group(group: Any) -> None:
    import torch.distributed as dist

    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group: expected a torch.distributed process group, got {type(group).__name__}"
        )


def _merged(moments: Tensor, group: Any) -> Tensor:
    """The moments of all processes' values, the same bits on each."""
    import torch.distributed as dist

    parts = [torch.empty_like(moments) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, moments, group)
    return reference.merged_moments(torch.stack(parts))


_backend.register("masked_moments")
_backend.register("whiten")
_register.register_fake("masked_moments", lambda x, mask: x.new_empty((3,), dtype=torch.float64))
_register.register_fake("whiten", lambda x, *rest: torch.empty_like(x))
_register.forbid_derivative("masked_moments")
_register.forbid_derivative("whiten")

"""Argument checks that the public functions share.

Every message names the argument, what was expected and what came, before anything is computed.
Values are looked at on the CPU always, on a GPU, where it makes the host wait, with RLKERN_DEBUG=1.
"""

from __future__ import annotations

import difflib
import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rlkern._env import flag
from rlkern.reference.token_logprobs import wide_dtype

# Beyond these fp32, in which kernels compute, holds the number or its inverse as 0 or infinity.
SMALLEST, LARGEST = 1e-37, 1e37
LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def require_tensor(value: object, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got the layout {value.layout}")
    # By name: importing torch.distributed.tensor for the sake of a check costs half a second.
    if type(value).__name__ == "DTensor":
        raise TypeError(
            f"{name}: expected a plain tensor, got a DTensor over {value.device_mesh} with "  # type: ignore[attr-defined]
            f"placements {tuple(value.placements)}; "  # type: ignore[attr-defined]
            "its shards are not taken for a part of the vocabulary. Call full_tensor(), or compute "
            "the loss inside the wrapped module's forward, where FSDP2 presents plain tensors"
        )
    return value


def require_logits(
    value: object,
    name: str = "logits",
    shape: str = "[..., V] with a vocabulary of at least 1",
) -> Tensor:
    """A float tensor whose last dimension is at least 1."""
    logits = require_tensor(value, name)
    if logits.dtype not in LOGIT_DTYPES:
        raise TypeError(
            f"{name}: expected float32, bfloat16, float16 or float64, got {logits.dtype}"
        )
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"{name}: expected shape {shape}, got {list(logits.shape)}")
    return logits


def refuse_tangent(tensor: Tensor, name: str) -> None:
    """Forward-mode AD would drop the tangent and give a derivative of 0 in silence."""
    # Without an open level there are no tangents, which is soon said.
    if forward_ad._current_level < 0 or torch.compiler.is_compiling():
        return
    if forward_ad.unpack_dual(tensor).tangent is not None:
        raise RuntimeError(
            f"{name}: expected a tensor without a forward-mode tangent: rlkern's operators are "
            "differentiated backwards only (Tensor.backward, torch.autograd.grad)"
        )


def is_plain(value: object) -> bool:
    """A dense tensor that nobody differentiates: require_tensor and without_gradient would pass it.

    Each of them is soon called, but not with its code out of the cache, where a training step finds
    it.
    """
    return (
        type(value) is Tensor
        and value.layout is torch.strided
        and not value.requires_grad
        and forward_ad._current_level < 0
    )


def without_gradient(tensor: Tensor, name: str) -> Tensor:
    """Refuses an input whose gradient nobody would compute."""
    refuse_tangent(tensor, name)
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: expected a tensor that needs no gradient (none is computed for it), "
            f"got one with requires_grad=True; pass {name}.detach()"
        )
    return tensor


def _owner(of: str) -> str:
    return "logits'" if of == "logits" else f"{of}'s"


def require_kind(tensor: Tensor, name: str, like: Tensor, of: str) -> None:
    """`tensor` has the dtype and the device of another argument."""
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name}: expected {like.dtype} ({_owner(of)} dtype), got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(
            f"{name}: expected device {like.device} ({_owner(of)}), got {tensor.device}"
        )


_LAST = {"logits": "the vocabulary", "hidden": "its last dimension"}


def require_like_tokens(tensor: Tensor, name: str, rows: Tensor, of: str = "logits") -> None:
    """`tensor` has one value per row of `rows`, the argument `of`, on the same device."""
    if tensor.shape != rows.shape[:-1]:
        raise ValueError(
            f"{name}: expected shape {list(rows.shape[:-1])} ({of} without {_LAST[of]}), "
            f"got {list(tensor.shape)}"
        )
    if tensor.device != rows.device:
        raise ValueError(
            f"{name}: expected device {rows.device} ({_owner(of)}), got {tensor.device}"
        )


def require_ids(value: object, name: str, rows: Tensor, of: str = "logits") -> Tensor:
    ids = require_tensor(value, name)
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected int64 or int32, got {ids.dtype}")
    require_like_tokens(ids, name, rows, of)
    return ids.long()


#: The id of a token whose logit stands in another process's columns. Its log-probability is NaN,
#: the rest of its row what it is. A number that no trainer uses to mark padding.
ELSEWHERE = -(1 << 62)


def as_flags(tensor: Tensor, name: str) -> Tensor:
    """A mask as bool: true, or not 0, where a token counts."""
    if tensor.is_floating_point() or tensor.is_complex():
        raise TypeError(f"{name}: expected bool or an integer type, got {tensor.dtype}")
    return tensor if tensor.dtype == torch.bool else tensor != 0


def optional_mask(value: object, rows: Tensor, of: str = "logits") -> Tensor | None:
    """One bool per token, or None."""
    if value is None:
        return None
    mask = as_flags(require_tensor(value, "mask"), "mask")
    require_like_tokens(mask, "mask", rows, of)
    return mask


def one_of(value: object, names: tuple[str, ...], name: str) -> None:
    """`value` is one of some names."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a str, got {type(value).__name__}")
    if value not in names:
        near = difflib.get_close_matches(value, names, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}: expected one of {', '.join(names)}, got {value!r}{hint}")


def number(
    value: object,
    name: str,
    *,
    above: float | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
) -> float:
    """A finite number, above, at least or at most a bound where one is given."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    wanted = "a finite number"
    if above is not None:
        wanted += f" above {above:g}"
    if minimum is not None:
        wanted += f" of at least {minimum:g}"
    if maximum is not None:
        wanted += f" and at most {maximum:g}"
    inside = (
        (above is None or value > above)
        and (minimum is None or value >= minimum)
        and (maximum is None or value <= maximum)
    )
    if not math.isfinite(value) or not inside:
        raise ValueError(f"{name}: expected {wanted}, got {value}")
    return float(value)


def positive_number(value: object, name: str) -> float:
    # bool is an int, and True a temperature nobody means.
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a positive number, got {type(value).__name__}")
    if not (SMALLEST <= value <= LARGEST):
        raise ValueError(
            f"{name}: expected a positive finite number, in [{SMALLEST}, {LARGEST}], got {value}"
        )
    return float(value)


def token_temperature(
    value: object, rows: Tensor, of: str = "logits"
) -> tuple[float, Tensor | None]:
    """A temperature as (number, None) or (1.0, one fp32 or fp64 value per token)."""
    if not isinstance(value, Tensor):
        return positive_number(value, "temperature"), None
    temperature = require_tensor(value, "temperature")
    if not temperature.is_floating_point():
        raise TypeError(f"temperature: expected a floating-point tensor, got {temperature.dtype}")
    refuse_tangent(temperature, "temperature")
    if temperature.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "temperature: expected a tensor that needs no gradient (none is computed for it), "
            "got one with requires_grad=True; pass temperature.detach()"
        )
    if temperature.device != rows.device:
        raise ValueError(
            f"temperature: expected device {rows.device} ({_owner(of)}), got {temperature.device}"
        )
    tokens = rows.shape[:-1]
    try:
        expanded = temperature.expand(tokens)
    except RuntimeError:
        raise ValueError(
            f"temperature: expected a shape that broadcasts to {list(tokens)} (one per token), "
            f"got {list(temperature.shape)}"
        ) from None
    dtype = wide_dtype(rows)
    return 1.0, expanded.to(dtype)


def values_are_checked(tensor: Tensor) -> bool:
    """Whether values may be looked at here: never while a graph is being traced."""
    if torch.compiler.is_compiling() or tensor.is_meta or type(tensor) is not Tensor:
        return False
    return tensor.device.type == "cpu" or flag("RLKERN_DEBUG")


def first_offence(bad: Tensor, mask: Tensor | None) -> tuple[int, ...] | None:
    """The index of the first true value of `bad` in a token that counts."""
    if mask is not None:
        bad = bad & mask
    if not bool(bad.any()):
        return None
    return tuple(int(i) for i in bad.nonzero()[0])


def require_finite(tensor: Tensor, name: str, where: Tensor | None = None) -> None:
    """Of the values where `where` is true, if they may be looked at."""
    if not values_are_checked(tensor):
        return
    at = first_offence(~tensor.isfinite(), where)
    if at is not None:
        raise ValueError(
            f"{name}: expected finite values, got {float(tensor[at])} at "
            f"[{', '.join(map(str, at))}]"
        )


def check_token_values(
    ids: Tensor,
    mask: Tensor | None,
    temperature: Tensor | None,
    vocab: int,
    or_elsewhere: bool = False,
) -> None:
    """Raises ValueError for an id outside [0, vocab) or a temperature that is not positive.

    Only tokens that count are looked at: a masked position may hold anything.
    """
    if not values_are_checked(ids):
        return
    outside = (ids < 0) | (ids >= vocab)
    if or_elsewhere:
        outside &= ids != ELSEWHERE
    where = first_offence(outside, mask)
    if where is not None:
        at = ", ".join(map(str, where))
        raise ValueError(
            f"token_ids: expected values in [0, {vocab}), got {int(ids[where])} at [{at}]; "
            "mask out positions that do not count"
        )
    check_temperature_values(temperature, mask)


def check_temperature_values(temperature: Tensor | None, mask: Tensor | None) -> None:
    """The same of a temperature alone."""
    if temperature is None or not values_are_checked(temperature):
        return
    where = first_offence(~((temperature >= SMALLEST) & (temperature <= LARGEST)), mask)
    if where is not None:
        at = ", ".join(map(str, where))
        raise ValueError(
            f"temperature: expected positive finite values, in [{SMALLEST}, {LARGEST}], got "
            f"{float(temperature[where])} at [{at}]"
        )

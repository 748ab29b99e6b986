"""One value per token, padded or packed: the checks that the token-level operators share."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor

from rlkern.ops import _checks
from rlkern.reference.token_logprobs import wide_dtype

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Layout:
    """The shape that a call's arguments must agree with, and the dtype it computes in.

    Padded: [B, T]. Packed: [total] with cu_seqlens [B + 1].

    Args:
        name: of the first argument, for messages.
        values: the first argument, [B, T] or [total]; fp64 is computed in fp64, the rest in fp32.
        cu_seqlens: int32 or int64, or None where the layout is padded.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. Values of
            cu_seqlens are looked at on the CPU always, on a GPU with RLKERN_DEBUG=1.
    """

    def __init__(self, name: str, values: object, cu_seqlens: object) -> None:
        tensor = self._float(values, name)
        _checks.refuse_tangent(tensor, name)
        self._take(name, tensor.shape, tensor, cu_seqlens)
        self.values = self._ready(tensor)

    @classmethod
    def of_rows(cls, name: str, rows: Tensor, cu_seqlens: object) -> Layout:
        """From [B, T, X] or [total, X], where each token has a row of its own."""
        layout = cls.__new__(cls)
        layout._take(name, rows.shape[:-1], rows, cu_seqlens, ", X")
        return layout

    def _take(
        self, name: str, shape: torch.Size, tensor: Tensor, cu_seqlens: object, last: str = ""
    ) -> None:
        self.name = name
        self.shape = shape
        self.device = tensor.device
        self.dtype = wide_dtype(tensor)
        self.offsets = None if cu_seqlens is None else self._checked_offsets(cu_seqlens)
        if self.offsets is None:
            if len(shape) != 2:
                raise ValueError(
                    f"{name}: expected [B, T{last}], or [total{last}] with cu_seqlens, "
                    f"got {list(tensor.shape)}"
                )
            self.sequences = shape[0]
        else:
            self.sequences = self.offsets.shape[0] - 1

    def _ready(self, tensor: Tensor) -> Tensor:
        """In the dtype of the computation, consecutive in memory along a sequence."""
        if tensor.dtype != self.dtype:
            tensor = tensor.to(self.dtype)
        return tensor if tensor.stride(-1) == 1 else tensor.contiguous()

    def _float(self, value: object, name: str) -> Tensor:
        tensor = _checks.require_tensor(value, name)
        if tensor.dtype not in _DTYPES:
            raise TypeError(
                f"{name}: expected float32, bfloat16, float16 or float64, got {tensor.dtype}"
            )
        return tensor

    def _require(self, tensor: Tensor, name: str, shapes: tuple[torch.Size, ...]) -> None:
        if tensor.shape not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise ValueError(
                f"{name}: expected shape {wanted} ({self.name} has {list(self.shape)}), "
                f"got {list(tensor.shape)}"
            )
        if tensor.device != self.device:
            raise ValueError(
                f"{name}: expected device {self.device} ({self.name}'s), got {tensor.device}"
            )

    def _checked_offsets(self, value: object) -> Tensor:
        name = "cu_seqlens"
        offsets = _checks.require_tensor(value, name)
        if offsets.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: expected int32 or int64, got {offsets.dtype}")
        if len(self.shape) != 1:
            raise ValueError(
                f"{name}: expected None for padded {self.name}, whose shape is "
                f"{list(self.shape)}; packed ones are [total]"
            )
        if offsets.dim() != 1 or offsets.shape[0] < 1:
            raise ValueError(f"{name}: expected shape [B + 1], got {list(offsets.shape)}")
        if offsets.device != self.device:
            raise ValueError(
                f"{name}: expected device {self.device} ({self.name}'s), got {offsets.device}"
            )
        if _checks.values_are_checked(offsets):
            first, last = int(offsets[0]), int(offsets[-1])
            if first != 0 or last != self.shape[0] or bool((offsets.diff() < 0).any()):
                raise ValueError(
                    f"{name}: expected values that rise from 0 to {self.shape[0]} "
                    f"({self.name}'s length), got {offsets.tolist()[:8]} ... {last}"
                )
        return offsets.long().contiguous()

    def _is_ready(
        self, value: object, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> TypeGuard[Tensor]:
        """What most calls give is right as it is, which is seen in few steps."""
        return (
            type(value) is Tensor
            and value.dtype is dtype
            and value.layout is torch.strided
            and value.shape == shape
            and value.device == self.device
            and value.is_contiguous()
        )

    def tokens(self, value: object, name: str) -> Tensor | None:
        """One float per token, or None."""
        if value is None:
            return None
        if self._is_ready(value, self.dtype, self.shape):
            _checks.refuse_tangent(value, name)
            return value
        tensor = self._float(value, name)
        _checks.refuse_tangent(tensor, name)
        self._require(tensor, name, (self.shape,))
        return self._ready(tensor)

    def constants(self, value: object, name: str) -> Tensor | None:
        """The same of something for which no gradient is computed."""
        tensor = self.tokens(value, name)
        return None if tensor is None else _checks.without_gradient(tensor, name)

    def per_sequence_or_token(self, value: object, name: str) -> Tensor:
        """One float per sequence, [B], or per token; no gradient is computed."""
        if self._is_ready(value, self.dtype, (self.sequences,)):
            return _checks.without_gradient(value, name)
        tensor = self._float(value, name)
        self._require(tensor, name, (torch.Size([self.sequences]), self.shape))
        return self._ready(_checks.without_gradient(tensor, name))

    def per_sequence(self, value: object, name: str) -> Tensor | None:
        """One float per sequence, [B], or None."""
        if value is None:
            return None
        tensor = self._float(value, name)
        self._require(tensor, name, (torch.Size([self.sequences]),))
        return self._ready(tensor)

    def flags(self, value: object, name: str) -> Tensor | None:
        """One bool per token, or None."""
        if value is None:
            return None
        if self._is_ready(value, torch.bool, self.shape):
            return value
        flags = _checks.as_flags(_checks.require_tensor(value, name), name)
        self._require(flags, name, (self.shape,))
        return flags if flags.stride(-1) == 1 else flags.contiguous()

    def denominator(self, value: object, name: str) -> float | Tensor | None:
        """A number or a 0-dimensional tensor, used as it is."""
        if value is None:
            return None
        if not isinstance(value, Tensor):
            return _checks.number(value, name)
        if value.dim() != 0:
            raise ValueError(
                f"{name}: expected a number or a 0-dimensional tensor, got {list(value.shape)}"
            )
        if value.device != self.device:
            raise ValueError(
                f"{name}: expected device {self.device} ({self.name}'s), got {value.device}"
            )
        return _checks.without_gradient(value.to(torch.float64), name)

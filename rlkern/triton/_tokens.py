"""Values per token in memory, [B, T] or packed [total] with offsets: what the kernels load, and
what a launcher must know of them."""

from __future__ import annotations

import math
from ctypes import c_float

import torch
import triton
import triton.language as tl
from torch import Tensor

# For every kernel. Without it the compiler may contract products and sums differently in each
# specialisation (stride, alignment), and a row's result would depend on where it lies in memory.
# Where a fused product is wanted the kernels say tl.fma.
OPTIONS = {"enable_fp_fusion": False}


@triton.jit
def flags(data, at, lane, inside):
    return inside & (tl.load(data + at + lane, mask=inside, other=0) != 0)


@triton.jit
def counting(mask, at, lane, inside):
    if mask is None:
        return inside
    else:
        return flags(mask, at, lane, inside)


@triton.jit
def floats(data, at, lane, inside, counts):
    """Zeros where a token does not count, whatever stands there.

    It is read, so that the read need not wait for the mask's.
    """
    return tl.where(counts, tl.load(data + at + lane, mask=inside, other=0.0), 0.0)


@triton.jit
def floats_or(data, at, lane, inside, counts, otherwise):
    if data is None:
        return otherwise
    else:
        return tl.where(counts, tl.load(data + at + lane, mask=inside, other=0.0), 0.0)


def fp32(x: float) -> float:
    """As fp32 holds it: a larger number is infinite."""
    return math.copysign(math.inf, x) if abs(x) > torch.finfo(torch.float32).max else x


def two_floats(x: float) -> tuple[float, float]:
    """A float64 as a sum of two fp32 numbers, which is what Triton passes numbers as."""
    high = c_float(x).value
    return high, x - high if math.isfinite(high) else 0.0


def row_stride(tensor: Tensor | None) -> int:
    """0 for packed tokens, whose place in memory is the sequence's offset."""
    return tensor.stride(0) if tensor is not None and tensor.dim() == 2 else 0


def require_tokens(values: Tensor, name: str, tensors: tuple[Tensor | None, ...]) -> None:
    """What would otherwise be read as something else, or beyond its end."""
    if values.dtype != torch.float32:
        raise TypeError(f"{name}: expected float32, got {values.dtype}")
    for tensor in tensors:
        if tensor is not None and (
            tensor.shape != values.shape or (tensor.shape[-1] > 1 and tensor.stride(-1) != 1)
        ):
            raise ValueError(
                f"expected values per token of shape {list(values.shape)}, consecutive along a "
                f"sequence, got {list(tensor.shape)} with strides {tensor.stride()}"
            )

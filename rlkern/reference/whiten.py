"""Masked whitening: (x - mean) * rsqrt(var + eps), or rsqrt(max(var, eps)), 0 where masked."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EPS_MODES = ("add", "clamp")


class WhitenOptions(NamedTuple):
    """In the order of csrc/common/whitening.h."""

    shift_mean: bool = True
    scale: bool = True
    unbiased: bool = True
    eps: float = 1e-8
    eps_mode: str = "add"

    def numbers(self) -> list[float]:
        clamps = self.eps_mode == "clamp"
        return [*map(float, (self.shift_mean, self.scale, self.unbiased, self.eps, clamps))]


def masked_moments(x: Tensor, mask: Tensor | None) -> Tensor:
    """Count, mean and sum of squared deviations of the counting values, [3] in float64."""
    x = x.double()
    counts = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    count = counts.sum().double()
    mean = x.where(counts, 0.0).sum() / count.clamp(min=1)
    return torch.stack([count, mean, ((x - mean).where(counts, 0.0) ** 2).sum()])


def merged_moments(parts: Tensor) -> Tensor:
    """The moments of several batches joined, from theirs, [parts, 3]."""
    count, mean, squares = parts.unbind(-1)
    total = count.sum()
    joined = (count * mean).sum() / total.clamp(min=1)
    return torch.stack([total, joined, (squares + count * (mean - joined) ** 2).sum()])


def whiten(x: Tensor, mask: Tensor | None, moments: Tensor, options: WhitenOptions) -> Tensor:
    """With fewer than two counting values and an unbiased variance it is NaN."""
    count, mean, squares = moments.unbind()
    # 0 / 0 is NaN with one value; with none nothing counts, so nothing is written.
    variance = squares / (count - 1 if options.unbiased else count)
    eps = options.eps
    spread = variance + eps if options.eps_mode == "add" else variance.clamp(min=eps)
    wide = x.double()
    if options.scale:
        # The mean is added back, so that the variance alone changes.
        wide = (wide - mean) * spread.rsqrt() + (0.0 if options.shift_mean else mean)
    else:
        wide = wide - mean
    wide = wide.to(x.dtype)
    return wide if mask is None else wide.where(mask, 0.0)

"""The clipped value loss: 0.5 * agg(max((v - R)^2, (clamp(v, v_old - clip, v_old + clip) - R)^2)).

`loss` below is a ValueLoss or anything with its fields.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlkern.reference.aggregation import Denominators, Sequences, denominator, token_weight

#: The metrics' vector, in the kernels' order; every entry adds up over batches.
SUMS = (
    "tokens",
    "sequences",
    "value_loss",
    "value_loss_units",  # 0 where the caller gave the denominator: the values then add up
    "clipped",
    "value",
    "return",
    "return_squared",
    "residual",
    "residual_squared",
)


class ValueBatch(NamedTuple):
    """One value per token, [B, T], or [total] with offsets [B + 1]; all of one dtype."""

    values: Tensor
    returns: Tensor
    mask: Tensor | None = None  # bool
    old_values: Tensor | None = None
    offsets: Tensor | None = None


def value_loss(loss: Any, batch: ValueBatch, given: Denominators) -> tuple[Tensor, Tensor]:
    """The loss, 0-dimensional, and the metrics' vector without gradient."""
    ones = torch.ones_like(batch.values)
    given = given.to(ones.dtype)
    mask = ones if batch.mask is None else batch.mask.to(ones.dtype)
    counts = mask > 0
    sequences = Sequences(mask, batch.offsets)
    v, target = batch.values.where(counts, 0.0), batch.returns.where(counts, 0.0)
    square = (v - target) ** 2
    terms, clipped = square, torch.zeros_like(mask)
    if loss.clip is not None:
        assert batch.old_values is not None
        old = batch.old_values.where(counts, 0.0)
        bounded = (v.clamp(old - loss.clip, old + loss.clip) - target) ** 2
        terms, clipped = torch.maximum(square, bounded), (bounded > square).to(mask.dtype)
    divisor, units = denominator(loss, given, sequences)
    value = 0.5 * (sequences.total(terms) * token_weight(loss, sequences)).sum() / divisor
    with torch.no_grad():
        residual = target - v
        sums = {
            "tokens": mask.sum(),
            "sequences": mask.new_tensor(sequences.count),
            "value_loss": value * units.clamp(min=1),
            "value_loss_units": units,
            "clipped": clipped.sum(),
            "value": v.sum(),
            "return": target.sum(),
            "return_squared": (target**2).sum(),
            "residual": residual.sum(),
            "residual_squared": (residual**2).sum(),
        }
    return value, torch.stack([sums[name] for name in SUMS]).detach().double()

"""Means over tokens and sequences, padded or packed: what every loss is aggregated by."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

AGGREGATIONS = (
    "token_mean",
    "seq_mean_token_mean",
    "seq_mean_token_sum",
    "seq_mean_token_sum_norm",
    "token_sum",
)


class Denominators(NamedTuple):
    """What the caller gave: numbers or 0-dimensional tensors."""

    normalizer: float | Tensor | None = None
    num_sequences: float | Tensor | None = None
    entropy_normalizer: float | Tensor | None = None

    def to(self, dtype: torch.dtype) -> Denominators:
        """0-dimensional tensors would otherwise turn the loss into their own dtype."""
        return Denominators(*(x.to(dtype) if isinstance(x, Tensor) else x for x in self))


class Sequences:
    """Sums over the tokens of each sequence, and values spread over its tokens.

    `mask` has the floating-point dtype of the values and their shape: [B, T], or [total] with
    offsets [B + 1].
    """

    def __init__(self, mask: Tensor, offsets: Tensor | None) -> None:
        self.shape = mask.shape
        self.index = None
        if offsets is None:
            self.count = mask.shape[0]
        else:
            self.count = offsets.shape[0] - 1
            places = torch.arange(self.shape[0], device=mask.device)
            self.index = torch.searchsorted(offsets[1:].long(), places, right=True)
        self.length = self.total(mask)
        self.at_least_one = self.length.clamp(min=1)

    def total(self, x: Tensor) -> Tensor:
        if self.index is None:
            return x.sum(1)
        return x.new_zeros(self.count).index_add(0, self.index, x)

    def mean(self, x: Tensor) -> Tensor:
        """Over the counting tokens, for an x that is 0 elsewhere."""
        return self.total(x) / self.at_least_one

    def spread(self, x: Tensor) -> Tensor:
        return x[:, None].expand(self.shape) if self.index is None else x[self.index]


def token_weight(loss: Any, sequences: Sequences) -> Tensor:
    """What a sequence's sum is multiplied by before the sequences are added."""
    if loss.aggregation == "seq_mean_token_mean":
        return 1 / sequences.at_least_one
    return torch.ones_like(sequences.length)


def denominator(loss: Any, given: Denominators, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """What the sum over sequences is divided by, and this batch's own share of it, or 0."""
    one, zero = sequences.length.new_ones(()), sequences.length.new_zeros(())
    tokens = sequences.length.sum()
    if loss.aggregation == "token_sum":
        return one, zero
    if loss.aggregation == "token_mean":
        if given.normalizer is not None:
            return one * given.normalizer, zero
        return tokens.clamp(min=1), tokens
    if given.num_sequences is not None:
        count, own = one * given.num_sequences, zero
    else:
        own = (sequences.length > 0).sum() * one if loss.skip_empty else one * sequences.count
        count = own.clamp(min=1)
    if loss.aggregation == "seq_mean_token_sum_norm":
        assert given.normalizer is not None
        return count * given.normalizer, own
    return count, own

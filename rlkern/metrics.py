"""Metrics of a loss: sums, counts and extrema from its own pass, read and merged by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

# Reads one metric from a layout's sums and maxima, both by name.
Reader = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]


def mean(numerator: str, denominator: str = "tokens") -> Reader:
    """sum / count, 0 over nothing."""
    return lambda sums, _: sums[numerator] / sums[denominator].clamp(min=1)


def largest(name: str, count: str = "") -> Reader:
    """The extremum over nothing is NaN: where `count` is 0, or for finite entries none was seen."""
    return lambda sums, maxima: _or_nan(maxima[name], sums, maxima[name], count)


def smallest(name: str, count: str = "") -> Reader:
    """Of an entry that is kept negated, so that one kind of reduction serves both."""
    name = "minus_" + name
    return lambda sums, maxima: _or_nan(-maxima[name], sums, maxima[name], count)


def _or_nan(value: Tensor, sums: Mapping[str, Tensor], entry: Tensor, count: str) -> Tensor:
    nothing = sums[count] == 0 if count else entry == -torch.inf
    return torch.where(nothing, torch.nan, value)


class Layout:
    """Which entry of the vector is what, and how metrics are read from them."""

    def __init__(
        self, sums: tuple[str, ...], maxima: tuple[str, ...], readers: Mapping[str, Reader]
    ) -> None:
        self.sums = sums
        self.maxima = maxima
        self.readers = dict(readers)

    def __len__(self) -> int:
        return len(self.sums) + len(self.maxima)


class Metrics(Mapping[str, Tensor]):
    """Metrics by name, each a 0-dimensional float64 tensor on the loss's device.

    They are held as one vector of sums, counts and extrema, so that micro-batches are merged with
    ``+`` and processes with :meth:`all_reduce`, and the merged value is the joined batch's: a mean
    of means would not be. Nothing here waits for the device until a value is looked at.

    A minimum or maximum over nothing is NaN; a mean over nothing is 0.
    """

    def __init__(self, vector: Tensor, layout: Layout, names: tuple[str, ...]) -> None:
        self.vector = vector
        self._layout = layout
        self._names = names

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            known = name in self._layout.readers
            reason = "this loss or call does not have it" if known else "there is no such metric"
            raise KeyError(f"{name!r}: {reason}; there are {', '.join(self._names)}")
        return self._layout.readers[name](*self._entries())

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"Metrics({', '.join(self._names)})"

    def _entries(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        cut = len(self._layout.sums)
        return (
            dict(zip(self._layout.sums, self.vector[:cut], strict=True)),
            dict(zip(self._layout.maxima, self.vector[cut:], strict=True)),
        )

    def _same_kind(self, other: Metrics) -> bool:
        return self._layout is other._layout and self._names == other._names

    def __add__(self, other: Metrics) -> Metrics:
        """The metrics of both batches joined.

        Raises:
            ValueError: metrics of another loss, or of a call with other arguments.
        """
        if not isinstance(other, Metrics):
            return NotImplemented
        if not self._same_kind(other):
            raise ValueError(
                "metrics: expected those of the same loss and arguments, got "
                f"{', '.join(self._names)} and {', '.join(other._names)}"
            )
        cut = len(self._layout.sums)
        vector = torch.cat(
            [
                self.vector[:cut] + other.vector[:cut],
                torch.maximum(self.vector[cut:], other.vector[cut:]),
            ]
        )
        return Metrics(vector, self._layout, self._names)

    def __radd__(self, other: Any) -> Metrics:
        """So that ``sum(list_of_metrics)`` works."""
        return self if other == 0 else NotImplemented

    def all_reduce(self, group: Any = None) -> Metrics:
        """The metrics of all processes' batches joined: one all-reduce for the sums, one for the
        extrema. `group`: a torch.distributed process group; None: the default one."""
        import torch.distributed as dist

        cut = len(self._layout.sums)
        sums, maxima = self.vector[:cut].clone(), self.vector[cut:].clone()
        dist.all_reduce(sums, dist.ReduceOp.SUM, group)
        if len(maxima):
            dist.all_reduce(maxima, dist.ReduceOp.MAX, group)
        return Metrics(torch.cat([sums, maxima]), self._layout, self._names)

    def item_dict(self) -> dict[str, float]:
        """Every metric as a Python float, with one wait for the device."""
        values = torch.stack([self[name] for name in self._names]).tolist()
        return dict(zip(self._names, values, strict=True))

"""Metrics of a loss: sums, counts and extrema from its own pass, read and merged by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

# An entry of the vector: a tensor on the loss's device, or a number, once they are all at hand.
Entry = Any
# Reads one metric from the entries by name.
Reader = Callable[["Entries"], Entry]


def at_least(entry: Entry, bound: float) -> Entry:
    return entry.clamp(min=bound) if isinstance(entry, Tensor) else max(entry, bound)


def quotient(a: Entry, b: Entry) -> Entry:
    """a / b, as floating-point numbers have it where b is 0."""
    if isinstance(b, Tensor) or b != 0:
        return a / b
    return math.nan if a == 0 or a != a else math.copysign(math.inf, a)


def mean(numerator: str, denominator: str = "tokens") -> Reader:
    """sum / count, 0 over nothing."""
    return lambda entries: entries[numerator] / at_least(entries[denominator], 1)


def largest(name: str, count: str = "") -> Reader:
    """The extremum over nothing is NaN: where `count` is 0, or for finite entries none was seen."""
    return lambda entries: _or_nan(entries[name], entries[name], entries[count] if count else None)


def smallest(name: str, count: str = "") -> Reader:
    """Of an entry that is kept negated, so that one kind of reduction serves both."""
    name = "minus_" + name
    return lambda entries: _or_nan(-entries[name], entries[name], entries[count] if count else None)


def _or_nan(value: Entry, entry: Entry, count: Entry | None) -> Entry:
    nothing = entry == -torch.inf if count is None else count == 0
    if isinstance(value, Tensor):
        return torch.where(nothing, torch.nan, value)
    return math.nan if nothing else value


class Layout:
    """Which entry of the vector is what, and how metrics are read from them."""

    def __init__(
        self, sums: tuple[str, ...], maxima: tuple[str, ...], readers: Mapping[str, Reader]
    ) -> None:
        self.sums = sums
        self.maxima = maxima
        self.readers = dict(readers)
        self.places = {name: i for i, name in enumerate(sums + maxima)}

    def __len__(self) -> int:
        return len(self.sums) + len(self.maxima)


class Entries:
    """The entries of a vector, or of its list, by name."""

    def __init__(self, layout: Layout, vector: Tensor | list[float]) -> None:
        self._places = layout.places
        self._vector = vector

    def __getitem__(self, name: str) -> Entry:
        return self._vector[self._places[name]]


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
        return self._layout.readers[name](Entries(self._layout, self.vector))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"Metrics({', '.join(self._names)})"

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
        entries = Entries(self._layout, self.vector.tolist())
        return {name: self._layout.readers[name](entries) for name in self._names}

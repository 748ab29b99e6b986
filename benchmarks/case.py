"""What a benchmark is made of: a case, its contestants and the floors they must reach."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        processes: Fresh processes, each of which measures every contestant.
        rounds: Timed calls of a contestant in a process, at most.
        seconds: What these may take together, inputs restored included. Whoever needs longer gets
            fewer rounds, and the table says how many.
        least: The rounds that everyone gets.
        warmup: Rounds before them that are thrown away.
    """

    processes: int
    rounds: int
    seconds: float = math.inf
    least: int = 3
    warmup: int = 1


FULL = Plan(processes=3, rounds=7, seconds=1.0)
#: For shapes beside the main one.
SHORT = Plan(processes=2, rounds=5, seconds=0.5)
QUICK = Plan(processes=1, rounds=3, seconds=0.3)


@dataclass(frozen=True)
class Contestant:
    """One implementation of one task.

    Attributes:
        task: What is computed; contestants of one task are compared with each other.
        name: Who computes it. Names that start with "rlkern" are ours, the others are peers.
        build: Imports what is needed and returns the function to time. It is called in the child
            process; whatever it raises becomes the reason for which the contestant is skipped.
    """

    task: str
    name: str
    build: Callable[[], Callable[..., Any]]

    @property
    def key(self) -> str:
        return f"{self.task}/{self.name}"

    @property
    def ours(self) -> bool:
        return self.name.startswith("rlkern")


@dataclass(frozen=True)
class Floor:
    """A promise: the times of `against`, added, are at least `least` times the contestant's.

    `against` names ceilings ("read") or contestants ("forward/eager"), so one rule serves both
    "0.6 of the read ceiling" and "4 times as fast as eager".
    """

    contestant: str
    against: tuple[str, ...]
    least: float


@dataclass(frozen=True)
class MemoryLimit:
    """A promise: peak extra memory is at most this share of the case's bulk tensor."""

    contestant: str
    most: float


class Case:
    """One operator at one shape: the inputs, who computes on them, and what is right.

    A subclass allocates its inputs in `__init__` from keyword parameters that JSON can carry,
    because every measurement builds the case again in a fresh process.
    """

    operator: ClassVar[str]
    contestants: ClassVar[tuple[Contestant, ...]]
    #: Task -> the ceilings whose added time no implementation of that task can beat. `("read",
    #: "copy")` and `("read", "scale")`, in this order, are two passes over the same bytes: see
    #: `pairs`. Tensors that are read beside the one that is copied come after it.
    bounds: ClassVar[dict[str, tuple[str, ...]]]

    #: "cold": all is pushed out of the caches before each timed call, code included, as after
    #: a model's forward pass. "warm": two calls go before it, as in a loop of nothing else.
    cache: str = "cold"

    #: The tensor whose traffic dominates: ceilings move its bytes, memory is a share of it.
    bulk: torch.Tensor
    #: A result is wrong, and gets no speed, when any of its errors exceeds this; by the names that
    #: `errors` gives, where one bound for all would let a wrong result pass.
    tolerance: float | Mapping[str, float]

    @staticmethod
    def floors(**params: Any) -> tuple[Floor | MemoryLimit, ...]:
        """The promises made for these parameters; none by default."""
        return ()

    def pairs(self) -> list[str]:
        """The ceilings, "read then copy" for example, that take the place of two added ones.

        In a cold case the second pass over the same bytes finds in the caches what the first left
        there. Added cold passes would be more than an implementation needs.
        """
        twice = (("read", "copy"), ("read", "scale"))
        found = {" then ".join(names) for names in self.bounds.values() if names in twice}
        return sorted(found) if self.cache == "cold" else []

    def prepare(self, task: str) -> tuple[Any, ...]:
        """Restores the inputs and returns the arguments of one call, outside the timed region."""
        raise NotImplementedError

    def errors(self, task: str, outputs: Any) -> dict[str, float]:
        """Named errors of a contestant's outputs against float64."""
        raise NotImplementedError

    def allowed(self, name: str) -> float:
        """The tolerance of the error of this name."""
        return self.tolerance[name] if isinstance(self.tolerance, Mapping) else self.tolerance

    def right(self, errors: Mapping[str, float]) -> bool:
        """Whether every error is within its tolerance; a NaN is not."""
        return all(value <= self.allowed(name) for name, value in errors.items())

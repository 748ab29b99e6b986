"""What a GPU benchmark is made of, and where it is found.

An operator joins by a file `bench_<operator>.py` in this folder with a class under `@register`;
nothing else is edited.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

CASES: list[type[GpuCase]] = []


@dataclass(frozen=True)
class Contestant:
    """One implementation of one task.

    Attributes:
        task: What is computed; contestants of one task are compared with each other.
        name: Who computes it. Names that start with "rlkern" are ours.
        build: Imports what is needed and returns the function to time. An ImportError, or any
            other error, becomes the reason for which the contestant is skipped.
        target: The share of the floor (of the copy bandwidth, or of the bf16 product where the
            case says how much it multiplies) that we promise, None where nothing is.
        dry: Whether a dry run builds it too; false for what takes long to compile.
    """

    task: str
    name: str
    build: Callable[[], Callable[..., Any]]
    target: float | None = None
    dry: bool = True

    @property
    def ours(self) -> bool:
        return self.name.startswith("rlkern")


class GpuCase(ABC):
    """One operator at one shape: its inputs, who computes on them, what is right.

    `device` is "cpu" in a dry run, where shapes are tiny and nothing is promised.
    """

    operator: ClassVar[str]
    contestants: ClassVar[tuple[Contestant, ...]]

    def __init__(self, device: str, tiny: bool) -> None:
        self.device = device
        self.tiny = tiny

    @staticmethod
    @abstractmethod
    def small_calls(device: str) -> None:
        """Calls every kernel on every path with few blocks, for compute-sanitizer."""

    @abstractmethod
    def shape(self) -> str:
        """The shape and dtype, for the table."""

    @abstractmethod
    def bytes_moved(self, task: str) -> int:
        """Bytes that no implementation of a task can avoid: inputs read and outputs written."""

    def flop(self, task: str) -> int:
        """Operations of the matrix products that no implementation of a task can avoid, where
        these and not the bytes are what binds; 0 elsewhere."""
        return 0

    @abstractmethod
    def prepare(self, task: str) -> tuple[Any, ...]:
        """Fresh arguments of one call, made outside the timed region."""

    @abstractmethod
    def errors(self, task: str, outputs: Any) -> dict[str, tuple[float, float]]:
        """Name -> (error against float64, largest error that counts as right)."""


def register(case: type[GpuCase]) -> type[GpuCase]:
    CASES.append(case)
    return case


def discover() -> list[type[GpuCase]]:
    for path in sorted(Path(__file__).parent.glob("bench_*.py")):
        importlib.import_module(f"benchmarks.gpu.{path.stem}")
    return CASES


def free(device: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()

"""The contestants that most operators have: ours on each backend, a few lines of eager PyTorch as
trainers write them, and these under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.registry import Contestant

Call = Callable[..., Any]
without_gradient = torch.no_grad()


def on_backend(backend: str, ours: Call) -> Call:
    """Named, so that a machine that lacks it says so, and nothing else is timed instead."""
    import rlkern

    def call(*args: Any) -> Any:
        with rlkern.use_backend(backend):
            return ours(*args)

    return call


def with_gradient(call: Call) -> Call:
    """(loss, metrics) of a call as (loss, the gradient of its first argument, metrics)."""

    def both(first: torch.Tensor, *rest: Any) -> Any:
        loss, metrics = call(first, *rest)
        (gradient,) = torch.autograd.grad(loss, first)
        return loss, gradient, metrics

    return both


def usual(
    task: str,
    ours: Call,
    eager: Call,
    *,
    backends: tuple[str, ...] = ("native", "triton"),
    compiles: bool = True,
    wrap: Callable[[Call], Call] = without_gradient,
) -> tuple[Contestant, ...]:
    """`wrap` makes what is timed of a call: without a gradient, or with_gradient."""
    found = [
        Contestant(task, f"rlkern {backend}", lambda b=backend: wrap(on_backend(b, ours)))
        for backend in backends
    ]
    found.append(Contestant(task, "eager", lambda: wrap(eager)))
    if compiles:
        build = lambda: wrap(torch.compile(eager, dynamic=False))  # noqa: E731
        found.append(Contestant(task, "torch.compile", build, dry=False))
    return tuple(found)


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The error's 2-norm as a share of the result's."""
    return float((found.double() - exact).norm() / exact.norm())

"""What the tests on a GPU share: when they are skipped, and how a launch is put to the test."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from rlkern import _native


def why_not() -> str:
    if not torch.cuda.is_available():
        return f"no NVIDIA GPU that torch {torch.__version__} can use"
    if _native.problems["cuda"]:
        return f"_C_cuda is not loaded: {_native.problems['cuda']}"
    return ""


REASON = why_not()
MARKS = [pytest.mark.gpu, pytest.mark.skipif(bool(REASON), reason=REASON)]
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def poison_freed_memory(*sizes: int) -> None:
    """Frees float32 tensors of NaN, which the caching allocator hands out next."""
    poison = [torch.full((size,), torch.nan, device="cuda") for size in sizes]
    del poison


def on_another_stream(inputs: Iterable[torch.Tensor], call: Callable[..., Any]) -> Any:
    """What a call returns that is enqueued on a stream of its own, behind copies of its inputs that
    are late: a launch on any other stream would read zeros."""
    inputs = list(inputs)
    late = [torch.zeros_like(x) for x in inputs]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for to, x in zip(late, inputs, strict=True):
            to.copy_(x)
        found = call(*late)
    stream.synchronize()
    return found


def assert_nothing_waits(step: Callable[[], Any]) -> None:
    """The host is through with a step while the GPU has not begun it."""
    step()  # what is compiled or loaded once
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(1_000_000_000)  # half a second and more
        step()
        done.record()
        # The mode sees torch's own waits; one of ours would have lasted until now.
        assert not done.query()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def captured(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of a step, and what it returned: tensors that each replay fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    return graph, outputs


def assert_compiles_whole(function, x):
    """The loss that a function makes of a tensor has the same gradient inside torch.compile."""
    gradients = []
    for run in (function, torch.compile(function, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        run(leaf).backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)

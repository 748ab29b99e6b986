"""Time, launches and memory of one call, by CUDA events; by the host's clock in a dry run."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

# More than any second-level cache in use, written before each call so that no call finds its
# inputs there.
FLUSH_BYTES = 256 * 2**20
# About half a millisecond.
AHEAD_CYCLES = 1_000_000


class Timer:
    def __init__(self, device: str) -> None:
        self.device = device
        self.cuda = device == "cuda"
        self._flush = torch.empty(FLUSH_BYTES if self.cuda else 8, dtype=torch.uint8, device=device)

    def once(self, call: Callable[..., Any], args: tuple[Any, ...]) -> float:
        """Seconds of one call whose arguments are not in the cache."""
        self._flush.zero_()
        if not self.cuda:
            start = time.perf_counter()
            call(*args)
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Keeps the GPU busy until the call is enqueued, so that the host's share of it, which a
        # trainer's queue hides, stays out of the figure.
        torch.cuda._sleep(AHEAD_CYCLES)
        begin.record()
        call(*args)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def samples(
        self, call: Callable[..., Any], prepare: Callable[[], tuple[Any, ...]], seconds: float
    ) -> list[float]:
        """Times of single calls after three for warm-up: at least five, at most fifty, for as long
        as `seconds` allow."""
        for _ in range(3):
            self.once(call, prepare())
        taken: list[float] = []
        deadline = time.monotonic() + seconds
        while len(taken) < 5 or (len(taken) < 50 and time.monotonic() < deadline):
            taken.append(self.once(call, prepare()))
        return taken

    def launches(self, call: Callable[..., Any], args: tuple[Any, ...]) -> int | None:
        """Kernels, copies and fills that one call puts on the GPU."""
        if not self.cuda:
            return None
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
            call(*args)
            torch.cuda.synchronize()
        return sum(event.device_type == DeviceType.CUDA for event in recorded.events())

    def peak_bytes(self, call: Callable[..., Any], args: tuple[Any, ...]) -> int | None:
        """Memory that a call takes at its highest beyond what was held before it."""
        if not self.cuda:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call(*args)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del result
        return peak


def ceilings(device: str) -> dict[str, float]:
    """What the machine can do at best: bytes a second copied and read, FLOP a second multiplied.

    Random data: a product of zeros can run faster than real ones.
    """
    cuda = device == "cuda"
    timer = Timer(device)
    size = 2**32 if cuda else 2**16
    source = torch.empty(size // 4, dtype=torch.float32, device=device).normal_()
    copy = torch.empty_like(source)
    longs, rows = source.view(torch.int64), source.view(-1, 2**15 if cuda else 2**7)
    n = 8192 if cuda else 64
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))

    def best(*calls: Callable[[], Any]) -> float:
        return min(median(timer.samples(call, tuple, 1.0 if cuda else 0.02)) for call in calls)

    return {
        "copy_bytes_per_second": 2 * size / best(lambda: copy.copy_(source)),
        "read_bytes_per_second": size
        / best(source.sum, source.amax, longs.sum, lambda: rows.sum(-1)),
        "in_place_bytes_per_second": 2 * size / best(lambda: copy.mul_(1.0001)),
        "bf16_flop_per_second": 2 * n**3 / best(lambda: a @ b),
    }

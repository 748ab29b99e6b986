"""One child process: an operator's time along one axis, from one token to as many as fit.

Run by `sweeps.py` as `python -m benchmarks.sweep_worker REQUEST REPLY`, two JSON files. Calls
follow each other without eviction, so that a small point shows the call and the caches.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import bench_from_logits, bench_policy_loss, bench_return_scan, ceilings
from benchmarks import bench_token_logprobs as rows
from benchmarks.bench_token_logprobs import Produce

VOCAB, SEQUENCES, LENGTH = 32000, 64, 4096
#: Rows that are drawn, and that larger batches repeat: float64 checks these.
BLOCK = 64
#: Eager holds the logits several times over, and its slope is known by then.
EAGER_ELEMENTS = 1 << 26
SECONDS, LEAST, MOST = 0.3, 3, 200
READ_BYTES = 1 << 28


@dataclass(frozen=True)
class Point:
    """One size, ready to run.

    Attributes:
        calls: By contestant; each restores what it needs and returns the call to time.
        elements: What the time is divided by.
        size: Bytes that a call of ours reads and writes, each counted once.
        error: The error of a contestant's result against float64, as its case defines it.
        tolerance: A larger error gets no time.
    """

    calls: dict[str, Callable[[], Callable[[], Any]]]
    elements: float
    size: int
    error: Callable[[Any], float]
    tolerance: float


def available_bytes() -> int:
    """What Linux would give without swapping, the file cache included."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("this system does not say how much memory is available")


class Logits:
    """A block of bf16 rows with their log-probabilities in float64, repeated to any number."""

    def __init__(self, tokens: int, vocab: int) -> None:
        case = rows.TokenLogprobs(rows=1, tokens=min(tokens, BLOCK), vocab=vocab, dtype="bfloat16")
        block, ids = case.pristine[0], case.token_ids[0]
        repeats = -(-tokens // BLOCK)
        self.block, self.repeats = block, repeats
        self.ids = ids.repeat(repeats)[:tokens]
        self.exact = block.double().log_softmax(-1)
        self.truth = self.exact[torch.arange(len(ids)), ids].repeat(repeats)[:tokens]
        self.data = torch.empty(tokens, vocab, dtype=torch.bfloat16)
        self.restore()

    def restore(self) -> Tensor:
        for start in range(0, len(self.data), BLOCK):
            part = self.data[start : start + BLOCK]
            part.copy_(self.block[: len(part)])
        return self.data


def token_logprobs(tokens: int, vocab: int) -> Point:
    logits = Logits(tokens, vocab)
    contestants = {
        "rlkern": rows.forward(rows.build_rlkern),
        "eager": rows.forward(lambda: rows.eager),
    }

    def ready(build):
        function = build()
        return lambda: lambda: function(logits.data, logits.ids)

    return Point(
        {name: ready(build) for name, build in contestants.items()},
        tokens * vocab,
        logits.data.nbytes,
        # In eager a bf16 log-probability near -12 is rounded by 1/32.
        lambda out: ((out.double() - logits.truth) / logits.truth.clamp(max=-1)).abs().max().item(),
        rows.TOLERANCE[torch.bfloat16],
    )


def from_logits(tokens: int, vocab: int) -> Point:
    logits = Logits(tokens, vocab)
    advantages = torch.linspace(-1, 1, BLOCK).repeat(logits.repeats)[None, :tokens]
    old, weight = logits.truth.float()[None], torch.zeros((), requires_grad=True)
    ids = logits.ids[None]
    upstream = -advantages[0, : len(logits.block), None].double()
    expected = -upstream * logits.exact.exp()
    expected.scatter_add_(1, logits.ids[: len(expected), None], upstream)
    contestants = {
        "rlkern in place": lambda: bench_from_logits.build_rlkern(True),
        "eager": bench_from_logits.build_eager,
    }

    def ready(build):
        function = bench_from_logits.with_gradient(build)()
        # Advantages [1, tokens, 1] against eager's [rows, 1], which it broadcasts.
        a = advantages if build is not bench_from_logits.build_eager else advantages[0]

        def restore():
            made = Produce.apply(weight, logits.restore()[None])
            if build is bench_from_logits.build_eager:
                # It knows one advantage a row: tokens become rows.
                return lambda: function(made.transpose(0, 1), ids.T, old.T, a)
            return lambda: function(made, ids, old, a)

        return restore

    def error(out) -> float:
        # The mean over the batch divides by its tokens; the last rows repeat the first.
        gradient = out[1].reshape(tokens, vocab)
        last = (tokens - 1) // BLOCK * BLOCK
        worst = []
        for part in (gradient[:BLOCK], gradient[last:]):
            wanted = expected[: len(part)]
            worst.append((part.double() * tokens - wanted).norm() / wanted.norm())
        # torch's maximum keeps a NaN, Python's would lose it.
        return torch.stack(worst).max().item()

    return Point(
        {name: ready(build) for name, build in contestants.items()},
        tokens * vocab,
        logits.data.nbytes,
        error,
        bench_from_logits.TOLERANCE[torch.bfloat16],
    )


def policy_loss(tokens: int) -> Point:
    length = min(tokens, LENGTH)
    case = bench_policy_loss.PolicyLosses(sequences=tokens // length, tokens=length, cache="warm")
    # Every token counts: the case's ragged lengths would leave none of a single one.
    case.mask = torch.ones_like(case.mask)
    return of_case(case, bench_policy_loss.task("dapo + k3"), tokens, 4 * 4 * tokens)


def gae(tokens: int) -> Point:
    case = bench_return_scan.ReturnScans(sequences=SEQUENCES, tokens=tokens)
    return of_case(case, "gae", SEQUENCES * tokens, 4 * 4 * SEQUENCES * tokens, "PyTorch loop")


def of_case(case: Any, task: str, elements: int, size: int, eager: str = "eager") -> Point:
    """A case's own contestants and its own errors."""
    mine = {c.name: c for c in case.contestants if c.task == task and c.name in ("rlkern", eager)}

    def ready(contestant):
        function = contestant.build()

        def restore():
            arguments = case.prepare(task)
            return lambda: function(*arguments)

        return restore

    return Point(
        {name: ready(contestant) for name, contestant in mine.items()},
        elements,
        size,
        lambda out: torch.tensor(list(case.errors(task, out).values())).max().item(),
        case.tolerance,
    )


def timed(ready: Callable[[], Callable[[], Any]], seconds: float) -> list[float]:
    samples: list[float] = []
    begin = time.perf_counter()
    while len(samples) < LEAST or (time.perf_counter() - begin < seconds and len(samples) < MOST):
        call = ready()
        start = time.perf_counter()
        result = call()
        samples.append(time.perf_counter() - start)
        del result
    return samples


def run(n: int, point: Point, seconds: float) -> dict[str, Any]:
    """Each contestant of a point: right first, then its time."""
    measured: dict[str, Any] = {"n": n, "elements": point.elements, "bytes": point.size}
    measured |= {"seconds": {}, "errors": {}, "wrong": {}, "skipped": {}}
    for name, ready in point.calls.items():
        if not name.startswith("rlkern") and point.elements > EAGER_ELEMENTS:
            measured["skipped"][name] = f"not run above {EAGER_ELEMENTS >> 20} Mi elements"
            continue
        error = measured["errors"][name] = point.error(ready()())
        if not error <= point.tolerance:
            measured["wrong"][name] = f"error {error:.1e}; allowed {point.tolerance:.0e}"
            continue
        samples = timed(ready, seconds)
        measured["seconds"][name] = {
            "median": median(samples), "low": min(samples), "high": max(samples),
        }  # fmt: skip
    return measured


# Operator -> axis -> (values, what builds a point of one).
POWERS = tuple(2**i for i in range(17))
SWEEPS: dict[str, dict[str, tuple[tuple[int, ...], Callable[[int], Point]]]] = {
    "token_logprobs": {
        "tokens": (POWERS, lambda n: token_logprobs(n, VOCAB)),
        "vocabulary": ((1024, 4096, 8192, 32000, 50257, 128256, 151936, 262144),
                       lambda n: token_logprobs(BLOCK, n)),
    },
    "from_logits": {
        # Every call needs the logits anew: for 64 K tokens, a second's copy for each.
        "tokens": (POWERS[:15], lambda n: from_logits(n, VOCAB)),
        "vocabulary": ((1024, 4096, 8192, 32000, 50257, 128256, 151936, 262144),
                       lambda n: from_logits(BLOCK, n)),
    },
    "policy_loss": {"tokens": (tuple(2**i for i in range(21)), policy_loss)},
    "gae": {"tokens in each of 64 sequences": (POWERS, gae)},
}  # fmt: skip
#: What the threads share out.
WHOLE: dict[str, Callable[[], Point]] = {
    "token_logprobs": lambda: token_logprobs(1024, VOCAB),
    "from_logits": lambda: from_logits(1024, VOCAB),
    "policy_loss": lambda: policy_loss(1 << 20),
    "gae": lambda: gae(8192),
}


def over_threads(operator: str, quick: bool, seconds: float) -> Iterable[dict[str, Any]]:
    """One size on more and more threads; an element's share of the time of all of them."""
    _, build = next(iter(SWEEPS[operator].values()))
    point = build(8) if quick else WHOLE[operator]()
    point = Point({n: c for n, c in point.calls.items() if n.startswith("rlkern")},
                  point.elements, point.size, point.error, point.tolerance)  # fmt: skip
    cores = os.cpu_count() or 1
    for threads in sorted({1, cores, *(2**i for i in range(cores.bit_length()) if 2**i < cores)}):
        torch.set_num_threads(threads)
        yield run(threads, point, seconds) | {"elements": point.elements / threads}


def read_rate() -> float:
    """Bytes a second that all threads together read from memory."""
    words = torch.ones(READ_BYTES // 4)
    calls = [call for key, call in ceilings.candidates(words).items() if "read" in key]
    return READ_BYTES / min(median(timed(lambda call=call: call, 0.1)) for call in calls)


def sweep(operator: str, axis: str, quick: bool) -> dict[str, Any]:
    """What the reply holds: the points, where they were to end, what cut them short, and what
    memory gives at best."""
    rate, seconds = read_rate(), 0.01 if quick else SECONDS
    reply: dict[str, Any] = {"read_bytes_per_second": rate, "cut": ""}
    if axis == "threads":
        points = list(over_threads(operator, quick, seconds))
        return reply | {"points": points, "end": os.cpu_count() or 1}
    values, build = SWEEPS[operator][axis]
    values = values[:4] if quick else values
    points = []
    for n in values:
        if points:
            # Its bytes, and as much again for what a call allocates: eager is left out by then.
            needed, there = 2 * n / points[-1]["n"] * points[-1]["bytes"], available_bytes()
            if needed > there:
                reply["cut"] = (
                    f"The sweep ends before {n}, which takes {needed / 2**30:.1f} GiB of memory; "
                    f"{there / 2**30:.1f} were free."
                )
                break
        points.append(run(n, build(n), seconds))
    return reply | {"points": points, "end": values[-1]}


def main(request_file: str, reply_file: str) -> None:
    request = json.loads(Path(request_file).read_text())
    Path(reply_file).write_text(json.dumps(sweep(**request)))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""One child process: checks every contestant, then times them in turns, then weighs them.

Run by `measure.py` as `python -m benchmarks.worker REQUEST REPLY`, two JSON files.
"""

from __future__ import annotations

import gc
import importlib
import json
import re
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import ceilings
from benchmarks.case import Case, Plan
from benchmarks.memory import peak_extra_bytes

#: Larger than the last-level caches in use, so that reading it leaves nothing of the inputs there.
_EVICTION_BYTES = 256 << 20

#: A cold start costs well below a millisecond.
_LONG_SECONDS = 0.02

#: A contestant ready to be called: restores its inputs and returns the call to time.
Ready = Callable[[], Callable[[], Any]]


def reason(error: BaseException) -> str:
    """The first line of an error, with folders cut off so that reports name no machine's paths."""
    lines = str(error).strip().splitlines() or [""]
    text = re.sub(r"(?<![\w.])(?:/[^/\s:'\"()]+)+/", "", lines[0])
    return f"{type(error).__name__}: {text}"


def admit(case: Case) -> tuple[dict[str, Ready], dict[str, dict[str, Any]]]:
    """Builds every contestant and compares it with float64; only right ones may be timed."""
    ready: dict[str, Ready] = {}
    entries: dict[str, dict[str, Any]] = {}
    for contestant in case.contestants:
        entry = entries[contestant.key] = {"status": "ok"}
        try:
            function = contestant.build()
            errors = case.errors(contestant.task, function(*case.prepare(contestant.task)))
        except Exception as error:
            entry |= {"status": "skipped", "reason": reason(error)}
            continue
        entry["errors"] = errors
        if not case.right(errors):
            found = [f"{x} {e:.1e} (allowed {case.allowed(x):.0e})" for x, e in errors.items()]
            entry |= {"status": "wrong", "reason": "error " + ", ".join(found)}
            continue

        def make_ready(function=function, task=contestant.task):
            arguments = case.prepare(task)
            return lambda: function(*arguments)

        ready[contestant.key] = make_ready
    return ready, entries


def add_ceilings(case: Case, ready: dict[str, Ready]) -> None:
    """Lets the machine's ceilings compete: same buffer, same restoring, same turns."""
    task = case.contestants[0].task
    for key, call in ceilings.candidates(case.bulk).items():

        def make_ready(call=call):
            case.prepare(task)
            return call

        ready[key] = make_ready


def timed(call: Callable[[], Any]) -> tuple[float, int]:
    """Seconds and minor page faults of one call; its result is dropped after the clock stops.

    A tensor of this size comes fresh from the system at every call, page by page, and users pay
    for that: an out-of-place contestant's allocations are part of its time.
    """
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    del result
    return seconds, faults


def warm(call: Callable[[], Any]) -> None:
    """Two calls, or one that is so long that it is cold at its start alone."""
    if timed(call)[0] < _LONG_SECONDS:
        call()


def alternate(
    ready: Mapping[str, Ready],
    plan: Plan,
    before: Callable[[Callable[[], Any]], object] = lambda call: None,
    clock: Callable[[Callable[[], Any]], tuple[float, int]] = timed,
) -> dict[str, list[tuple[float, int]]]:
    """Times A B C A B C ...: a slow minute of the machine then falls on all alike.

    A contestant whose turns have taken `plan.seconds` sits out the later rounds, but for the
    `plan.least` that everyone gets.

    Args:
        ready: The contestants, in the order of their turns.
        plan: How many rounds.
        before: Given each call before it is timed, after the inputs are restored.
        clock: Runs a call and returns its (seconds, page faults).
    """
    samples: dict[str, list[tuple[float, int]]] = {key: [] for key in ready}
    spent = dict.fromkeys(ready, 0.0)
    for turn in range(plan.warmup + plan.rounds):
        for key, make_ready in ready.items():
            if len(samples[key]) >= plan.least and spent[key] >= plan.seconds:
                continue
            start = time.perf_counter()
            call = make_ready()
            before(call)
            sample = clock(call)
            if turn >= plan.warmup:
                samples[key].append(sample)
                spent[key] += time.perf_counter() - start
    return samples


def work(case: Case, plan: Plan) -> dict[str, Any]:
    """Everything one process measures of a case."""
    ready, entries = admit(case)
    contestants = list(ready)
    add_ceilings(case, ready)
    eviction = torch.ones(_EVICTION_BYTES // 4 if case.cache == "cold" else 0)

    def before(call):
        if case.cache == "cold":
            # Restoring the inputs leaves their last part in the cache, modified; reading something
            # else writes it back before the clock starts, for everyone.
            eviction.sum()
        else:
            warm(call)

    # A collection in the middle of a call would cross everything that the peers imported.
    gc.collect()
    gc.freeze()
    samples = alternate(ready, plan, before=before)
    for key, values in samples.items():
        entry = entries.setdefault(key, {"status": "ok"})
        entry["seconds"] = [seconds for seconds, _ in values]
        entry["page_faults"] = [faults for _, faults in values]
    for key in contestants:
        try:
            entries[key]["extra_bytes"] = peak_extra_bytes(ready[key]())
        except (OSError, AttributeError) as error:
            entries[key]["memory_reason"] = reason(error)
    return {
        "entries": entries,
        "elements": case.bulk.numel(),
        "bytes": case.bulk.nbytes,
        "threads": torch.get_num_threads(),
    }


def main(request_file: str, reply_file: str) -> None:
    request = json.loads(Path(request_file).read_text())
    module, name = request["case"].split(":")
    case = getattr(importlib.import_module(module), name)(**request["params"])
    reply = work(case, Plan(**request["plan"]))
    Path(reply_file).write_text(json.dumps(reply))


if __name__ == "__main__":
    main(*sys.argv[1:])

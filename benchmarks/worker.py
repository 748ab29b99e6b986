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
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import ceilings
from benchmarks.case import Case, Plan
from benchmarks.measure import ANNOUNCED
from benchmarks.memory import peak_extra_bytes

#: Larger than the last-level caches in use, so that reading it leaves nothing of the inputs there.
_EVICTION_BYTES = 256 << 20

#: A cold start costs well below a millisecond.
_LONG_SECONDS = 0.02

#: Told a contestant's key before it runs, and "" after: whoever outlives this process reads it.
Announce = Callable[[str], object]

#: A contestant ready to be called: restores its inputs and returns the call to time.
Ready = Callable[[], Callable[[], Any]]


def reason(error: BaseException) -> str:
    """The first line of an error, with folders cut off so that reports name no machine's paths."""
    lines = str(error).strip().splitlines() or [""]
    text = re.sub(r"(?<![\w.])(?:/[^/\s:'\"()]+)+/", "", lines[0])
    return f"{type(error).__name__}: {text}"


def admit(
    case: Case, without: Collection[str] = (), announce: Announce = lambda key: None
) -> tuple[dict[str, Ready], dict[str, dict[str, Any]]]:
    """Builds every contestant and compares it with float64; only right ones may be timed."""
    ready: dict[str, Ready] = {}
    entries: dict[str, dict[str, Any]] = {}
    for contestant in case.contestants:
        if contestant.key in without:
            continue
        entry = entries[contestant.key] = {"status": "ok"}
        arguments = case.prepare(contestant.task)
        announce(contestant.key)
        try:
            function = contestant.build()
            outputs = function(*arguments)
        except Exception as error:
            entry |= {"status": "skipped", "reason": reason(error)}
            continue
        finally:
            announce("")
        # Outside of the `try`: a judge that fails is no fault of the contestant's.
        errors = case.errors(contestant.task, outputs)
        del arguments, outputs
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
    for key, call in ceilings.candidates(case.bulk, case.pairs()).items():

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
    announce: Announce = lambda key: None,
) -> tuple[dict[str, list[tuple[float, int]]], dict[str, dict[str, Any]]]:
    """Times A B C A B C ...: a slow minute of the machine then falls on all alike.

    A contestant whose turns have taken `plan.seconds` sits out the later rounds, but for the
    `plan.least` that everyone gets. One that raises is out, with its samples.

    Args:
        ready: The contestants, in the order of their turns.
        plan: How many rounds.
        before: Given each call before it is timed, after the inputs are restored.
        clock: Runs a call and returns its (seconds, page faults).
        announce: Told whose turn it is.

    Returns:
        The samples of those who kept running, and an entry for each that did not.
    """
    failed: dict[str, dict[str, Any]] = {}
    samples: dict[str, list[tuple[float, int]]] = {key: [] for key in ready}
    spent = dict.fromkeys(ready, 0.0)
    for turn in range(plan.warmup + plan.rounds):
        for key, make_ready in ready.items():
            enough = len(samples[key]) >= plan.least and spent[key] >= plan.seconds
            if enough or key in failed:
                continue
            start = time.perf_counter()
            call = make_ready()
            announce(key)
            try:
                before(call)
                sample = clock(call)
            except Exception as error:
                # The first call was the one that was compared with float64.
                failed[key] = {"status": f"failed at call {turn + 2}", "reason": reason(error)}
                continue
            if turn >= plan.warmup:
                samples[key].append(sample)
                spent[key] += time.perf_counter() - start
    announce("")
    return {key: values for key, values in samples.items() if key not in failed}, failed


def work(
    case: Case,
    plan: Plan,
    without: Collection[str] = (),
    backwards: bool = False,
    announce: Announce = lambda key: None,
) -> dict[str, Any]:
    """Everything one process measures of a case.

    Args:
        without: Keys of contestants that are left out.
        backwards: Whether turns go from the last to the first, so that nobody follows the same
            neighbour, and finds what it left behind, in every process.
    """
    ready, entries = admit(case, without, announce)
    add_ceilings(case, ready)
    if backwards:
        ready = dict(reversed(ready.items()))
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
    samples, failed = alternate(ready, plan, before=before, announce=announce)
    entries |= failed
    for key, values in samples.items():
        entry = entries.setdefault(key, {"status": "ok"})
        entry["seconds"] = [seconds for seconds, _ in values]
        entry["page_faults"] = [faults for _, faults in values]
    for key in samples:
        if key.startswith("ceiling/"):
            continue
        call = ready[key]()
        announce(key)
        try:
            entries[key]["extra_bytes"] = peak_extra_bytes(call)
        except Exception as error:
            entries[key]["memory_reason"] = reason(error)
        announce("")
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
    announce = Path(reply_file).with_name(ANNOUNCED).write_text
    plan = Plan(**request["plan"])
    reply = work(case, plan, request["without"], request["backwards"], announce)
    Path(reply_file).write_text(json.dumps(reply))


if __name__ == "__main__":
    main(*sys.argv[1:])

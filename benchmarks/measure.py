"""Measures a case in several fresh processes and condenses what they report.

A process keeps one layout of memory and one mood of the allocator for its whole life, so samples
within it are not independent: the median is taken per process, then over the processes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.case import Case, Floor, MemoryLimit, Plan
from benchmarks.machine import ROOT, busy_share

#: Beside its reply, the file in which a child says whom it runs.
ANNOUNCED = "announced"
#: The most that a child may take; the longest takes a tenth of it on two cores.
CHILD_SECONDS = 600.0
#: How long the machine is watched before each child process, while nothing of ours runs.
BUSY_SECONDS = 1.0


class ChildError(RuntimeError):
    """A child process that ended without a reply.

    Attributes:
        how: What became of it.
        running: The contestant that ran at that time, "" where none did.
    """

    def __init__(self, how: str, running: str, details: str) -> None:
        super().__init__(f"a benchmark process {how}: {details}".rstrip(": \n"))
        self.how, self.running = how, running


def run_child(module: str, request: dict[str, Any]) -> dict[str, Any]:
    """Runs `python -m module REQUEST REPLY`, two JSON files, and returns the reply.

    Raises:
        ChildError: it ended with an error, by a signal, or not within CHILD_SECONDS.
    """
    # The child finds the modules that its parent finds, an installed rlkern before the clone's.
    path = os.pathsep.join([*filter(None, sys.path), str(ROOT)])
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "request.json"), Path(folder, "reply.json")
        announced = answered.with_name(ANNOUNCED)
        asked.write_text(json.dumps(request))
        announced.touch()
        try:
            child = subprocess.run(
                [sys.executable, "-m", module, str(asked), str(answered)],
                cwd=folder,
                # Without this, torch.compile leaves a pool of processes beside the clock.
                env={"TORCHINDUCTOR_COMPILE_THREADS": "1"} | os.environ | {"PYTHONPATH": path},
                capture_output=True,
                text=True,
                timeout=CHILD_SECONDS,
            )
        except subprocess.TimeoutExpired:
            how = f"took longer than {CHILD_SECONDS:g} s"
            raise ChildError(how, announced.read_text(), "") from None
        if child.returncode != 0:
            how = f"ended with {child.returncode}"
            if child.returncode < 0:
                how = f"was ended by {signal.Signals(-child.returncode).name}"
            raise ChildError(how, announced.read_text(), child.stderr)
        return json.loads(answered.read_text())


def measure(
    case: type[Case],
    params: dict[str, Any],
    plan: Plan,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measures a case and returns its summary, ready for JSON.

    A contestant with which a process dies, or hangs, is "crashed": that process and the later ones
    go without it.

    Raises:
        ChildError: a process died while no contestant ran.
    """
    start = time.perf_counter()
    request = {"case": f"{case.__module__}:{case.__qualname__}", "params": params}
    request |= {"plan": asdict(plan)}
    keys = {contestant.key for contestant in case.contestants}
    crashed: dict[str, dict[str, Any]] = {}
    reports: list[dict[str, Any]] = []
    busy = []
    while len(reports) < plan.processes:
        number = len(reports)
        say(f"{case.operator} {params}: process {number + 1} of {plan.processes}")
        busy.append(busy_share(BUSY_SECONDS))
        turns = {"backwards": number % 2 == 1, "without": list(crashed)}
        try:
            report = run_child("benchmarks.worker", request | turns)
        except ChildError as error:
            if error.running not in keys - crashed.keys():
                raise
            crashed[error.running] = {"status": "crashed", "reason": f"its process {error.how}"}
            say(f"{error.running}: its process {error.how}; again without it")
            continue
        report["entries"] |= crashed
        reports.append(report)
    took = time.perf_counter() - start
    summary = summarise(case, params, reports)
    return summary | {"rounds": plan.rounds, "busy_before": busy, "took_seconds": took}


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median over processes, with the lowest and the highest."""
    return {"median": median(values), "low": min(values), "high": max(values)}


def process_medians(reports: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Seconds by name, one median per process; ceilings go by their kind, "read" for example."""
    medians: dict[str, list[float]] = {}
    for key in reports[0]["entries"]:
        if any("seconds" not in report["entries"][key] for report in reports):
            continue
        seconds = [median(report["entries"][key]["seconds"]) for report in reports]
        if key.startswith("ceiling/"):
            key = key.split("/")[1]
            best = medians.get(key, seconds)
            seconds = [min(both) for both in zip(seconds, best, strict=True)]
        medians[key] = seconds
    return medians


def times_as_fast(
    medians: dict[str, list[float]], contestant: str, against: Sequence[str]
) -> dict[str, float] | None:
    """Added time of `against` over the contestant's, or None where one was not measured.

    The ratio is taken in each process: both sides then come from the same turns, and a machine
    that is slower for one process than for the next does not blur it.
    """
    if any(name not in medians for name in (contestant, *against)):
        return None
    added = map(sum, zip(*(medians[name] for name in against), strict=True))
    return spread([theirs / own for theirs, own in zip(added, medians[contestant], strict=True)])


def passes(names: Sequence[str], medians: dict[str, list[float]]) -> list[str]:
    """These ceilings, or the one of all their passes in one call where that was measured."""
    together = " then ".join(names)
    return [together] if together in medians else list(names)


def judge(
    floor: Floor | MemoryLimit, medians: dict[str, list[float]], entries: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """States a floor, what was measured for it, and whether it was met (None: not measured)."""
    value, met = "-", None
    if isinstance(floor, MemoryLimit):
        text = f"extra memory at most {floor.most:.0%}"
        share = entries[floor.contestant].get("extra_share")
        if share is not None:
            value, met = f"{share:.2%}", share <= floor.most
    else:
        against = passes(floor.against, medians)
        names = " + ".join(name.split("/")[-1] for name in against)
        peer = any("/" in name for name in floor.against)
        text = f"{floor.least:g} {'times as fast as' if peer else 'of'} {names}"
        ratio = times_as_fast(medians, floor.contestant, against)
        if ratio is not None:
            value, met = f"{ratio['median']:.2f}", ratio["median"] >= floor.least
    return {"contestant": floor.contestant, "text": text, "value": value, "met": met}


def summarise(
    case: type[Case], params: dict[str, Any], reports: list[dict[str, Any]]
) -> dict[str, Any]:
    """Condenses the processes' reports into one entry per contestant, ceilings and floors."""
    medians = process_medians(reports)
    bounds = {task: passes(names, medians) for task, names in case.bounds.items()}
    first = reports[0]
    entries: dict[str, dict[str, Any]] = {}
    for contestant in case.contestants:
        key = contestant.key
        mine = [report["entries"][key] for report in reports]
        entry = entries[key] = {"task": contestant.task, "name": contestant.name}
        # Failing in one process is failing.
        entry |= next((one for one in mine if one["status"] != "ok"), {"status": "ok"})
        peers = [c for c in case.contestants if c.task == contestant.task and not c.ours]
        entry["peers"] = {peer.name: times_as_fast(medians, key, [peer.key]) for peer in peers}
        if entry["status"] != "ok":
            continue
        names = mine[0]["errors"]
        entry["errors"] = {name: max(one["errors"][name] for one in mine) for name in names}
        entry["seconds"] = spread(medians[key])
        entry["samples"] = [one["seconds"] for one in mine]
        entry["ns_per_element"] = entry["seconds"]["median"] * 1e9 / first["elements"]
        entry["of_ceiling"] = times_as_fast(medians, key, bounds[contestant.task])
        entry["rounds"] = min(len(one["seconds"]) for one in mine)
        entry["page_faults"] = median(median(one["page_faults"]) for one in mine)
        if all("extra_bytes" in one for one in mine):
            entry["extra_bytes"] = max(one["extra_bytes"] for one in mine)
            entry["extra_share"] = entry["extra_bytes"] / first["bytes"]
    return {
        "operator": case.operator,
        "module": case.__module__,
        "params": params,
        "processes": len(reports),
        **{name: first[name] for name in ("elements", "bytes", "threads")},
        "bounds": bounds,
        "ceilings": {name: spread(values) for name, values in medians.items() if "/" not in name},
        "entries": entries,
        "floors": [judge(floor, medians, entries) for floor in case.floors(**params)],
    }

"""Measures every registered operator and writes results.json.

A child process measures one contestant after another and reports each as it is done; where it dies
(an illegal access ends a CUDA process for good) the next child goes on with the rest.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import queue
import subprocess
import sys
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.gpu import registry, timing

ROOT = Path(__file__).resolve().parents[2]
# The most that one contestant may take, compiling included, and what lies before the first one and
# between two: imports, the inputs of a case.
CONTESTANT_SECONDS, START_SECONDS = 180.0, 300.0
PACKAGES = (
    "torch", "triton", "trl", "liger-kernel", "flash-attn", "quack-kernels", "cut-cross-entropy"
)  # fmt: skip


def key(case: type[registry.GpuCase], contestant: registry.Contestant) -> str:
    return f"{case.operator}/{contestant.task}/{contestant.name}"


def skipped(error: Exception, device: str) -> dict[str, Any]:
    """What keeps a contestant out, whatever it is, is a fact to report."""
    if device == "cuda":
        torch.cuda.synchronize()  # raises where the error ended this process's use of the GPU
    text = str(error).strip().splitlines() or [""]
    return {"status": "skipped", "reason": f"{type(error).__name__}: {text[0][:200]}"}


def measure(
    case: registry.GpuCase, contestant: registry.Contestant, seconds: float
) -> dict[str, Any]:
    """One contestant: right first, then its memory, launches and time."""
    try:
        call = contestant.build()
        outputs = call(*case.prepare(contestant.task))
        errors = case.errors(contestant.task, outputs)
    except Exception as error:
        return skipped(error, case.device)
    del outputs
    entry: dict[str, Any] = {"errors": {name: value for name, (value, _) in errors.items()}}
    wrong = [name for name, (value, limit) in errors.items() if not value <= limit]
    if wrong:
        # No speed is reported for a wrong result.
        limits = ", ".join(f"{n} {errors[n][0]:.2g} > {errors[n][1]:.2g}" for n in wrong)
        return entry | {"status": "wrong", "reason": limits}
    timer = timing.Timer(case.device)

    def prepare() -> tuple[Any, ...]:
        return case.prepare(contestant.task)

    taken = timer.samples(call, prepare, seconds)
    entry |= {
        "status": "ok",
        "peak_bytes": timer.peak_bytes(call, prepare()),
        "launches": timer.launches(call, prepare()),
        "seconds": median(taken),
        "lowest": min(taken),
        "highest": max(taken),
        "samples": len(taken),
        "bytes_moved": case.bytes_moved(contestant.task),
        "flop": case.flop(contestant.task),
    }
    return entry


def work(device: str, tiny: bool, done: set[str], say: Any) -> None:
    """The child: measures what is not done yet, and says so line by line."""
    for case_type in registry.discover():
        left = [c for c in case_type.contestants if key(case_type, c) not in done]
        left = [c for c in left if c.dry or not tiny]
        if not left:
            continue
        case, absent = None, {}
        try:
            case = case_type(device, tiny)
        except Exception as error:
            absent = skipped(error, device)
        for contestant in left:
            name = key(case_type, contestant)
            say({"begin": name})
            entry = measure(case, contestant, 0.05 if tiny else 1.5) if case else dict(absent)
            entry |= {"operator": case_type.operator, "task": contestant.task}
            entry |= {"name": contestant.name, "target": contestant.target}
            say({"key": name, "entry": entry | {"shape": case.shape() if case else ""}})
        del case
        registry.free(device)


def describe(device: str) -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    about: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "python": platform.python_version(),
        "versions": versions,
        "device": device,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        about |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "gpu_memory": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    return about


def lines_of(child: subprocess.Popen[str]) -> queue.Queue[str | None]:
    """What a child prints, and None at its end: a queue can be waited for with a limit."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert child.stdout is not None
        for line in child.stdout:
            lines.put(line)
        lines.put(None)

    # A daemon: a compiler's worker that outlives the child may hold the pipe open.
    threading.Thread(target=read, daemon=True).start()
    return lines


def supervise(
    out: Path, device: str, tiny: bool, seconds: float, each: float = CONTESTANT_SECONDS
) -> dict[str, Any]:
    """The parent: starts children until all is done or the time is spent.

    A contestant that takes longer than `each` seconds is stopped with its child and left out.
    """
    deadline = time.monotonic() + seconds
    results: dict[str, Any] = {"about": describe(device), "entries": {}}
    results["ceilings"] = timing.ceilings(device)
    registry.free(device)
    entries = results["entries"]
    while True:
        command = [sys.executable, "-m", "benchmarks.gpu.run", "--child", "--device", device]
        command += ["--tiny"] * tiny
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(json.dumps(sorted(entries)) + "\n")
        child.stdin.close()
        lines, current, limit = lines_of(child), None, START_SECONDS
        since = time.monotonic()
        while True:
            until = min(deadline, since + limit)
            left = until - time.monotonic()
            try:
                line = lines.get(timeout=min(left, 60)) if left > 0 else lines.get_nowait()
            except queue.Empty:
                if left > 0:
                    continue
                # Killed here, not at its next line: what hangs prints none.
                child.kill()
                break
            if line is None:
                break
            if not line.startswith("@@"):
                print(line, end="")
                continue
            said = json.loads(line[2:])
            since = time.monotonic()
            if "begin" in said:
                current, limit = said["begin"], each
            else:
                entries[said["key"]], current, limit = said["entry"], None, START_SECONDS
                print(said["key"], said["entry"].get("seconds", said["entry"].get("reason")))
            (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
            if time.monotonic() > deadline:
                child.kill()
        code = child.wait()
        late = time.monotonic() >= deadline
        if current is not None and not late:
            operator, task, name = current.split("/", 2)
            slow = time.monotonic() - since >= each
            reason = f"it took longer than {each:g} s" if slow else f"its process ended with {code}"
            entries[current] = {
                "status": "skipped", "reason": reason,
                "operator": operator, "task": task, "name": name, "shape": "", "target": None,
            }  # fmt: skip
        if late:
            results["stopped"] = "the time was spent before everything was measured"
        elif code != 0 and current is None:
            results["stopped"] = f"the measuring process ended with {code} before it began"
        if late or code == 0 or current is None:
            break
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder that results.json is written into")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="shapes of a dry run")
    parser.add_argument("--seconds", type=float, default=math.inf, help="time for everything")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        done = set(json.loads(sys.stdin.readline()))
        work(options.device, options.tiny, done, lambda x: print("@@" + json.dumps(x), flush=True))
    else:
        results = supervise(options.out, options.device, options.tiny, options.seconds)
        sys.exit("stopped" in results)


if __name__ == "__main__":
    main()

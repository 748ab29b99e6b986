"""What a figure was measured on and with."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

#: The folder that holds this package.
ROOT = Path(__file__).parent.parent
#: Of which `describe` records the version: the peers' among them.
PACKAGES = ("rlkern", "torch", "triton", "transformers", "trl", "liger-kernel", "verl", "openrlhf",
            "scipy")  # fmt: skip
_SYSTEM, _PROC = Path("/sys"), Path("/proc")


def _cpu(field: str) -> str:
    """A field of /proc/cpuinfo, empty where there is none."""
    try:
        lines = (_PROC / "cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":")[1].strip() for line in lines if line.startswith(field)), "")


def _text(file: Path) -> str:
    """What a file says, empty where it cannot be read."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _output(*command: str) -> str:
    """What a command prints, empty where it cannot be run."""
    try:
        done = subprocess.run(
            command, cwd=tempfile.gettempdir(), capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _generation() -> str:
    """AMD's generation by its family number; cloud machines' model names leave it out."""
    family = _cpu("cpu family")
    if "AMD" not in _cpu("model name"):
        return ""
    if family == "25":
        return "zen4" if "avx512f" in _cpu("flags").split() else "zen3"
    return {"23": "zen2", "26": "zen5"}.get(family, "")


def name() -> str:
    """What this machine's folder of results is called, "amd-epyc-zen5-2-cores" for example."""
    model = re.sub(r"\(\w+\)|@.*| CPU| Processor", "", _cpu("model name") or platform.machine())
    words = [*re.findall(r"[a-z0-9]+", model.lower()), _generation(), f"{os.cpu_count()}-cores"]
    return "-".join(filter(None, words))


def cache_bytes() -> dict[str, int]:
    """Sizes of the data caches that the first core reads through, by "L1", "L2", "L3"."""
    sizes: dict[str, int] = {}
    for cache in sorted((_SYSTEM / "devices/system/cpu/cpu0/cache").glob("index*")):
        level, size, kind = (_text(cache / file) for file in ("level", "size", "type"))
        if kind != "Instruction" and size.endswith("K"):
            sizes[f"L{level}"] = int(size[:-1]) * 1024
    return sizes


def megahertz() -> float | None:
    """The first core's nominal clock, or None where the system does not say it.

    /proc/cpuinfo has the clock of the moment, which is the nominal one only where a hypervisor
    shows its guests a constant.
    """
    for file in ("base_frequency", "cpuinfo_max_freq"):
        if kilohertz := _text(_SYSTEM / "devices/system/cpu/cpu0/cpufreq" / file):
            return float(kilohertz) / 1e3
    if "hypervisor" in _cpu("flags").split() and (now := _cpu("cpu MHz")):
        return float(now)
    return None


def huge_pages() -> str:
    """When the system gives transparent huge pages: "always", "madvise" or "never"."""
    modes = _text(_SYSTEM / "kernel/mm/transparent_hugepage/enabled")
    chosen = re.search(r"\[(\w+)\]", modes)
    return chosen.group(1) if chosen else "unknown"


def allocator() -> str:
    """Whose malloc serves this process and its children: one preloaded, or the C library's."""
    preloaded = re.search(r"lib(jemalloc|tcmalloc|mimalloc)", _text(_PROC / "self/maps"))
    return preloaded.group(1) if preloaded else " ".join(platform.libc_ver()).strip() or "unknown"


def _processor_times() -> tuple[int, int]:
    """Ticks that all processors together were idle for, and ticks in all; zeros if unknown."""
    line = next(iter(_text(_PROC / "stat").splitlines()), "")
    if not line.startswith("cpu "):
        return 0, 0
    # Guests' time, from the ninth on, is in the user's already.
    ticks = [int(field) for field in line.split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def busy_share(seconds: float) -> float | None:
    """The share of all processors' time that was not idle while this process slept so long.

    None where the system does not say. Unlike the load average, which for a minute holds what the
    benchmarks did themselves, it is 0 on a machine that is left alone.
    """
    idle, every = _processor_times()
    time.sleep(seconds)
    idle_after, every_after = _processor_times()
    if every_after <= every:
        return None
    return 1 - (idle_after - idle) / (every_after - every)


def describe() -> dict[str, Any]:
    """Machine, versions, date and commit; no path and no host's name."""
    # Asked of a child, so that rlkern can be absent and its peers still be measured.
    rlkern = json.loads(_output(sys.executable, "-m", "rlkern.info", "--json") or "{}")
    git = ("git", "-C", str(ROOT))
    # What this run and others before it measured is no change of what is measured.
    kept = ":!benchmarks/results"
    changed = _output(*git, "status", "--porcelain", "--untracked-files=no", "--", ".", kept)
    commit = _output(*git, "rev-parse", "--short=12", "HEAD")
    return {
        "name": name(),
        "cpu": _cpu("model name") or platform.machine(),
        "megahertz": megahertz(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "instruction_set": rlkern.get("cpu_instruction_set", "unknown"),
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "caches": cache_bytes(),
        "huge_pages": huge_pages(),
        "allocator": allocator(),
        "compiler": rlkern.get("build", {}).get("compiler", "unknown"),
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in PACKAGES},
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        "commit": (commit or "unknown") + (" with uncommitted changes" if changed else ""),
    }

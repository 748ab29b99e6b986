"""What a figure was measured on and with."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

#: The folder that holds this package.
ROOT = Path(__file__).parent.parent


def _cpu(field: str) -> str:
    """A field of /proc/cpuinfo, empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":")[1].strip() for line in lines if line.startswith(field)), "")


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
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, size = ((cache / file).read_text().strip() for file in ("level", "size"))
            kind = (cache / "type").read_text().strip()
        except OSError:
            continue
        if kind != "Instruction" and size.endswith("K"):
            sizes[f"L{level}"] = int(size[:-1]) * 1024
    return sizes


def describe() -> dict[str, Any]:
    """Machine, versions, date and commit; no path and no host's name."""
    # Asked of a child, so that rlkern can be absent and its peers still be measured.
    rlkern = json.loads(_output(sys.executable, "-m", "rlkern.info", "--json") or "{}")
    git = ("git", "-C", str(ROOT))
    changed = _output(*git, "status", "--porcelain", "--untracked-files=no")
    commit = _output(*git, "rev-parse", "--short=12", "HEAD")
    packages = ("rlkern", "torch", "triton", "transformers", "trl", "liger-kernel", "verl")
    packages += ("openrlhf", "scipy")
    return {
        "name": name(),
        "cpu": _cpu("model name") or platform.machine(),
        "megahertz": float(_cpu("cpu MHz") or 0),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "instruction_set": rlkern.get("cpu_instruction_set", "unknown"),
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "caches": cache_bytes(),
        "compiler": rlkern.get("build", {}).get("compiler", "unknown"),
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in packages},
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        "commit": (commit or "unknown") + (" with uncommitted changes" if changed else ""),
    }

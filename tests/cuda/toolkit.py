"""Finds the CUDA compiler and its tools, and compiles csrc/cuda without a GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from emulated_kernels import ROOT, build_once, digest, kernel_sources

ARCHS = {"sm_80": "compute_80", "sm_90a": "compute_90a", "sm_100f": "compute_100f"}


def tool(name: str) -> str | None:
    """A tool of the toolkit: in CUDA_HOME, on PATH, or (cuobjdump, nvdisasm) in Triton's wheel."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    spec = importlib.util.find_spec("triton")
    places = [Path(home) / "bin" / name]
    if found := shutil.which(name):
        places.append(Path(found))
    if spec and spec.origin:
        places.append(Path(spec.origin).parent / "backends/nvidia/bin" / name)
    return next((str(p) for p in places if p.exists()), None)


def why_not(*names: str) -> str:
    missing = [name for name in names if tool(name) is None]
    return f"{', '.join(missing)} not found: no CUDA toolkit here" if missing else ""


@dataclass(frozen=True)
class Kernel:
    arch: str
    name: str
    registers: int
    stack: int
    shared: int
    local: int
    spilled: int


def torch_include() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "include"


def compiled(source: Path) -> Path:
    """One .cu for every architecture, as a fatbin; the compiler's report lies beside it."""
    nvcc = tool("nvcc")
    assert nvcc is not None
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-lineinfo", "-Xptxas", "-v"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA", "--threads", "2"]
    for sm, compute in ARCHS.items():
        flags += ["-gencode", f"arch={compute},code={sm}"]
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    name = digest(kernel_sources(), version, sysconfig.get_platform(), *flags)
    target = ROOT / "build" / "gates" / name / f"{source.stem}.fatbin"
    include = ["-isystem", str(torch_include()), f"-I{ROOT / 'csrc'}"]
    return build_once(target, [nvcc, "-fatbin", *flags, *include, str(source)])


def kernels(source: Path) -> list[Kernel]:
    """What ptxas and the machine code say of every kernel of one source."""
    fatbin = compiled(source)
    report = fatbin.with_suffix(".log").read_text()
    spilled = {}
    pattern = r"entry function '(\S+)' for '(\w+)'\s.*?(\d+) bytes spill stores, (\d+) bytes spill"
    for name, arch, stores, loads in re.findall(pattern, report, re.DOTALL):
        spilled[arch, name] = int(stores) + int(loads)
    cuobjdump = tool("cuobjdump")
    assert cuobjdump is not None
    usage = subprocess.run(
        [cuobjdump, "--dump-resource-usage", str(fatbin)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found, arch = [], ""
    for line in usage.splitlines():
        if match := re.match(r"arch = (\w+)", line.strip()):
            arch = match.group(1)
        elif match := re.match(r"Function (\S+):", line.strip()):
            name = match.group(1)
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            key = next(a for a in ARCHS if a == arch or a.rstrip("af") == arch)
            numbers = map(int, match.groups())
            found.append(Kernel(key, name, *numbers, spilled[key, name]))
    return found

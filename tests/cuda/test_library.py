"""The built _C_cuda: what it asks of the machine that loads it, and that it registers there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest
import toolkit
from emulated_kernels import ROOT, build_once, digest

from rlkern import _native, _schema

LIBRARY = ROOT / "rlkern" / _native.FILES["cuda"]
STUB = ROOT / "csrc/cuda/torch_cuda_stub.cpp"
OPERATORS = list(_schema.SCHEMAS)

pytestmark = pytest.mark.skipif(
    not LIBRARY.exists(),
    reason="rlkern/_C_cuda.abi3.so is not built here (it needs nvcc)",
)


def output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} was not found")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_symbols_are_those_of_the_stable_abi():
    undefined = output("nm", "-D", "--undefined-only", "-C", str(LIBRARY))
    assert not re.search(r"\b(at|c10|torch)::", undefined)
    torch_symbols = set(re.findall(r"\b((?:aoti_)?torch_\w+)", undefined))
    assert "aoti_torch_get_current_cuda_stream" in torch_symbols


def test_it_holds_machine_code_for_each_architecture_and_portable_ptx():
    if reason := toolkit.why_not("cuobjdump"):
        pytest.skip(reason)
    asked = _native.build_info()["cuda_architectures"]
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        assert asked == ["8.0", "9.0a", "10.0f", "8.0+PTX"]
    for option, kind in (("--list-elf", "cubin"), ("--list-ptx", "ptx")):
        listed = output(toolkit.tool("cuobjdump"), option, str(LIBRARY))
        # A family's code is listed without its letter.
        found = {arch.removesuffix("f") for arch in re.findall(rf"\.sm_(\w+)\.{kind}", listed)}
        wanted = {a.removesuffix("+PTX") for a in asked if a.endswith("+PTX") == (kind == "ptx")}
        assert found == {a.replace(".", "").removesuffix("f") for a in wanted}, listed


def test_it_loads_torch_and_the_system_only():
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", output("readelf", "-d", str(LIBRARY))))
    system = {"libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6"}
    system |= {"libpthread.so.0", "libdl.so.2", "librt.so.1", "ld-linux-x86-64.so.2"}
    # libtorch_cuda by name: torch loads it for itself alone, so nothing else finds it.
    assert needed - system == {"libtorch_cpu.so", "libtorch_cuda.so"}


def test_it_registers_on_a_torch_without_cuda(tmp_path):
    """Its symbols are all found by name, in libtorch_cpu and in a stand-in for libtorch_cuda."""
    if shutil.which("g++") is None:
        pytest.skip("g++ was not found, which builds the stand-in for libtorch_cuda")
    name = digest([STUB], "stub")
    soname = "-Wl,-soname,libtorch_cuda.so"
    stub = build_once(
        ROOT / "build/stub" / name / "libtorch_cuda.so",
        ["g++", "-shared", "-fPIC", soname, str(STUB)],
    )
    code = f"""
import ctypes, torch
if torch.version.cuda is None:
    ctypes.CDLL({str(stub)!r})
import rlkern
if torch.version.cuda is None:
    torch.ops.load_library({str(LIBRARY)!r})
for op in {OPERATORS!r}:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("rlkern::" + op, "CUDA"), op
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr

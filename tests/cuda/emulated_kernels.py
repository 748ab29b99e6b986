"""Builds the kernels of csrc/cuda for the CPU (shim.h) and calls them on torch tensors.

RLKERN_EMULATE_SANITIZE=address|thread builds them under that sanitizer; sanitize.sh sets it and
preloads the sanitizer's library.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
SANITIZER = os.environ.get("RLKERN_EMULATE_SANITIZE", "")


def why_not() -> str:
    """Why the module cannot be built here; an empty text where it can."""
    if shutil.which("g++") is None:
        return "g++ was not found, which runs the CUDA kernels on the CPU"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed, which shows the emulated kernels to pytest"
    return ""


def digest(paths: list[Path], *words: str) -> str:
    """Names a build by all that went into it."""
    state = hashlib.sha256("\0".join(words).encode())
    for path in sorted(paths):
        state.update(path.read_bytes())
    return state.hexdigest()[:16]


def kernel_sources() -> list[Path]:
    return [p for kind in ("cuda", "common") for p in (ROOT / "csrc" / kind).glob("*.*")]


def build_once(target: Path, command: list[str]) -> Path:
    """Runs a command that makes `target`, unless it is there: one process builds, others wait."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            # A preloaded sanitizer is meant for the tests, not for the compiler.
            env = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
            fresh = target.with_name(f".{target.name}")
            done = subprocess.run(
                [*command, "-o", str(fresh)], capture_output=True, text=True, env=env
            )
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
            target.with_suffix(".log").write_text(done.stdout + done.stderr)
            os.replace(fresh, target)
    return target


def build(module_name: str = "_emulated", source: str = "emulated.cpp") -> ModuleType:
    """One of the modules beside this file."""
    import pybind11

    flags = ["-O1", "-g1", "-std=c++20", "-ffp-contract=off", "-fvisibility=hidden", "-pthread"]
    flags += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"]
    if SANITIZER:
        flags += [f"-fsanitize={SANITIZER}", "-fno-omit-frame-pointer"]
    if SANITIZER == "address":
        flags += ["-fsanitize=undefined", "-fno-sanitize-recover=undefined"]
    includes = [f"-I{ROOT / 'csrc'}", f"-I{HERE}", f"-I{pybind11.get_include()}"]
    includes.append(f"-I{sysconfig.get_path('include')}")
    sources = kernel_sources() + sorted(HERE.glob("*.h")) + [HERE / source]
    name = digest(sources, sys.version, pybind11.__version__, *flags)
    target = ROOT / "build" / "emulated" / name / f"{module_name}.so"
    command = ["g++", "-shared", "-fPIC", *flags, *includes, str(HERE / source)]
    spec = importlib.util.spec_from_file_location(module_name, build_once(target, command))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def span(tensor: torch.Tensor | None) -> tuple[int, int, int]:
    """Address, outer and inner stride of one value per token, or of rows."""
    if tensor is None:
        return 0, 0, 0
    strides = tensor.stride()
    if len(strides) < 2:
        return tensor.data_ptr(), 0, *(strides or (0,))
    return tensor.data_ptr(), *strides


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


def logit_rows(
    module: ModuleType, logits, ids, mask, token_temperature, temperature, softcap, max_blocks
):
    """The module's Logits."""
    tokens = logits.shape[:-1]
    assert len(tokens) <= 2 and logits.stride(-1) == 1 or logits.shape[-1] == 1
    assert ids.dtype == torch.int64 and (mask is None or mask.dtype == torch.bool)
    outer = tokens[0] if len(tokens) == 2 else 1
    inner = tokens[-1] if tokens else 1
    rows = logits[..., 0]
    return module.Logits(
        DTYPES[logits.dtype], span(rows), outer, inner, logits.shape[-1], span(ids),
        span(mask), span(token_temperature), temperature, softcap or 0.0, max_blocks,
    )  # fmt: skip


class Emulated:
    """The operators' arguments and results, on CPU tensors."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def _logits(self, *args):
        return logit_rows(self.module, *args)

    def forward(
        self, logits, ids, mask=None, token_temperature=None, temperature=1.0, softcap=None,
        return_entropy=True, max_blocks=2**31 - 1,
    ):  # fmt: skip
        tokens = logits.shape[:-1]
        lanes = 16 // logits.element_size()
        slices = self.module.plan(logits.shape[-1], lanes)[0]
        logprobs = poisoned(*tokens)
        entropy = poisoned(*(tokens if return_entropy else (0,)))
        state = poisoned(*tokens, 2)
        # A part that nobody wrote would show as NaN.
        parts = poisoned(logprobs.numel() * slices, 3)
        self.module.forward(
            self._logits(logits, ids, mask, token_temperature, temperature, softcap, max_blocks),
            logprobs.data_ptr(),
            entropy.data_ptr() if return_entropy and logprobs.numel() else 0,
            state.data_ptr(),
            parts.data_ptr(),
        )
        return logprobs, entropy, state

    def backward(
        self, g, h, logits, ids, mask, token_temperature, temperature, softcap, logprobs, entropy,
        state, out=None, max_blocks=2**31 - 1,
    ):  # fmt: skip
        """`out` may be the logits themselves."""
        if out is None:
            out = poisoned(*logits.shape, dtype=logits.dtype)
        self.module.backward(
            self._logits(logits, ids, mask, token_temperature, temperature, softcap, max_blocks),
            span(g),
            span(h),
            span(logprobs),
            span(entropy if h is not None else None),
            state.data_ptr(),
            span(out[..., 0]),
        )
        return out

"""Which backend serves a call.

Automatic: native where it is built, Triton where not (on a GPU), eager PyTorch where neither is.
``RLKERN_BACKEND`` and :func:`use_backend` choose; a choice that cannot be served raises.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from contextlib import ContextDecorator

import torch

from rlkern import _native
from rlkern._schema import operator_name

BACKENDS = ("native", "triton", "eager")
# The kernels compute in fp32; float64 is the reference's.
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_HAS_TRITON = importlib.util.find_spec("triton") is not None
# The use_backend blocks open in any thread, in the order of entry, and the last one's name.
_blocks: list[use_backend] = []
_chosen: str | None = None
_lock = threading.Lock()
# Filled once: looking either up at every call would cost more than a small kernel does, and asking
# the dispatcher is not something torch.compile can trace.
_native_kernels: dict[tuple[str, str], bool] = {}  # (operator, device type) -> is implemented
_triton_kernels: dict[str, bool] = {}  # operator -> is written


def register(op: str) -> None:
    """Notes where the loaded libraries implement an operator, and whether a Triton kernel does."""
    _triton_kernels[op] = importlib.util.find_spec(f"rlkern.triton.{op}") is not None
    for device, key in (("cpu", "CPU"), ("cuda", "CUDA")):
        name = f"rlkern::{operator_name(op, 'native')}"
        has = torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
        _native_kernels[op, device] = bool(has)


def _validated(name: str, source: str) -> str | None:
    if name == "auto":
        return None
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected auto, {', '.join(BACKENDS)}, got {name!r}")
    return name


class use_backend(ContextDecorator):  # noqa: N801 - called like a function
    """Serves the calls inside the ``with`` block by one backend, in the whole process.

    The choice is made when an operator is called; its backward runs on the backend that the
    forward saved, on whichever thread autograd runs it. A compiled function keeps the backend it
    was traced with, and is traced again under another.

    Threads share the choice: of the blocks open in any thread the one entered last holds, for
    all of them, and each block takes away its own choice alone, in whatever order they end.
    (A choice per thread would not reach autograd's threads, where activation checkpointing calls
    the forward again on a GPU; nor can torch.compile trace a context variable.)

    Args:
        name: "native" (C++ and CUDA), "triton", "eager" (PyTorch), or "auto".

    Raises:
        ValueError: an unknown name. A backend that cannot serve a call raises RuntimeError there.
    """

    def __init__(self, name: str) -> None:
        self._name = _validated(name, "use_backend(name)") or "auto"

    def __enter__(self) -> None:
        # torch.compile can trace a block, but no lock, and traces in one thread at a time.
        if torch.compiler.is_compiling():
            self._settle(True)
        else:
            with _lock:
                self._settle(True)

    def __exit__(self, *error: object) -> None:
        if torch.compiler.is_compiling():
            self._settle(False)
        else:
            with _lock:
                self._settle(False)

    def _settle(self, entered: bool) -> None:
        global _chosen
        if entered:
            _blocks.append(self)
        else:
            _blocks.remove(self)
        _chosen = _blocks[-1]._name if _blocks else None

    def _recreate_cm(self) -> use_backend:
        """For a decorated function: each call is a block of its own."""
        return type(self)(self._name)


_environment = _validated(os.environ.get("RLKERN_BACKEND") or "auto", "RLKERN_BACKEND")


def why_not(op: str, backend: str, device: str, dtype: torch.dtype) -> str:
    """Why a backend cannot serve a call; an empty text where it can."""
    if backend == "eager":
        return ""
    if dtype not in KERNEL_DTYPES:
        return f"its kernels take float32, bfloat16 and float16, not {dtype}"
    if backend == "native":
        if _native_kernels.get((op, device)):
            return ""
        if device in _native.problems:
            return f"{_native.FILES[device]}: {_native.problems[device] or 'lacks this operator'}"
        return f"there are no native kernels for {device}"
    if not _HAS_TRITON:
        return "triton is not installed"
    if not _triton_kernels.get(op):
        return "no Triton kernel is written for it"
    if device == "cuda" or (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return ""
    return "Triton runs on a GPU (on the CPU only with TRITON_INTERPRET=1)"


def choose(op: str, device: str, dtype: torch.dtype) -> str:
    """The backend for a call, by the rules above.

    Raises:
        RuntimeError: the backend that was asked for cannot serve the call.
    """
    wanted = _environment if _chosen is None else _chosen
    # What the rules come to for most calls.
    if wanted in (None, "auto", "native") and _native_kernels.get((op, device)):
        if dtype in KERNEL_DTYPES:
            return "native"
    if wanted is None or wanted == "auto":
        for backend in BACKENDS:
            # The interpreter is for tests: nobody is sent there unasked.
            if backend == "triton" and device == "cpu":
                continue
            if not why_not(op, backend, device, dtype):
                return backend
    reason = why_not(op, wanted or "eager", device, dtype)
    if reason:
        raise RuntimeError(
            f"backend {wanted!r} was asked for, but cannot serve {op} for {dtype} on {device}: "
            f"{reason}"
        )
    return wanted or "eager"

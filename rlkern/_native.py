"""Loads the compiled libraries, and remembers why one did not load."""

from __future__ import annotations

import ctypes
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parent
FILES = {"cpu": "_C.abi3.so", "cuda": "_C_cuda.abi3.so"}

# Device type -> why its library is not loaded; an empty text where it is.
problems: dict[str, str] = {}
_handles: dict[str, ctypes.CDLL] = {}


def build_info() -> dict[str, Any]:
    """What the build wrote down: compilers, architectures, what was left out and why."""
    path = FOLDER / "_build_info.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def strict() -> bool:
    return os.environ.get("RLKERN_STRICT", "0").lower() not in ("", "0", "false", "no", "off")


def load() -> None:
    """Loads what was built. Without the CPU library: one warning, or with RLKERN_STRICT=1 an
    ImportError."""
    info = build_info()
    for device, name in FILES.items():
        path = FOLDER / name
        if device == "cuda" and torch.version.cuda is None:
            problems[device] = "this torch is built without CUDA"
        elif not path.exists():
            why = str(info.get(device, "not built"))
            problems[device] = "built, but the file is gone" if why == "built" else why
        else:
            try:
                torch.ops.load_library(str(path))
                _handles[device] = ctypes.CDLL(str(path))
                problems[device] = ""
            except OSError as error:
                problems[device] = f"failed to load: {error}"
    if problems["cpu"]:
        message = (
            f"rlkern: no compiled CPU kernels ({problems['cpu']}); "
            "operators on the CPU run in eager PyTorch, slower. "
            "`python -m rlkern.info` says what is there."
        )
        if strict():
            raise ImportError(message + " RLKERN_STRICT=1 makes this an error.")
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def cpu_isa() -> str:
    """The instruction set that CPU kernels run in now (RLKERN_CPU_ISA overrides), or "none"."""
    handle = _handles.get("cpu")
    if handle is None:
        return "none"
    handle.rlkern_cpu_isa.restype = ctypes.c_char_p
    return handle.rlkern_cpu_isa().decode()


def cpu_isas() -> list[str]:
    """The instruction sets built that this machine can run, best first."""
    handle = _handles.get("cpu")
    if handle is None:
        return []
    handle.rlkern_cpu_supports.argtypes = [ctypes.c_char_p]
    names = ("avx512", "avx2", "portable")
    return [name for name in names if handle.rlkern_cpu_supports(name.encode())]

"""Loads the compiled libraries, and remembers why one did not load."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import torch

from rlkern._env import flag

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


def load() -> None:
    """Loads what was built. What is missing is one warning for each device, and with
    RLKERN_STRICT=1 an ImportError.

    The CUDA library counts as missing under a torch with CUDA: where it does not load, where there
    is a GPU that it would serve, and under RLKERN_STRICT=1 without a GPU too.
    """
    strict = flag("RLKERN_STRICT")
    flag("RLKERN_DEBUG")  # said now rather than at the first call that looks at it
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
    messages = []
    if problems["cpu"]:
        messages.append(
            f"rlkern: no compiled CPU kernels ({problems['cpu']}); "
            "operators on the CPU run in eager PyTorch, slower. "
            "`python -m rlkern.info` says what is there."
        )
    if problems["cuda"] and torch.version.cuda is not None:
        # Asked of the driver's management library where it is there: a CUDA context made by an
        # import would break processes that fork afterwards.
        if strict or (FOLDER / FILES["cuda"]).exists() or torch.cuda.device_count() > 0:
            triton = importlib.util.find_spec("triton") is not None
            instead = "Triton" if triton else "eager PyTorch (triton is not installed either)"
            messages.append(
                f"rlkern: no compiled CUDA kernels ({problems['cuda']}); "
                f"operators on a GPU run in {instead}, slower. "
                "`python -m rlkern.info` says what is there."
            )
    if messages and strict:
        raise ImportError(" ".join(messages) + " RLKERN_STRICT=1 makes this an error.")
    for message in messages:
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

"""``python -m rlkern.info [--json]``: what was built, what loaded, what serves each operator."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from typing import Any

import torch

import rlkern
from rlkern import _backend, _native
from rlkern._schema import SCHEMAS

# Backward operators are served by the backend of their forward.
# Those of _PARTS, of the operators on logits and hidden states, by the backend of their whole.
_PARTS = ("policy_rows", "token_logprobs_outputs", "add_widened_")
_OPERATORS = [
    name for name in SCHEMAS if not name.rstrip("_").endswith("_bwd") and name not in _PARTS
]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _served(op: str, device: str) -> dict[str, Any]:
    """The backend that a bfloat16 call gets on a device, and why not the others."""
    reasons = {b: _backend.why_not(op, b, device, torch.bfloat16) for b in _backend.BACKENDS}
    try:
        serves = _backend.choose(op, device, torch.bfloat16)
    except RuntimeError as error:
        serves = f"error: {error}"
    return {"serves": serves, "not": {b: why for b, why in reasons.items() if why}}


def collect() -> dict[str, Any]:
    """Everything that a bug report needs, as one dictionary."""
    build = _native.build_info()
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return {
        "versions": {
            "rlkern": rlkern.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "transformers": _version("transformers"),
        },
        "machine": {
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        },
        "build": build,
        "libraries": {
            _native.FILES[device]: why or "loaded" for device, why in _native.problems.items()
        },
        "cpu_instruction_set": _native.cpu_isa(),
        "cpu_instruction_sets_here": _native.cpu_isas(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("RLKERN_")},
        "operators": {op: {d: _served(op, d) for d in devices} for op in _OPERATORS},
    }


def as_text(info: dict[str, Any]) -> str:
    lines = []
    for section, content in info.items():
        if section == "operators":
            continue
        if isinstance(content, dict):
            lines.append(section)
            lines += [f"  {key}: {_plain(value)}" for key, value in content.items()]
        else:
            lines.append(f"{section}: {_plain(content)}")
    lines.append("operators")
    for op, devices in info["operators"].items():
        for device, entry in devices.items():
            lines.append(f"  {op} on {device}: {entry['serves']}")
            lines += [f"    not {name}: {why}" for name, why in entry["not"].items()]
    return "\n".join(lines)


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rlkern.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    info = collect()
    print(json.dumps(info, indent=1) if parser.parse_args().json else as_text(info))


if __name__ == "__main__":
    main()

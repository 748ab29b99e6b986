"""Functions of other projects, from their installed packages and called as they document.

verl and OpenRLHF start a trainer's worth of imports in their packages' `__init__` (Ray, DeepSpeed,
flash-attn), none of which the functions measured here use. So the one module is imported that
defines a function, unchanged, and the packages above it are entered without their `__init__`.
`pip install --no-deps --no-build-isolation -r benchmarks/peers.txt` installs what that needs.

Whatever is missing raises, and becomes the reason for which the peer is skipped.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _enter(package: str, above: types.ModuleType | None) -> types.ModuleType:
    """Puts a package into sys.modules that finds its modules but has run none of its code."""
    if package in sys.modules:
        return sys.modules[package]
    if above is None:
        found = importlib.util.find_spec(package)
        if found is None or found.submodule_search_locations is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        places = list(found.submodule_search_locations)
    else:
        last = package.rpartition(".")[2]
        places = [str(Path(place) / last) for place in above.__path__]
    module = types.ModuleType(package)
    module.__path__ = places
    sys.modules[package] = module
    return module


def member(module: str, name: str) -> Any:
    """`name` of `module`, without the `__init__` of the packages above it.

    Only for a process of its own, as every case has: the outermost package stays entered.
    """
    parts = module.split(".")
    packages = [".".join(parts[:depth]) for depth in range(1, len(parts))]
    before, above = set(sys.modules), None
    for package in packages:
        above = _enter(package, above)
    try:
        return getattr(importlib.import_module(module), name)
    finally:
        # Another module of the project may need what the entered packages' own code defines.
        for imported in set(sys.modules) - before:
            if imported.startswith(parts[0] + "."):
                del sys.modules[imported]


def gpu_only(what: str) -> Callable[[], Any]:
    """The builder of a peer without CPU code: a CPU's table says why it is not there."""

    def build() -> Any:
        raise NotImplementedError(f"{what} runs on a GPU only; benchmarks/gpu measures it there")

    return build

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# The helpers beside this file and above it, and the benchmarks, whatever pytest was started with.
sys.path[:0] = [str(folder) for folder in Path(__file__).parents[:3]]

import emulated_kernels  # noqa: E402
import emulated_policy_rows  # noqa: E402


@pytest.fixture(scope="session")
def emulated() -> emulated_kernels.Emulated:
    """The CUDA kernels, run on the CPU."""
    if reason := emulated_kernels.why_not():
        pytest.skip(reason)
    return emulated_kernels.Emulated(emulated_kernels.build())


@pytest.fixture(scope="session")
def built():
    """The CUDA kernels of policy_rows, run on the CPU: the module itself."""
    if reason := emulated_kernels.why_not():
        pytest.skip(reason)
    return emulated_policy_rows.module()

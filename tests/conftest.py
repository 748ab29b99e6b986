"""Fixtures that every test shares."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """Fills memory that tensors of this process will get again with NaN.

    An output that a kernel forgets to write then shows, instead of holding an old right answer.
    """

    def poison(*sizes_in_bytes: int) -> None:
        blocks = [torch.full((max(n // 4, 1),), float("nan")) for n in sizes_in_bytes * 4]
        del blocks

    return poison


@pytest.fixture(scope="session")
def common():
    """csrc/common as a Python module, built once with pybind11."""
    folder = ROOT / "build" / "test_module"
    pybind11 = pytest.importorskip("pybind11")
    configure = [
        "cmake", "-G", "Ninja", "-S", ROOT, "-B", folder, "-DRLKERN_TEST_MODULE=ON",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}",
        "-DCMAKE_BUILD_TYPE=Release",
    ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    # Parallel test workers share the folder: one builds, the others find it built.
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, ["cmake", "--build", folder]):
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    (library,) = folder.glob("_test_common*.so")
    spec = importlib.util.spec_from_file_location("_test_common", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def clean_environment(**changes: str | None) -> dict[str, str]:
    """This environment without rlkern's variables, for child processes."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("RLKERN_")}
    env.update({k: v for k, v in changes.items() if v is not None})
    for key in [k for k, v in changes.items() if v is None]:
        env.pop(key, None)
    return env

"""Runs the numerical tests of this folder in Triton's interpreter, where there may be no GPU.

Triton looks at TRITON_INTERPRET when its own library and our kernels are first imported. So the
tests run in a process of their own, and those of this process are left alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).parent
FILES = sorted(
    path.name
    for path in FOLDER.glob("test_*.py")
    if path.name not in ("test_interpreted.py", "test_compiled.py", "test_import.py")
)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="they run in this process")
@pytest.mark.parametrize("file", FILES)
def test_in_the_interpreter(file):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RLKERN_", "PYTEST_"))}
    # One thread: NumPy's and torch's pools would only fight over arrays this small.
    env.update(TRITON_INTERPRET="1", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    command = [
        sys.executable, "-m", "pytest", FOLDER / file, "-q", "--tb=short", "-p", "no:cacheprovider",
        "--rootdir", FOLDER.parents[1],
    ]  # fmt: skip
    done = subprocess.run(
        list(map(str, command)), env=env, cwd=FOLDER.parents[1], capture_output=True, text=True
    )
    output = done.stdout + done.stderr
    if "only 0-dimensional arrays can be converted" in output:
        pytest.skip("the interpreter of this Triton fails under this NumPy (3.6 needs NumPy < 2.4)")
    assert done.returncode == 0 and " passed" in output, output[-8000:]

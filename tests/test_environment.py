"""The switches: RLKERN_DEBUG, RLKERN_STRICT and those of the build."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlkern._env import flag
from rlkern.ops import _checks

ROOT = Path(__file__).resolve().parents[1]


def clean_environment(**changes):
    return {k: v for k, v in os.environ.items() if not k.startswith("RLKERN_")} | changes


@pytest.mark.parametrize("value", ["1", "true", "Yes", "ON"])
def test_yes(monkeypatch, value):
    monkeypatch.setenv("RLKERN_DEBUG", value)
    assert flag("RLKERN_DEBUG")
    on_a_gpu = torch.empty(1, device="meta")
    monkeypatch.setattr(torch.Tensor, "is_meta", False)
    assert _checks.values_are_checked(on_a_gpu)


@pytest.mark.parametrize("value", ["0", "false", "No", "off", "", None])
def test_no(monkeypatch, value):
    monkeypatch.delenv("RLKERN_STRICT", raising=False)
    if value is not None:
        monkeypatch.setenv("RLKERN_STRICT", value)
    assert not flag("RLKERN_STRICT")


@pytest.mark.parametrize("name", ["RLKERN_DEBUG", "RLKERN_STRICT"])
def test_anything_else_is_refused_at_import(name):
    done = subprocess.run(
        [sys.executable, "-c", "import rlkern"],
        capture_output=True, text=True, cwd=ROOT, env=clean_environment(**{name: "ture"}),
    )  # fmt: skip
    assert done.returncode != 0 and f"ValueError: {name}: expected 1, true" in done.stderr
    assert "got 'ture'" in done.stderr


def test_the_build_reads_switches_alike(tmp_path):
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path)],
        capture_output=True, text=True, cwd=ROOT, env=clean_environment(RLKERN_SKIP_EXT="maybe"),
    )  # fmt: skip
    assert done.returncode != 0 and "RLKERN_SKIP_EXT: expected 1, true" in done.stderr

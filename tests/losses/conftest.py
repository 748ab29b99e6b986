"""The backends that the losses' tests run on, each with the dtype that it computes in."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import rlkern
from rlkern import _backend, _native

sys.path.insert(0, str(Path(__file__).parent))

#: Triton serves the CPU where TRITON_INTERPRET=1 was set before it was imported.
BACKENDS = (
    "eager-float64",
    "eager",
    "native-avx512",
    "native-avx2",
    "native-portable",
    "triton",
)


class Served(NamedTuple):
    name: str
    dtype: torch.dtype

    @property
    def is_kernel(self) -> bool:
        return self.name != "eager"


def served(op, request, monkeypatch):
    """Serves the test by one backend, native ones by one build of their kernels."""
    name, _, detail = request.param.partition("-")
    dtype = torch.float64 if detail == "float64" else torch.float32
    reason = _backend.why_not(op, name, "cpu", dtype)
    if reason:
        pytest.skip(reason)
    if name == "native":
        if detail not in _native.cpu_isas():
            pytest.skip(f"this machine cannot run {detail}")
        monkeypatch.setenv("RLKERN_CPU_ISA", detail)
    with rlkern.use_backend(name):
        yield Served(name, dtype)


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    yield from served("policy_loss", request, monkeypatch)


@pytest.fixture(params=BACKENDS)
def value_backend(request, monkeypatch):
    """The dtype that the backend computes in."""
    for backend in served("value_loss", request, monkeypatch):
        yield backend.dtype

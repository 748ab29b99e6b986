"""The backends that an operator's tests run on, each with the dtype that it computes in."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

import rlkern
from rlkern import _backend, _native

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
    if name == "triton" and op == "return_scan":
        # Triton's interpreter takes 0.1 ms for each lane that is scanned.
        for block in ("_BLOCK", "_STATES_BLOCK"):
            monkeypatch.setattr(f"rlkern.triton.return_scan.{block}", 16)
    with rlkern.use_backend(name):
        yield Served(name, dtype)

"""The backends that an operator's tests run on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# The helpers above this file.
sys.path.insert(0, str(Path(__file__).parents[1]))

import rlkern  # noqa: E402
from rlkern import _native  # noqa: E402

# The helpers beside this file and above it.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from serving import BACKENDS, served  # noqa: E402

CPU_BACKENDS = ("eager", "native-avx512", "native-avx2", "native-portable")


@pytest.fixture(params=CPU_BACKENDS)
def backend(request, monkeypatch):
    """Serves the test by one backend, native ones by one build of their kernels."""
    name, _, isa = request.param.partition("-")
    if isa:
        if _native.problems["cpu"]:
            pytest.skip(f"no compiled CPU library: {_native.problems['cpu']}")
        if isa not in _native.cpu_isas():
            pytest.skip(f"this machine cannot run {isa}")
        monkeypatch.setenv("RLKERN_CPU_ISA", isa)
    with rlkern.use_backend(name):
        yield name


@pytest.fixture(params=BACKENDS)
def served_backend(request, monkeypatch):
    """Triton's interpreter and float64 as well."""
    yield from served("token_logprobs", request, monkeypatch)

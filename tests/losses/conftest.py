"""The losses' tests run on every backend."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# The helpers beside this file and above it.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from serving import BACKENDS, served  # noqa: E402


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    yield from served("policy_loss", request, monkeypatch)


@pytest.fixture(params=BACKENDS)
def value_backend(request, monkeypatch):
    """The dtype that the backend computes in."""
    for backend in served("value_loss", request, monkeypatch):
        yield backend.dtype

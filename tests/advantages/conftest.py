"""The advantages' tests run on every backend."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# The helpers beside this file and above it.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from serving import BACKENDS, served  # noqa: E402


@pytest.fixture(params=BACKENDS)
def scan_backend(request, monkeypatch):
    yield from served("return_scan", request, monkeypatch)


@pytest.fixture(params=BACKENDS)
def group_backend(request, monkeypatch):
    yield from served("group_advantages", request, monkeypatch)


@pytest.fixture(params=BACKENDS)
def whiten_backend(request, monkeypatch):
    yield from served("whiten", request, monkeypatch)

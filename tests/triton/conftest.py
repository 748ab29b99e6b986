"""What the numerical tests of the Triton kernels share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

# The helpers beside this file.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """Outputs are allocated by new_empty: what a kernel leaves out shows as NaN."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        out = new_empty(self, *args, **kwargs)
        is_real = type(out) is torch.Tensor and out.is_floating_point()
        return out.fill_(float("nan")) if is_real else out

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)

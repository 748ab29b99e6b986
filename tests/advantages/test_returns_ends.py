"""Nothing enters past the end of an episode, also where it is NaN or infinite."""

from __future__ import annotations

import pytest
import torch
from scan_batches import FUNCTIONS, GIVEN, call

import rlkern

functions = pytest.mark.parametrize("function", FUNCTIONS)
modes = pytest.mark.parametrize("mask_mode", ["carry", "break"])
garbages = pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf")])

# In a vector, at its ends, and at the ends of the sequence.
ENDS = torch.tensor([[0], [7], [8], [15], [16], [21], [39], [44]])
AT = torch.arange(45)


def ending_batch(hole: bool) -> dict:
    """One end in each row; hole: three masked tokens behind it."""
    shape = (len(ENDS), len(AT))
    batch = {name: torch.randn(shape) for name in ("rewards", "values", "log_ratios")}
    batch["dones"] = AT == ENDS
    batch["bootstrap_value"] = torch.randn(len(ENDS))
    if hole:
        batch["mask"] = (AT <= ENDS) | (AT > ENDS + 3)
    return batch


@functions
@modes
@garbages
@pytest.mark.parametrize("hole", [False, True], ids=["all", "hole"])
def test_results(scan_backend, function, mask_mode, garbage, hole):
    batch = ending_batch(hole)
    kept = AT <= ENDS
    plain = call(function, batch, scan_backend.dtype, mask_mode=mask_mode)
    dirty = batch | {"bootstrap_value": torch.full((len(ENDS),), garbage)}
    for name in ("rewards", *GIVEN[function]):
        dirty[name] = batch[name].where(kept, garbage)
    found = call(function, dirty, scan_backend.dtype, mask_mode=mask_mode)
    for a, b in zip(found, plain, strict=True):
        assert a[kept].isfinite().all()
        assert torch.equal(a[kept], b[kept])


def test_an_infinite_trace_ends_too(scan_backend):
    """c_bar = None leaves a ratio of e^1000 infinite."""
    batch = {n: x.to(scan_backend.dtype) for n, x in ending_batch(False).items() if n != "dones"}
    dones = AT == ENDS
    batch["log_ratios"][dones] = 1000.0
    found = rlkern.vtrace(**batch, dones=dones, c_bar=None)
    # With rho = 1 there: vs = V + (r - V), the advantage r - V.
    assert torch.allclose(found.values[dones], batch["rewards"][dones], rtol=0, atol=1e-6)
    expected = batch["rewards"][dones] - batch["values"][dones]
    assert torch.equal(found.advantages[dones], expected)


@pytest.mark.parametrize("function", ["gae", "discounted_returns"])
@modes
@garbages
@pytest.mark.parametrize("hole", [False, True], ids=["all", "hole"])
def test_gradients(scan_backend, function, mask_mode, garbage, hole):
    """What comes into an episode from outside goes to no token after its end."""
    batch = ending_batch(hole)
    kept = AT > ENDS
    names = ("rewards", *GIVEN[function], "bootstrap_value")
    leaves = {name: batch[name].to(scan_backend.dtype).requires_grad_() for name in names}
    out = call(function, batch | leaves, scan_backend.dtype, mask_mode=mask_mode)
    upstream = [torch.randn_like(x) for x in out]
    plain = torch.autograd.grad(out, leaves.values(), upstream, retain_graph=True)
    dirty = [x.where(kept, garbage) for x in upstream]
    found = torch.autograd.grad(out, leaves.values(), dirty)
    for a, b in zip(found[:-1], plain[:-1], strict=True):
        assert torch.equal(a[kept], b[kept])
        assert not a[~kept].isfinite().all()
    assert torch.equal(found[-1], plain[-1]) and found[-1].isfinite().all()

"""The policy losses from logits and from hidden states, over Triton's row pass and policy loss.

Tolerance: of both kernels against float64, as their own tests derive it, and of fp32 products.
"""

from __future__ import annotations

import pytest
import torch
from triton_device import DEVICE, MARKS

import rlkern
from rlkern import PolicyLoss

pytestmark = MARKS
V, D = 37, 6


def results(loss, entry, dtype, given, **options):
    """Loss, metrics' vector, gradients of hidden and weight."""
    hidden, weight, ids, advantages = (x.to(DEVICE) for x in given["inputs"])
    hidden, weight = (x.to(dtype).detach().clone().requires_grad_() for x in (hidden, weight))
    call = {
        name: x.to(DEVICE, dtype if x.is_floating_point() else None)
        for name, x in given["call"].items()
    }
    if entry == "hidden":
        out = loss.from_hidden(
            hidden, weight, ids, advantages, entropy=True, memory_budget=1, **options, **call
        )
    else:
        logits = hidden @ weight.t()
        out = loss.from_logits(logits, ids, advantages, entropy=True, **options, **call)
    (1.5 * out.loss).backward()
    return out.loss.detach(), out.metrics.vector, hidden.grad, weight.grad


@pytest.mark.parametrize("entry", ["logits", "logits in place", "hidden"])
@pytest.mark.parametrize("preset", ["grpo", "gspo"])
def test_equals_float64(preset, entry):
    torch.manual_seed(1)
    loss = PolicyLoss.preset(preset, kl_coef=0.1, entropy_coef=0.01, clip_low=0.1, clip_high=0.1)
    shape = (3, 7)
    hidden, weight = torch.randn(*shape, D), torch.randn(V, D) / 2
    ids, mask = torch.randint(V, shape), torch.rand(shape) < 0.8
    logprobs = (hidden @ weight.t()).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    given = {
        "inputs": (hidden, weight, ids, torch.tensor([1.0, -1.0, 0.0])),
        "call": {
            "mask": mask,
            "old_logprobs": logprobs + 0.3 * torch.randn(shape),
            "ref_logprobs": logprobs + 0.3 * torch.randn(shape),
        },
    }
    with rlkern.use_backend("eager"):
        expected = results(loss, entry.split()[0], torch.float64, given)
    given["call"] = {
        name: x.where(mask, float("nan")) if x.is_floating_point() else x
        for name, x in given["call"].items()
    }
    options = {"inplace": True} if "place" in entry else {}
    with rlkern.use_backend("triton"):
        actual = results(loss, entry.split()[0], torch.float32, given, **options)
    for mine, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-5)

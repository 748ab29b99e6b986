"""The lm_head-fused operators on a GPU: products in fp32, and tokens that are left out."""

from __future__ import annotations

import gpu
import pytest
import torch

import rlkern
from rlkern import PolicyLoss

pytestmark = gpu.MARKS
N, D, V = 700, 64, 1003
FEW = 256 * V * 2  # several chunks


@pytest.fixture(autouse=True, params=["native", "triton"])
def backend(request):
    with rlkern.use_backend(request.param):
        yield request.param


def inputs(dtype=torch.bfloat16):
    hidden = torch.randn(7, N // 7, D, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(V, D, device="cuda") / 4).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(V, (7, N // 7), device="cuda")


def exact(hidden, weight, ids):
    factors = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    log_p = (factors[0] @ factors[1].T).log_softmax(-1)
    return log_p.gather(-1, ids[..., None]).squeeze(-1), factors


def off(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("logits_dtype", [None, torch.float32], ids=str)
def test_log_probabilities_and_gradients(logits_dtype):
    """The gradient of the weight is rounded once, from a sum that never was: 2^-9 in the norm, and
    2^-9 for each of its terms, whose gradient of a logit is rounded."""
    hidden, weight, ids = inputs()
    truth, factors = exact(hidden, weight, ids)
    expected = torch.autograd.grad(truth.sum(), factors)
    out = rlkern.linear_token_logprobs(
        hidden, weight, ids, logits_dtype=logits_dtype, memory_budget=FEW
    )
    error = (out - truth).abs().max().item()
    # bf16 logits of up to 16 are off by 2^-5.
    assert error <= (1e-4 if logits_dtype else 2.0**-4)
    found = torch.autograd.grad(out.sum(), (hidden, weight))
    assert [g.dtype for g in found] == [torch.bfloat16] * 2
    for mine, wanted in zip(found, expected, strict=True):
        assert off(mine, wanted) <= 2.0**-7


def test_more_outputs():
    hidden, weight, ids = inputs(torch.float32)
    truth, (h, w) = exact(hidden, weight, ids)
    z = h @ w.T
    names = ("mean_logits", "is_top1", "log_sum_sq_probs")
    out = rlkern.linear_token_logprobs(hidden, weight, ids, outputs=names, memory_budget=FEW)
    torch.testing.assert_close(out.mean_logits.double(), z.mean(-1), rtol=1e-3, atol=1e-3)
    squares = (2 * z.log_softmax(-1)).logsumexp(-1)
    torch.testing.assert_close(out.log_sum_sq_probs.double(), squares, rtol=1e-3, atol=1e-3)
    assert (out.is_top1 == (z.argmax(-1) == ids)).float().mean() > 0.99


@pytest.mark.parametrize("preset", ["dapo", "gspo"])
def test_compaction_changes_nothing_but_the_products(preset, monkeypatch):
    loss = PolicyLoss.preset(preset, clip_low=0.01, clip_high=0.01)
    hidden, weight, ids = inputs(torch.float32)
    old = exact(hidden, weight, ids)[0].float().detach() + 0.1 * torch.randn(ids.shape).cuda()
    mask = torch.rand(ids.shape).cuda() < 0.8
    advantages = torch.randn(7, device="cuda")
    advantages[::3] = 0
    rows: list[int] = []
    real = torch.mm

    def counted(a, b, *rest, **options):
        rows.append(a.shape[1] if a.shape[0] == V else a.shape[0])
        return real(a, b, *rest, **options)

    monkeypatch.setattr(torch, "mm", counted)
    found = {}
    for compact in (False, True):
        rows.clear()
        out = loss.from_hidden(
            hidden, weight, ids, advantages, old_logprobs=old, mask=mask, compact=compact
        )
        found[compact] = (out.loss, *torch.autograd.grad(out.loss, (hidden, weight)), sum(rows))
    assert found[True][-1] < 0.9 * found[False][-1]
    for mine, other in zip(found[True][:-1], found[False][:-1], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)

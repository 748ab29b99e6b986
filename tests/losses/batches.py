"""Random ragged batches, their packed form, calls of a PolicyLoss, and how close is equal."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

#: How far an fp32 result may be from the float64 one of the same fp32 inputs, relative to the sum
#: of the absolute values of what was added. One term: d = logp - old is rounded to |d| 2^-24, which
#: exp turns into a relative error (7e-7 at |d| = 12, beyond what these batches hold), exp and expm1
#: add 2 ulp, some ten products and quotients half an ulp each: 1.5e-6. A sum adds 64 * 2^-25 = 2e-6
#: at most, since its chains are at most 64 long in fp32 and double above. Together 4e-6.
RTOL = {torch.float32: 4e-6, torch.float64: 1e-11}

PER_TOKEN = ("old_logprobs", "ref_logprobs", "rollout_logprobs", "entropy", "token_weights")
TENSORS = ("logprobs", "advantages", "mask", "entropy_mask", *PER_TOKEN)


def random_batch(B=4, T=6, *, per_token=False, spread=0.4, seed=0, empty=True):
    """fp32 tensors by the names of PolicyLoss's call. The second sequence counts no token, masks
    have holes, some tokens are on policy, some advantages 0, some rollout log-probabilities NaN."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    def some(share, *shape):
        return torch.rand(*shape, generator=g) < share

    logprobs = -normal(B, T).abs() - 0.01
    old = torch.where(some(0.15, B, T), logprobs, logprobs + spread * normal(B, T))
    advantages = normal(B, T) if per_token else normal(B)
    advantages = torch.where(some(0.1, *advantages.shape), 0.0, advantages)
    rollout = torch.where(some(0.05, B, T), math.nan, old + spread * normal(B, T))
    mask = (torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=g)) & ~some(0.1, B, T)
    if empty and B > 1:
        mask[1] = False
    return {
        "logprobs": logprobs,
        "advantages": advantages,
        "old_logprobs": old.clamp(max=-1e-3),
        "ref_logprobs": logprobs + spread * normal(B, T),
        "rollout_logprobs": rollout,
        "entropy": normal(B, T).abs(),
        "token_weights": torch.where(some(0.2, B, T), 0.0, normal(B, T).abs()),
        "entropy_mask": some(0.5, B, T),
        "mask": mask,
    }


def used_by(loss, batch):
    """The batch without what the loss would refuse."""
    unused = set()
    if loss.correction is None and loss.off_policy_threshold is None:
        unused.add("rollout_logprobs")
    if not loss.entropy_coef:
        unused.add("entropy_mask")
    return {name: x for name, x in batch.items() if name not in unused and x is not None}


def pack(batch):
    """The batch as [total] with cu_seqlens: each sequence up to one beyond its last counting token.

    Returns it with the places of its tokens in the padded one.
    """
    B, T = batch["logprobs"].shape
    mask = batch.get("mask")
    mask = torch.ones(B, T, dtype=torch.bool) if mask is None else mask
    ends = (mask * torch.arange(1, T + 1)).amax(1) if T else torch.zeros(B, dtype=torch.long)
    lengths = torch.where(ends > 0, (ends + 1).clamp(max=T), 0)
    keep = torch.arange(T) < lengths[:, None]
    packed = {n: x[keep] if x.shape == (B, T) else x for n, x in batch.items()}
    packed["cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()
    return packed, keep


class Called(NamedTuple):
    loss: Tensor
    grad: Tensor
    entropy_grad: Tensor | None
    metrics: object


def call(loss, batch, dtype=torch.float32, **given) -> Called:
    """The loss and its gradients in the batch's own layout."""
    batch = {
        name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in batch.items()
    }
    logprobs = batch.pop("logprobs").detach().requires_grad_()
    entropy = batch.pop("entropy", None)
    if entropy is not None:
        entropy = entropy.detach().requires_grad_()
    value, metrics = loss(logprobs, batch.pop("advantages"), entropy=entropy, **batch, **given)
    assert value.shape == () and value.dtype == dtype
    value.backward()
    entropy_grad = None if entropy is None else entropy.grad
    return Called(value.detach(), logprobs.grad, entropy_grad, metrics)


def call_packed(loss, batch, dtype=torch.float32, **given) -> Called:
    """The same through the packed layout, gradients put back to [B, T]."""
    packed, keep = pack(batch)
    called = call(loss, packed, dtype, **given)

    def padded(x):
        return None if x is None else torch.zeros(keep.shape, dtype=dtype).masked_scatter(keep, x)

    return called._replace(grad=padded(called.grad), entropy_grad=padded(called.entropy_grad))


def assert_equal(called: Called, expected, dtype, *, message=""):
    """`expected`: what literal.py returns. Gradients are judged against the largest one, since a
    sequence ratio or a KL term adds up to one that may cancel."""
    rtol = RTOL[dtype]
    error = abs(float(called.loss) - expected.loss)
    assert error <= rtol * expected.terms + 1e-30, (message, float(called.loss), expected.loss)
    close(called.grad, expected.grad, rtol, f"{message} gradient")
    if called.entropy_grad is not None:
        close(called.entropy_grad, expected.entropy_grad, rtol, f"{message} entropy gradient")
    for name, value in called.metrics.item_dict().items():
        scale = max(1.0, expected.terms) if name == "policy_loss" else 1.0
        assert name in expected.metrics or called.metrics["tokens"] == 0, (message, name)
        want = expected.metrics.get(name, 0.0)
        if math.isnan(want):
            assert math.isnan(value), (message, name, value)
        else:
            # Means of terms like expm1(d) - d, of d of about 1, whose rounding is not the mean's.
            assert abs(value - want) <= rtol * (abs(want) + scale), (message, name, value, want)


def close(actual: Tensor, expected: Tensor, rtol: float, message: str = ""):
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(
        actual.double(),
        expected.double(),
        rtol=rtol,
        atol=rtol * largest,
        msg=lambda text: message + text,
    )

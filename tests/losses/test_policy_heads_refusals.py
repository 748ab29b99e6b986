"""What from_logits and from_hidden refuse, and how in place is told to whoever has to know."""

from __future__ import annotations

import pytest
import torch
from heads import LOSSES, HeadBatch

from rlkern import PolicyLoss


def leaf_and_logits(batch):
    hidden = batch.hidden.clone().requires_grad_()
    return hidden, hidden @ batch.weight.t()


def test_in_place_takes_the_logits_memory(backend):
    if not backend.is_kernel:
        pytest.skip("eager PyTorch takes the gradient in the backward")
    loss = LOSSES["dapo, corrected"]
    batch = HeadBatch(loss)
    hidden, logits = leaf_and_logits(batch)
    address, version = logits.data_ptr(), logits._version
    seen = []
    logits.register_hook(lambda g: seen.append(g.data_ptr()))
    out = loss.from_logits(logits, batch.ids, batch.advantages, inplace=True, **batch.given)
    assert logits._version > version
    out.loss.backward(retain_graph=True)
    assert seen == [address]
    with pytest.raises(RuntimeError, match="expected one backward, got a second one"):
        out.loss.backward()


def test_in_place_is_told_to_other_uses(backend):
    if not backend.is_kernel:
        pytest.skip("eager PyTorch takes the gradient in the backward")
    loss = LOSSES["dapo, corrected"]
    batch = HeadBatch(loss)
    hidden, logits = leaf_and_logits(batch)
    other = (logits**2).sum()
    out = loss.from_logits(logits, batch.ids, batch.advantages, inplace=True, **batch.given)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (out.loss + other).backward()


def test_in_place_refuses_what_it_would_destroy():
    loss = LOSSES["dapo, corrected"]
    batch = HeadBatch(loss)
    logits = (batch.hidden @ batch.weight.t()).requires_grad_()

    def call(z):
        return loss.from_logits(z, batch.ids, batch.advantages, inplace=True, **batch.given)

    with pytest.raises(ValueError, match="inplace=True: .* got a leaf tensor"):
        call(logits)
    with pytest.raises(ValueError, match="inplace=True: .* got a view of a leaf"):
        call(logits.view(logits.shape))
    with pytest.raises(ValueError, match="inplace=True: .* got an expanded"):
        call((logits[:1] * 1).expand(logits.shape))
    with torch.no_grad():  # without a gradient nothing is written
        before = logits.clone()
        call(logits)
        assert torch.equal(before, logits)


def test_out_of_place_the_gradient_is_the_only_copy(backend):
    """For an upstream of 1 the tensor that the forward wrote is the one that comes out."""
    if backend.name != "native":
        pytest.skip("the finished gradient is the CPU kernels'")
    loss = LOSSES["ppo"]
    batch = HeadBatch(loss)
    logits = (batch.hidden @ batch.weight.t()).requires_grad_()
    out = loss.from_logits(logits, batch.ids, batch.advantages, **batch.given)
    held = out.loss.grad_fn.saved_tensors if hasattr(out.loss.grad_fn, "saved_tensors") else ()
    addresses = {x.data_ptr() for x in held}
    (grad,) = torch.autograd.grad(out.loss, logits)
    assert grad.data_ptr() in addresses


@pytest.mark.parametrize("entry", ["from_logits", "from_hidden"])
@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_second_derivatives_are_refused(entry, name):
    loss = LOSSES[name]
    batch = HeadBatch(loss)
    hidden = batch.hidden.clone().requires_grad_()
    first = (hidden, batch.weight) if entry == "from_hidden" else (hidden @ batch.weight.t(),)
    out = getattr(loss, entry)(*first, batch.ids, batch.advantages, **batch.given)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        (grad,) = torch.autograd.grad(out.loss, hidden, create_graph=True)
        grad.sum().backward()


REFUSED = [
    ({"logits": torch.zeros(2, 5)}, ValueError, r"logits: expected \[B, T, X\], or \[total, X\]"),
    ({"logits": torch.zeros(2, 3, 5).long()}, TypeError, "logits: expected float32"),
    ({"token_ids": torch.zeros(2, 3)}, TypeError, "token_ids: expected int64 or int32"),
    ({"token_ids": torch.full((2, 3), 5)}, ValueError, r"token_ids: expected values in \[0, 5\)"),
    ({"advantages": torch.zeros(3)}, ValueError, r"advantages: expected shape \[2\] or \[2, 3\]"),
    ({"mask": torch.zeros(2, 3)}, TypeError, "mask: expected bool"),
    ({"temperature": -1}, ValueError, "temperature: expected a positive"),
    ({"softcap": 0}, ValueError, "softcap: expected a positive"),
    ({"inplace": 1}, TypeError, "inplace: expected a bool, got 1"),
    ({"entropy": None}, TypeError, "entropy: expected a bool, got None"),
    ({"old_logprob": None}, TypeError, "argument 'old_logprob'; did you mean 'old_logprobs'"),
    ({"old_logprobs": torch.zeros(2)}, ValueError, r"old_logprobs: expected shape \[2, 3\]"),
    ({"rollout_logprobs": torch.zeros(2, 3)}, ValueError, "rollout_logprobs: expected None"),
]


@pytest.mark.parametrize(
    ("change", "error", "message"), REFUSED, ids=[message[:40] for *_, message in REFUSED]
)
def test_refuses(change, error, message):
    given = {
        "logits": torch.zeros(2, 3, 5),
        "token_ids": torch.zeros(2, 3, dtype=torch.long),
        "advantages": torch.zeros(2),
    } | change
    with pytest.raises(error, match=message):
        PolicyLoss.preset("dapo").from_logits(**given)
    if "logits" in change or "inplace" in change or "token_ids" in change:
        return
    hidden = {"hidden": given.pop("logits"), "weight": torch.zeros(7, 5)}
    with pytest.raises(error, match=message.replace("logits", "hidden")):
        PolicyLoss.preset("dapo").from_hidden(**hidden, **given)


def test_from_hidden_refuses_its_own():
    hidden, ids = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
    for change, message in (
        ({"metrics": 1}, "metrics: expected a bool"),
        ({"compact": 0}, "compact: expected a bool"),
        ({"batch_invariant": "no"}, "batch_invariant: expected a bool"),
        ({"memory_budget": True}, "memory_budget: expected an int"),
        ({"weight": torch.zeros(7, 4)}, r"weight: expected shape \[V, 5\]"),
    ):
        given = {"weight": torch.zeros(7, 5)} | change
        with pytest.raises((TypeError, ValueError), match=message):
            PolicyLoss.preset("dapo").from_hidden(
                hidden, given.pop("weight"), ids, torch.zeros(2), **given
            )

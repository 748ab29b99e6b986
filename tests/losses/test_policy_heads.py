"""PolicyLoss.from_logits and from_hidden against the same in steps, in float64.

Tolerances. fp32: a logit is a sum of D = 12 products, good to 12 * 2^-24 of their magnitudes; that
error goes through exp into log-probability, ratio and gradient, with factors of a few units each:
RTOL of the largest entry. Decisions (clip or not) may fall the other way only within that distance
of their bound, which no token of these batches is. 16-bit types: no worse than eager in steps.
"""

from __future__ import annotations

import pytest
import torch
from heads import (
    LOSSES,
    HeadBatch,
    from_hidden,
    from_logits,
    in_steps,
    near,
    opcheck_all,
    single,
)
from torch.utils.checkpoint import checkpoint

import rlkern
from rlkern import PolicyLoss

NAN = float("nan")


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_steps(backend, name, layout):
    loss = LOSSES[name]
    batch = HeadBatch(
        loss, packed=layout == "packed", per_token=name == "ppo", dtype=single(backend.dtype)
    )
    loss64, vector, of_logits, of_hidden, of_weight = in_steps(loss, batch, 1.5, 0.8)
    for inplace in (False, True):
        actual = from_logits(loss, batch, 1.5, 0.8, inplace=inplace)
        expected = (loss64, vector, of_logits, of_hidden, of_weight)
        for mine, exact in zip(actual, expected, strict=True):
            near(mine, exact)
    for mine, exact in zip(
        from_hidden(loss, batch, 1.5, 0.8), (loss64, vector, of_hidden, of_weight), strict=True
    ):
        near(mine, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_no_worse_than_eager_in_its_dtype(backend, name, dtype):
    if backend.dtype == torch.float64:
        pytest.skip("float64 has no 16-bit counterpart")
    loss = LOSSES[name]
    batch = HeadBatch(loss, sequences=8, dtype=dtype)
    exact = in_steps(loss, batch)

    hidden, weight = (x.clone().requires_grad_() for x in (batch.hidden, batch.weight))
    log_p = (hidden @ weight.t()).float().log_softmax(-1)
    logprobs = log_p.gather(-1, batch.ids[..., None]).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    with rlkern.use_backend("eager"):
        out = loss(logprobs, batch.advantages, entropy=entropy, **batch.given)
    out.loss.backward()
    theirs = (hidden.grad, weight.grad)

    def distance(value, truth):
        return ((value.double() - truth).norm() / truth.norm()).item()

    for actual in (from_logits(loss, batch)[3:], from_hidden(loss, batch)[2:]):
        for mine, other, truth in zip(actual, theirs, exact[3:], strict=True):
            # Half the type's rounding on top: chunks of the weight's gradient are rounded apart.
            allowed = distance(other, truth) + torch.finfo(dtype).eps / 2
            assert distance(mine, truth) <= allowed


@pytest.mark.parametrize("vocab", [1, 2, 50257, 151936])
def test_vocabularies(backend, vocab):
    loss = LOSSES["grpo"]
    batch = HeadBatch(loss, sequences=2, length=4, vocab=vocab, dtype=single(backend.dtype))
    batch.given["mask"][1] = True
    exact = in_steps(loss, batch)
    for mine, truth in zip(from_logits(loss, batch), exact, strict=True):
        near(mine, truth, 1e-4)  # sums over V of fp32 products, in torch's order
    for mine, truth in zip(from_hidden(loss, batch), (*exact[:2], *exact[3:]), strict=True):
        near(mine, truth, 1e-4)


@pytest.mark.parametrize("shape", [(1, 1), (1, 0), (0, 3), (3, 1)], ids=str)
def test_one_token_and_none(backend, shape):
    loss = PolicyLoss.preset("dapo", kl_coef=0.1)
    hidden = torch.randn(*shape, 5, requires_grad=True, dtype=backend.dtype)
    weight = torch.randn(7, 5, requires_grad=True, dtype=backend.dtype)
    ids, advantages = torch.randint(7, shape), torch.randn(shape[0])
    old = -torch.rand(shape)
    given = {"old_logprobs": old, "ref_logprobs": old - 0.1}
    losses, grads = [], []
    for how in ("steps", "logits", "hidden"):
        if how == "hidden":
            out = loss.from_hidden(hidden, weight, ids, advantages, **given)
        elif how == "logits":
            out = loss.from_logits(hidden @ weight.t(), ids, advantages, **given)
        else:
            logprobs = rlkern.token_logprobs(hidden @ weight.t(), ids)
            out = loss(logprobs, advantages, **given)
        losses.append(out.loss.detach())
        grads.append(torch.autograd.grad(out.loss, (hidden, weight)))
    for other, (of_hidden, of_weight) in zip(losses, grads, strict=True):
        torch.testing.assert_close(other, losses[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(of_hidden, grads[0][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(of_weight, grads[0][1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_what_masked_positions_hold_changes_nothing(backend, name):
    loss = LOSSES[name]
    batch = HeadBatch(loss, dtype=single(backend.dtype))
    clean = from_hidden(loss, batch), from_logits(loss, batch, inplace=True)
    mask = batch.given["mask"]
    for key in ("old_logprobs", "ref_logprobs", "token_weights"):
        batch.given[key] = batch.given[key].where(mask, NAN)
    batch.ids = batch.ids.where(mask, -100)
    garbage = torch.full_like(batch.hidden, NAN)
    batch.hidden = batch.hidden.where(mask[..., None], garbage)
    dirty = from_hidden(loss, batch), None
    for a, b in zip(clean[0], dirty[0], strict=True):
        assert torch.equal(a, b)
    batch.hidden = batch.hidden.where(mask[..., None], 0.0)
    again = from_logits(loss, batch, inplace=True)
    for a, b in zip(clean[1][:3], again[:3], strict=True):
        assert torch.equal(a, b)
    assert (again[2][~mask] == 0).all()


def test_one_masked_column_saves_the_slice(backend):
    """Next-token logits [B, T + 1, V] whole, instead of logits[:, :-1]."""
    loss = LOSSES["grpo"]
    batch = HeadBatch(loss, dtype=single(backend.dtype))
    exact = in_steps(loss, batch)
    batch.hidden = torch.cat([batch.hidden, torch.randn_like(batch.hidden[:, :1])], 1)
    batch.ids = torch.nn.functional.pad(batch.ids, (0, 1), value=-100)
    for key, value in batch.given.items():
        batch.given[key] = torch.nn.functional.pad(value, (0, 1))
    actual = from_logits(loss, batch, inplace=True)
    near(actual[0], exact[0])
    near(actual[2][:, :-1], exact[2])
    assert (actual[2][:, -1] == 0).all()


# ---- what trainers do around it ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["grpo", "off policy"])
def test_accumulation_over_micro_batches(backend, name):
    loss = LOSSES[name].replace(aggregation="token_mean")
    batch = HeadBatch(loss, dtype=single(backend.dtype))
    exact = in_steps(loss, batch)
    weight = batch.weight.clone().requires_grad_()
    hidden = batch.hidden.clone().requires_grad_()
    tokens = batch.given["mask"].sum()
    total = 0
    for rows in (slice(0, 1), slice(1, 4)):
        given = {key: value[rows] for key, value in batch.given.items()}
        normalizers = {"normalizer": tokens}
        if loss.entropy_coef:
            normalizers["entropy_normalizer"] = tokens
        out = loss.from_hidden(
            hidden[rows], weight, batch.ids[rows], batch.advantages[rows], **given, **normalizers
        )
        out.loss.backward()
        total = total + out.loss.detach()
    near(total, exact[0])
    near(hidden.grad, exact[3])
    near(weight.grad, exact[4])


def test_activation_checkpointing_and_tied_embeddings(backend):
    loss = LOSSES["grpo"]
    batch = HeadBatch(loss, dtype=single(backend.dtype))
    tokens = torch.randint(101, batch.ids.shape)

    def step(weight):
        return loss.from_hidden(
            torch.tanh(weight[tokens]), weight, batch.ids, batch.advantages, **batch.given
        ).loss

    grads = []
    for function in (step, lambda w: checkpoint(step, w, use_reentrant=False)):
        weight = batch.weight.clone().requires_grad_()
        function(weight).backward()
        grads.append(weight.grad)
    assert torch.equal(*grads)
    batch.hidden = torch.tanh(batch.weight[tokens])
    weight = batch.weight.double().clone().requires_grad_()
    log_p = (torch.tanh(weight[tokens]) @ weight.t()).log_softmax(-1)
    logprobs = log_p.gather(-1, batch.ids[..., None]).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    given = {k: v.double() if v.is_floating_point() else v for k, v in batch.given.items()}
    with rlkern.use_backend("eager"):
        loss(logprobs, batch.advantages.double(), entropy=entropy, **given).loss.backward()
    near(grads[0], weight.grad)


def test_autocast(backend):
    if backend.dtype == torch.float64:
        pytest.skip("autocast leaves float64 alone")
    loss = LOSSES["grpo"]
    batch = HeadBatch(loss)
    hidden, weight = (x.clone().requires_grad_() for x in (batch.hidden, batch.weight))
    with torch.autocast("cpu", torch.bfloat16):
        out = loss.from_hidden(hidden, weight, batch.ids, batch.advantages, **batch.given)
    out.loss.backward()
    batch.hidden, batch.weight = batch.hidden.bfloat16(), batch.weight.bfloat16()
    expected = from_hidden(loss, batch, memory_budget=1 << 20)
    assert torch.equal(out.loss, expected[0]) and hidden.grad.dtype == torch.float32
    torch.testing.assert_close(weight.grad, expected[3].float())


@pytest.mark.parametrize("name", ["grpo", "gspo"])
@pytest.mark.parametrize("entry", ["logits", "logits in place", "hidden"])
def test_compiles(backend, name, entry):
    torch._dynamo.reset()  # or the cases add up to its limit of versions of one function
    loss = LOSSES[name]
    batch = HeadBatch(loss, dtype=single(backend.dtype))

    def step(hidden, weight):
        if entry == "hidden":
            return loss.from_hidden(hidden, weight, batch.ids, batch.advantages, **batch.given).loss
        return loss.from_logits(
            hidden @ weight.t(), batch.ids, batch.advantages, inplace=entry == "logits in place",
            **batch.given,
        ).loss  # fmt: skip

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in (batch.hidden, batch.weight)]
        value = function(*leaves)
        value.backward()
        results.append([value.detach(), *(leaf.grad for leaf in leaves)])
    for plain, traced in zip(*results, strict=True):
        torch.testing.assert_close(plain, traced, rtol=1e-6, atol=1e-7)


def test_batch_invariant(backend):
    loss = PolicyLoss.preset("dapo", aggregation="token_sum")
    batch = HeadBatch(loss, sequences=9, length=40, dtype=single(backend.dtype))
    options = {"batch_invariant": True, "memory_budget": 128 * 101 * 4}

    def of_hidden(rows):
        part = HeadBatch.__new__(HeadBatch)
        part.hidden, part.weight = batch.hidden[rows], batch.weight
        part.ids, part.advantages = batch.ids[rows], batch.advantages[rows]
        part.given = {key: value[rows] for key, value in batch.given.items()}
        return from_hidden(loss, part, **options)[2]

    whole = of_hidden(slice(None))
    for rows in (slice(0, 1), slice(2, 5), slice(8, 9)):
        assert torch.equal(of_hidden(rows), whole[rows])


# ---- products ------------------------------------------------------------------------------------


@pytest.fixture
def products(monkeypatch):
    """The tokens of every product that is taken: of logits, hidden gradient, weight gradient, of
    which the last has the vocabulary's 101 rows on its left."""
    taken = []
    for owner, name in ((torch, "mm"), (torch, "addmm"), (torch.Tensor, "addmm_")):
        real = getattr(owner, name)

        def count(*args, real=real, **kwargs):
            left = args[-2]
            taken.append(left.shape[1] if left.shape[0] == 101 else left.shape[0])
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, count)
    return taken


def test_only_the_products_that_are_needed(backend, products):
    if not backend.is_kernel:
        pytest.skip("eager PyTorch makes the logits once more in the backward")
    loss = LOSSES["dapo, corrected"]
    batch = HeadBatch(loss)

    def taken(hidden_grad, weight_grad, loss=loss):
        products.clear()
        out = loss.from_hidden(
            batch.hidden.clone().requires_grad_(hidden_grad),
            batch.weight.clone().requires_grad_(weight_grad),
            batch.ids,
            batch.advantages,
            **batch.given,
        )
        if out.loss.requires_grad:
            out.loss.backward()
        return len(products)

    assert taken(True, True) == 3
    assert taken(True, False) == 2  # a frozen head: nothing recomputed
    assert taken(False, True) == 2
    assert taken(False, False) == 1
    with torch.no_grad():
        assert taken(True, True) == 1
    # Sequences that fit into a chunk are as good; longer ones take the logits twice.
    coupled = LOSSES["rloo"]
    batch = HeadBatch(coupled)
    assert taken(True, True, coupled) == 3
    batch = HeadBatch(coupled, sequences=1, length=100)
    batch.given["mask"][:] = True
    products.clear()
    from_hidden(coupled, batch, memory_budget=1, compact=False)
    assert len(products) == 4 * 2  # two chunks of 64 tokens


@pytest.mark.parametrize("metrics", [True, False])
def test_tokens_that_cannot_matter_are_left_out(backend, products, metrics):
    if not backend.is_kernel:
        pytest.skip("eager PyTorch multiplies every row")
    loss = PolicyLoss.preset("dapo")
    batch = HeadBatch(loss, sequences=8, length=50)
    batch.advantages[::2] = 0
    counting = batch.given["mask"]
    active = int(counting[1::2].sum())
    silent = int(counting.sum()) - active
    exact = in_steps(loss, batch)
    moving = int(exact[2].any(-1).sum())
    assert moving < 0.9 * active  # the others are clipped
    products.clear()
    value, vector, *grads = from_hidden(loss, batch, metrics=metrics, memory_budget=1 << 24)
    assert sum(products) == active + 2 * moving + (silent if metrics else 0)
    near(value, exact[0])
    if metrics:
        near(vector, exact[1])
    for mine, truth in zip(grads, exact[3:], strict=True):
        near(mine, truth)
    products.clear()
    from_hidden(loss, batch, compact=False, memory_budget=1 << 24)
    assert sum(products) == 3 * int(counting.sum())
    # Clipped ones stay where products are padded to one shape: logits and hidden's gradient.
    products.clear()
    from_hidden(loss, batch, batch_invariant=True, metrics=False, memory_budget=1)
    assert {*products[0::3], *products[1::3]} == {64} and sum(products[2::3]) == active
    # A KL asks for every token.
    loss = PolicyLoss.preset("dapo", kl_coef=0.1)
    batch.given["ref_logprobs"] = batch.given["old_logprobs"] - 0.1
    products.clear()
    from_hidden(loss, batch, metrics=metrics, memory_budget=1 << 24)
    assert sum(products) == 3 * int(counting.sum())


@pytest.mark.parametrize("compact", [False, True])
def test_many_rows_of_16_bits_are_multiplied_in_fours(backend, products, compact):
    """Zeros behind the others change no result, and what lies in masked rows enters none."""
    if not backend.is_kernel:
        pytest.skip("eager PyTorch multiplies every row")
    loss = PolicyLoss.preset("dapo")
    batch = HeadBatch(loss, sequences=15, length=50, dtype=torch.bfloat16)
    mask = batch.given["mask"]
    if mask.sum() % 4 == 0:
        mask[0, mask[0].nonzero()[0]] = False
    batch.hidden[~mask] = torch.nan
    value, _, *grads = from_hidden(loss, batch, compact=compact, memory_budget=1 << 24)
    assert min(products) > 256 and not any(rows % 4 for rows in products)
    assert products[0] - int(mask.sum()) in (1, 2, 3)
    products.clear()
    # In chunks of 64 rows, which are multiplied as they are.
    apart, _, *parts = from_hidden(loss, batch, compact=compact, memory_budget=1)
    assert max(products) == 64 and any(rows % 4 for rows in products)
    near(value, apart.double(), rtol=1e-6)
    for mine, other in zip(grads, parts, strict=True):
        # Both are rounded to bf16, the weight's also chunk by chunk: twice 2^-9 and a little.
        near(mine, other.double(), rtol=1e-2)


def test_clipped_sequences_are_left_out(backend, products):
    if not backend.is_kernel:
        pytest.skip("eager PyTorch multiplies every row")
    loss = PolicyLoss.preset("gspo", clip_low=0.01, clip_high=0.01)
    batch = HeadBatch(loss, sequences=8, length=50)
    exact = in_steps(loss, batch)
    counting = int(batch.given["mask"].sum())
    moving = int(exact[2].any(-1).sum())
    assert 0 < moving < 0.9 * counting
    for budget in (1 << 24, 1):  # a chunk for all sequences, and one for each
        products.clear()
        value, vector, *grads = from_hidden(loss, batch, memory_budget=budget)
        assert sum(products) == counting + 2 * moving
        for mine, truth in zip((value, vector, *grads), (*exact[:2], *exact[3:]), strict=True):
            near(mine, truth)


def test_nothing_is_left_where_all_is_clipped(backend):
    loss = PolicyLoss.preset("dapo")
    batch = HeadBatch(loss)
    batch.advantages = batch.advantages.abs()
    batch.given["old_logprobs"] -= 100.0
    exact = in_steps(loss, batch)
    assert not exact[2].any()
    value, _, *grads = from_hidden(loss, batch)
    near(value, exact[0])
    assert not any(grad.any() for grad in grads)


def test_a_nan_is_never_left_out(backend):
    """Whatever the clip says: its row of the gradient is NaN, as without compaction."""
    for name in ("dapo, corrected", "gspo"):
        batch = HeadBatch(LOSSES[name])
        place = tuple(batch.given["mask"].nonzero()[0])
        batch.hidden[place] = NAN
        for compact in (True, False):
            *_, of_hidden, of_weight = from_hidden(LOSSES[name], batch, compact=compact)
            assert of_hidden[place].isnan().all() and of_weight.isnan().all()


# ---- the operators -------------------------------------------------------------------------------


def test_opcheck(backend, monkeypatch):
    if not backend.is_kernel:
        pytest.skip("eager PyTorch has no operator of its own for these")
    loss = LOSSES["grpo"]
    batch = HeadBatch(loss)

    def run():
        from_logits(loss, batch)
        from_hidden(loss, batch)

    assert opcheck_all(monkeypatch, ("policy_loss_logits", "policy_loss_hidden"), run) == 2


def test_repeats_bit_for_bit(backend):
    loss = LOSSES["grpo"]
    batch = HeadBatch(loss, dtype=single(backend.dtype))
    for function in (from_logits, from_hidden):
        for a, b in zip(function(loss, batch), function(loss, batch), strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num())

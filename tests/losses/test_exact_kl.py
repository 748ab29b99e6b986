"""kl_estimator="exact" on both entry points that take it, against literal float64 lines.

Tolerances: test_policy_heads.py says why, and tests/ops/test_kl_divergence.py for the KL itself.
"""

from __future__ import annotations

import pytest
import torch
from divergences import literal
from heads import (
    LOSSES,
    SEPARABLE,
    HeadBatch,
    from_hidden,
    from_logits,
    in_steps,
    near,
    opcheck_all,
    single,
)
from torch.utils.checkpoint import checkpoint

from rlkern import PolicyLoss

NAN = float("nan")
COEF = 0.2
REF_D = 20  # another hidden size than the policy's
EXACT = {
    name: loss.replace(kl_coef=COEF, kl_estimator="exact", kl_ratio_weighted=False)
    for name, loss in LOSSES.items()
}
EXACT["of sequences, not averaged"] = PolicyLoss(
    aggregation="seq_mean_token_sum", kl_coef=COEF, kl_estimator="exact"
)


class ExactBatch(HeadBatch):
    """With a reference; temperature of all calls 0.8."""

    def __init__(self, loss, **options):
        super().__init__(loss.replace(kl_coef=0.0, kl_estimator="k3"), **options)
        dtype, vocab = self.hidden.dtype, self.weight.shape[0]
        self.ref_hidden = torch.randn(*self.hidden.shape[:-1], REF_D).to(dtype)
        self.ref_weight = (torch.randn(vocab, REF_D) / 3).to(dtype)

    @property
    def of_hidden(self):
        return {"ref_hidden": self.ref_hidden, "ref_weight": self.ref_weight}

    @property
    def of_logits(self):
        return {"ref_logits": self.ref_hidden @ self.ref_weight.t()}

    def sequences(self, x):
        offsets = self.given.get("cu_seqlens")
        return list(x) if offsets is None else list(x.split(offsets.diff().tolist()))


def aggregated(loss, batch, kl):
    """The mean that the loss takes, sequence by sequence."""
    mask = batch.given["mask"]
    sums = [(k * m).sum() for k, m in zip(batch.sequences(kl), batch.sequences(mask), strict=True)]
    lengths = [int(m.sum()) for m in batch.sequences(mask)]
    if loss.aggregation == "token_sum":
        return sum(sums)
    if loss.aggregation == "token_mean":
        return sum(sums) / batch.given.get("normalizer", max(sum(lengths), 1))
    if loss.aggregation == "seq_mean_token_mean":
        sums = [s / max(n, 1) for s, n in zip(sums, lengths, strict=True)]
    count = sum(n > 0 for n in lengths) if loss.skip_empty else len(lengths)
    total = sum(sums) / count
    norm = loss.aggregation == "seq_mean_token_sum_norm"
    return total / batch.given["normalizer"] if norm else total


def exact(loss, batch, upstream=1.0, temperature=0.8):
    """As heads.in_steps, with the KL."""
    base = loss.replace(kl_coef=0.0, kl_estimator="k3")
    value, vector, *grads = in_steps(base, batch, upstream, temperature)
    hidden, weight = (x.double().clone().requires_grad_() for x in (batch.hidden, batch.weight))
    logits = hidden @ weight.t()
    logits.retain_grad()
    ref = batch.ref_hidden.double() @ batch.ref_weight.double().t()
    kl = literal(logits, ref, temperature=temperature, mask=batch.given["mask"])
    term = loss.kl_coef * aggregated(loss, batch, kl)
    (upstream * term).backward()
    of_kl = (logits.grad, hidden.grad, weight.grad)
    vector = vector.clone()
    vector[5] = kl.detach().sum()  # the place of "kl" among the sums
    return value + term.detach(), vector, *(a + b for a, b in zip(grads, of_kl, strict=True))


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("name", EXACT)
def test_equals_float64(backend, name, layout):
    loss = EXACT[name]
    batch = ExactBatch(loss, packed=layout == "packed", dtype=single(backend.dtype))
    expected = exact(loss, batch, 1.5)
    for inplace in (False, True):
        actual = from_logits(loss, batch, 1.5, 0.8, inplace=inplace, **batch.of_logits)
        for mine, true in zip(actual, expected, strict=True):
            near(mine, true)
    of_hidden = (*expected[:2], *expected[3:])
    for budget in (1, 1 << 20):
        actual = from_hidden(loss, batch, 1.5, 0.8, memory_budget=budget, **batch.of_hidden)
        for mine, true in zip(actual, of_hidden, strict=True):
            near(mine, true)


@pytest.mark.parametrize("name", ["ppo", "gspo"])
def test_without_a_coefficient_it_is_measured(backend, name):
    loss = EXACT[name].replace(kl_coef=0.0)
    batch = ExactBatch(loss, dtype=single(backend.dtype))
    true = exact(loss, batch)
    for inplace in (False, True):
        actual = from_logits(loss, batch, 1.0, 0.8, inplace=inplace, **batch.of_logits)
        near(actual[0], true[0])
        near(actual[1], true[1])
        near(actual[2], true[2])
    actual = from_hidden(loss, batch, 1.0, 0.8, **batch.of_hidden)
    for mine, expected in zip(actual, (*true[:2], *true[3:]), strict=True):
        near(mine, expected)
    batch.advantages = batch.advantages * 0  # no token learns, all are measured
    near(from_hidden(loss, batch, 1.0, 0.8, **batch.of_hidden)[1], exact(loss, batch)[1])
    loss.from_hidden(
        batch.hidden.requires_grad_(), batch.weight, batch.ids, batch.advantages, metrics=False,
        **batch.of_hidden, **batch.given,
    )  # fmt: skip


def test_tokens_without_advantage_still_learn_the_kl(backend):
    loss = EXACT["ppo"]
    batch = ExactBatch(loss, dtype=single(backend.dtype))
    batch.advantages = batch.advantages * 0
    true = exact(loss, batch)
    assert true[3].abs().max() > 0
    for metrics in (True, False):
        options = {"metrics": metrics, "compact": True}
        actual = from_hidden(loss, batch, 1.0, 0.8, **options, **batch.of_hidden)
        for place, expected in ((0, true[0]), (2, true[3]), (3, true[4])):
            near(actual[place], expected)


def test_metrics_of_parts_add_up(backend):
    loss = EXACT["ppo"]
    batch = ExactBatch(loss, dtype=single(backend.dtype))
    whole, parts = None, []
    for rows in (slice(None), slice(0, 1), slice(1, 4)):
        given = {name: x[rows] for name, x in batch.given.items()}
        out = loss.from_hidden(
            batch.hidden[rows], batch.weight, batch.ids[rows], batch.advantages[rows],
            ref_hidden=batch.ref_hidden[rows], ref_weight=batch.ref_weight, **given,
        )  # fmt: skip
        if whole is None:
            whole = out.metrics
        else:
            parts.append(out.metrics)
    joined = parts[0] + parts[1]
    torch.testing.assert_close(joined["kl"], whole["kl"], rtol=1e-6, atol=0)
    assert whole["kl"] > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["ppo", "gspo"])
def test_no_worse_than_eager_in_its_dtype(backend, name, dtype):
    if backend.dtype == torch.float64:
        pytest.skip("float64 has no 16-bit counterpart")
    loss = EXACT[name]
    batch = ExactBatch(loss, sequences=8, dtype=dtype)
    true = exact(loss, batch)
    theirs = []
    hidden, weight = (x.clone().requires_grad_() for x in (batch.hidden, batch.weight))
    logits = (hidden @ weight.t()).float()
    base = loss.replace(kl_coef=0.0, kl_estimator="k3")
    log_p = (logits / 0.8).log_softmax(-1)
    out = base(log_p.gather(-1, batch.ids[..., None]).squeeze(-1), batch.advantages, **batch.given)
    ref = (batch.ref_hidden @ batch.ref_weight.t()).float()
    kl = literal(logits, ref, temperature=0.8, mask=batch.given["mask"])
    (out.loss + COEF * aggregated(loss, batch, kl)).backward()
    theirs = (hidden.grad, weight.grad)

    def distance(value, truth):
        return ((value.double() - truth).norm() / truth.norm()).item()

    mine = from_hidden(loss, batch, 1.0, 0.8, **batch.of_hidden)[2:]
    also = from_logits(loss, batch, 1.0, 0.8, inplace=True, **batch.of_logits)[3:]
    for ours in (mine, also):
        for a, b, truth in zip(ours, theirs, true[3:], strict=True):
            # Each of the two gradients is rounded, and their sum: 3/4 of a rounding more.
            assert distance(a, truth) <= distance(b, truth) + 0.75 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ["ppo", "gspo"])
def test_what_masked_positions_hold_changes_nothing(backend, name):
    loss = EXACT[name]
    batch = ExactBatch(loss, dtype=single(backend.dtype))
    mask = batch.given["mask"]

    def both():
        return (
            *from_hidden(loss, batch, **batch.of_hidden),
            *from_logits(loss, batch, inplace=True, **batch.of_logits)[:3],
        )

    clean = both()
    batch.ref_hidden = batch.ref_hidden.masked_fill(~mask[..., None], NAN)
    assert all(torch.equal(a, b) for a, b in zip(clean, both(), strict=True))


@pytest.mark.parametrize("name", ["ppo", "gspo"])
def test_a_slice_of_the_logits_is_taken_where_it_lies(backend, name):
    loss = EXACT[name]
    batch = ExactBatch(loss, dtype=single(backend.dtype))
    ref = batch.of_logits["ref_logits"]
    plain = from_logits(loss, batch, ref_logits=ref)
    wide = torch.cat([ref, torch.full_like(ref[:, :1], NAN)], 1)[:, :-1]
    sliced = from_logits(loss, batch, ref_logits=wide, inplace=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, sliced, strict=True))


@pytest.mark.parametrize("entry", ["logits", "hidden"])
@pytest.mark.parametrize("name", ["ppo", "gspo"])
def test_compiles_checkpoints_and_repeats(backend, name, entry):
    if backend.name == "triton":
        pytest.skip("the interpreter cannot be traced")
    torch.compiler.reset()  # or the runs of one function count towards its limit
    loss = EXACT[name]
    batch = ExactBatch(loss, dtype=single(backend.dtype))

    def run(wrap):
        hidden = batch.hidden.clone().requires_grad_()

        def value(h):
            if entry == "hidden":
                return loss.from_hidden(
                    h, batch.weight, batch.ids, batch.advantages, memory_budget=1,
                    **batch.of_hidden, **batch.given,
                ).loss  # fmt: skip
            return loss.from_logits(
                h @ batch.weight.t(), batch.ids, batch.advantages, **batch.of_logits, **batch.given
            ).loss

        out = wrap(value)(hidden)
        return out.detach(), torch.autograd.grad(out, hidden)[0]

    plain = run(lambda f: f)
    for wrap in (
        lambda f: f,
        lambda f: lambda h: checkpoint(f, h, use_reentrant=False),
        lambda f: torch.compile(f, fullgraph=True, backend="aot_eager"),
    ):
        again = run(wrap)
        torch.testing.assert_close(again[0], plain[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(again[1], plain[1], rtol=1e-5, atol=1e-7)
    assert all(torch.equal(a, b) for a, b in zip(plain, run(lambda f: f), strict=True))


def test_in_place_is_told_to_other_uses(backend):
    for name in ("ppo", "gspo"):
        loss = EXACT[name]
        batch = ExactBatch(loss, dtype=single(backend.dtype))
        logits = batch.hidden.clone().requires_grad_() @ batch.weight.t()
        out = loss.from_logits(
            logits, batch.ids, batch.advantages, inplace=True, **batch.of_logits, **batch.given
        )
        out.loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="second one|modified by an inplace operation"):
            out.loss.backward()


@pytest.mark.parametrize("name", ["ppo", "gspo"])
def test_products(backend, name, monkeypatch):
    """Of N D V: logits, the reference's, hidden's gradient and the weight's."""
    if not backend.is_kernel:
        pytest.skip("eager PyTorch takes the gradient in the backward")
    loss = EXACT[name]
    batch = ExactBatch(loss)
    counted = []
    real = torch.mm

    def count(*args, **kwargs):
        counted.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "mm", count)
    hidden, weight = batch.hidden.requires_grad_(), batch.weight.requires_grad_()
    given = batch.of_hidden | batch.given
    loss.from_hidden(hidden, weight, batch.ids, batch.advantages, **given).loss.backward()
    assert len(counted) == 4


def test_autocast(backend):
    if backend.dtype == torch.float64:
        pytest.skip("autocast leaves float64 alone")
    loss = EXACT["ppo"]
    batch = ExactBatch(loss)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = from_hidden(loss, batch, **batch.of_hidden)
    names = ("hidden", "weight", "ref_hidden", "ref_weight")
    for name in names:
        setattr(batch, name, getattr(batch, name).bfloat16())
    half = from_hidden(loss, batch, **batch.of_hidden)
    assert torch.equal(mixed[0], half[0]) and mixed[2].dtype == torch.float32
    assert torch.equal(mixed[2].bfloat16(), half[2])


def test_opcheck(backend, monkeypatch):
    if not backend.is_kernel:
        pytest.skip("eager PyTorch has no operator of its own for these")

    def run():
        for name in ("ppo", "gspo"):
            batch = ExactBatch(EXACT[name])
            from_hidden(EXACT[name], batch, **batch.of_hidden)
            if name == "ppo":
                from_logits(EXACT[name], batch, **batch.of_logits)

    operators = ("policy_loss_logits", "policy_loss_hidden", "policy_loss_sequences")
    assert opcheck_all(monkeypatch, operators, run) == 3


def test_batch_invariant(backend):
    loss = EXACT["ppo"].replace(aggregation="token_sum")
    batch = ExactBatch(loss, sequences=6, length=40, vocab=307, dtype=single(backend.dtype))

    def grad(rows):
        hidden = batch.hidden[rows].clone().requires_grad_()
        given = {name: x[rows] for name, x in batch.given.items()}
        out = loss.from_hidden(
            hidden, batch.weight, batch.ids[rows], batch.advantages[rows], batch_invariant=True,
            memory_budget=1, ref_hidden=batch.ref_hidden[rows], ref_weight=batch.ref_weight,
            **given,
        )  # fmt: skip
        return torch.autograd.grad(out.loss, hidden)[0]

    whole = grad(slice(None))
    for rows in (slice(0, 1), slice(2, 5)):
        assert torch.equal(grad(rows), whole[rows])


REFUSED = [
    ({"kl_clamp": "openrlhf"}, "kl_clamp: expected None with kl_estimator 'exact'"),
    ({"kl_ratio_weighted": True}, "kl_ratio_weighted: expected False with kl_estimator 'exact'"),
    ({"kl_estimator": "exactly"}, "kl_estimator: expected one of .* did you mean 'exact'"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[m[:30] for _, m in REFUSED])
def test_construction_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        PolicyLoss(**{"kl_coef": 0.1, "kl_estimator": "exact"} | options)


X, IDS, A, W = torch.zeros(2, 3, 5), torch.zeros(2, 3).long(), torch.zeros(2), torch.zeros(7, 5)
LOSS, ESTIMATED = EXACT["ppo"], PolicyLoss(kl_coef=0.1)
CALLS = [
    (LOSS, {}, ValueError, "ref_{}: expected a tensor, since kl_coef is 0.2 and kl_estimator"),
    (LOSS, {"ref": X, "ref_logprobs": X[..., 0]}, ValueError, "ref_logprobs: expected None, since"),
    (ESTIMATED, {"ref": X, "ref_logprobs": X[..., 0]}, ValueError, "ref_{}: expected None, since"),
    (LOSS, {"ref": X[:1]}, ValueError, "ref_{}: expected shape"),
    (LOSS, {"ref": X.double()}, TypeError, "ref_.*: expected torch.float32"),
    (LOSS, {"ref": X.clone().requires_grad_()}, ValueError, "ref_{}: expected a tensor that needs"),
]


@pytest.mark.parametrize(("loss", "given", "error", "message"), CALLS, ids=range(len(CALLS)))
def test_calls_refuse(loss, given, error, message):
    given = dict(given)
    ref = given.pop("ref", None)
    with pytest.raises(error, match=message.format("logits")):
        loss.from_logits(X, IDS, A, ref_logits=ref, **given)
    weight = None if ref is None else W.to(ref.dtype)
    with pytest.raises(error, match=message.format("hidden")):
        loss.from_hidden(X, W, IDS, A, ref_hidden=ref, ref_weight=weight, **given)


def test_calls_refuse_what_is_theirs_alone():
    with pytest.raises(ValueError, match="kl_estimator: expected one of k1, .* got 'exact'"):
        LOSS(X[..., 0], A)
    with pytest.raises(ValueError, match="ref_weight: expected a tensor, since ref_hidden is"):
        LOSS.from_hidden(X, W, IDS, A, ref_hidden=X)
    with pytest.raises(ValueError, match="ref_bias: expected None, since there is no ref_hidden"):
        ESTIMATED.from_hidden(X, W, IDS, A, ref_logprobs=X[..., 0], ref_bias=W[:, 0])
    with pytest.raises(ValueError, match=r"ref_weight: expected 7 rows .weight's vocabulary"):
        LOSS.from_hidden(X, W, IDS, A, ref_hidden=X, ref_weight=W[:-1])


def test_presets_that_are_separable_form_one_gradient(backend):
    """Of all logits only one gradient is in memory, whatever the loss adds up."""
    if backend.name != "native":
        pytest.skip("the finished gradient is the CPU kernels'")
    for name in SEPARABLE[:2]:
        batch = ExactBatch(EXACT[name])
        logits = (batch.hidden @ batch.weight.t()).requires_grad_()
        out = EXACT[name].from_logits(
            logits, batch.ids, batch.advantages, **batch.of_logits, **batch.given
        )
        held = {x.data_ptr() for x in out.loss.grad_fn.saved_tensors}
        assert torch.autograd.grad(out.loss, logits)[0].data_ptr() in held


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("preset", ["grpo", "gspo"])
def test_a_reference_that_is_only_measured_stays_out_of_the_gradient(preset, inplace):
    """NaN in it and all, and whatever its strides are."""
    loss = PolicyLoss.preset(preset, kl_estimator="exact", kl_coef=0.0)
    logits = torch.randn(2, 3, 5, requires_grad=True)
    ids, advantages = torch.randint(5, (2, 3)), torch.tensor([1.0, -1.0])
    ref = torch.randn(2, 5, 3).transpose(1, 2)
    ref[0, 1, 2] = torch.nan
    out = loss.from_logits(logits * 1, ids, advantages, ref_logits=ref, inplace=inplace)
    out.loss.backward()
    assert out.metrics["kl"].isnan() and logits.grad.isfinite().all()
    assert logits.grad.abs().sum() > 0

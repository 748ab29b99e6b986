"""PolicyLoss at the edges: garbage, overflow, size, strides, and inside PyTorch."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from batches import RTOL, call, close, pack, random_batch, used_by

import rlkern
from rlkern import PolicyLoss, _schema
from rlkern.losses import PRESETS, RolloutCorrection
from rlkern.ops.policy_loss import options
from rlkern.reference.aggregation import Denominators

EVERYTHING = {
    "entropy_coef": 0.1,
    "kl_coef": 0.1,
    "off_policy_threshold": 0.05,
    "correction": RolloutCorrection(high=1.5),
}


def needed(loss):
    return {"normalizer": 37.0} if loss.aggregation == "seq_mean_token_sum_norm" else {}


def same(a, b):
    """Bitwise, NaN included."""
    return torch.equal(torch.nan_to_num(a, nan=12345.0), torch.nan_to_num(b, nan=12345.0))


def assert_same(a, b):
    assert same(a.loss, b.loss) and same(a.grad, b.grad)
    assert a.entropy_grad is None or same(a.entropy_grad, b.entropy_grad)
    assert same(a.metrics.vector, b.metrics.vector)


# ---- garbage and overflow -------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("per_token", [False, True], ids=["A[B]", "A[B,T]"])
@pytest.mark.parametrize("preset", PRESETS)
def test_garbage_under_the_mask_changes_nothing(backend, preset, per_token, packed):
    loss = PolicyLoss.preset(preset, **EVERYTHING)
    batch = random_batch(5, 9, per_token=per_token)
    batch["rollout_logprobs"] = batch["old_logprobs"] + 0.1
    if packed:
        batch, _ = pack(batch)
    clean = call(loss, batch, backend.dtype, **needed(loss))
    counts = batch["mask"]
    for garbage in (math.nan, math.inf, -math.inf, -200.0):
        dirty = {
            name: torch.where(counts, x, garbage)
            if x.is_floating_point() and x.shape == counts.shape
            else x
            for name, x in batch.items()
        }
        dirty["entropy_mask"] = batch["entropy_mask"] | ~counts
        if not per_token:
            empty = torch.zeros(5, dtype=torch.bool)
            empty[1] = True  # the sequence that counts no token
            dirty["advantages"] = torch.where(empty, garbage, batch["advantages"])
        assert_same(call(loss, dirty, backend.dtype, **needed(loss)), clean)


LEVELS = [("clip", level) for level in ("token", "sequence", "sequence_token", "sequence_sum")]
LEVELS += [("cispo", "token"), ("cispo", "sequence"), ("sapo", "token"), ("sapo", "sequence_sum")]
LEVELS += [(name, "token") for name in ("gmpo", "vespo", "dppo_tv", "dppo_kl", "reinforce")]


KLS = {"none": {}, "k3": {"kl_coef": 0.1, "kl_clamp": "verl"}}
KLS["weighted"] = KLS["k3"] | {"kl_ratio_weighted": True}


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("bound", [20.0, None], ids=["clamp 20", "no clamp"])
@pytest.mark.parametrize(("surrogate", "level"), LEVELS)
def test_log_ratios_of_1000_give_no_nan(backend, surrogate, level, bound, kl):
    finite = level == "token" and bound is not None and surrogate != "gmpo"
    if kl == "weighted" and not finite:
        pytest.skip("where r overflows, a KL times r and the policy term are inf - inf")
    more = {"dual_clip": 3.0, "ratio_cap": 4.0} if surrogate == "clip" and bound else {}
    loss = PolicyLoss(
        surrogate=surrogate,
        ratio_level=level,
        log_ratio_clamp=bound,
        aggregation="seq_mean_token_mean" if surrogate == "gmpo" else "token_mean",
        off_policy_threshold=0.1 if bound else None,
        **KLS[kl],
        **more,
    )
    values = (-1.0, -1001.0)
    # One sequence at a time: over several, inf - inf is NaN, as the formula has it.
    for logp, old, A, ref in itertools.product(values, values, (0.0, 1.0, -1.0), values):
        for others in (-1.0, logp):  # one such token, or all
            batch = {
                "logprobs": torch.tensor([[logp, others, others]]),
                "advantages": torch.tensor([A]),
                "old_logprobs": torch.tensor([[old, *([-1.0] if others == -1 else [old]) * 2]]),
                "ref_logprobs": torch.tensor([[ref, others, others]]),
            }
            called = call(loss, batch, backend.dtype)
            what = (logp, old, A, ref, others)
            assert not called.loss.isnan() and not called.grad.isnan().any(), what
            assert not called.metrics.vector.isnan().any(), what
            assert not any(map(math.isnan, called.metrics.item_dict().values())), what
            if finite:
                assert called.loss.isfinite() and called.grad.isfinite().all(), what
            if A == 0 and kl == "none":
                assert called.loss == 0 and not called.grad.any(), what


def test_a_clipped_branch_that_overflows_has_gradient_zero(backend):
    """r = e^1000 = inf; with A > 0 the clipped branch is taken: a finite loss, no gradient."""
    loss = PolicyLoss(log_ratio_clamp=None)
    batch = {
        "logprobs": torch.tensor([[-1.0]]),
        "old_logprobs": torch.tensor([[-1001.0]]),
        "advantages": torch.tensor([2.0]),
    }
    called = call(loss, batch, backend.dtype)
    assert called.loss.item() == pytest.approx(-2.4) and called.grad.item() == 0


# ---- determinism and independence -----------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_the_same_call_twice_is_bitwise_equal(backend, preset, poisoned):
    loss = PolicyLoss.preset(preset, **EVERYTHING)
    batch = random_batch(7, 133, spread=0.05)
    first = call(loss, batch, backend.dtype, **needed(loss))
    poisoned(4 * batch["logprobs"].numel())
    assert_same(call(loss, batch, backend.dtype, **needed(loss)), first)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"gmpo"}))
def test_a_sequence_does_not_feel_its_neighbours(backend, preset, packed):
    loss = PolicyLoss.preset(preset, kl_coef=0.1, aggregation="token_sum")
    batch = used_by(loss, random_batch(6, 75, spread=0.05))
    batch["mask"][2] = True

    def third(batch):
        given = batch
        if packed:
            given, keep = pack(batch)
        grad = call(loss, given, backend.dtype).grad
        if packed:
            grad = torch.zeros(keep.shape, dtype=backend.dtype).masked_scatter(keep, grad)
        return grad

    def rows(*which):
        return {n: x[list(which)] for n, x in batch.items()}

    together, alone, moved = third(batch)[2], third(rows(2))[0], third(rows(5, 4, 3, 2))[3]
    if backend.is_kernel:
        assert torch.equal(together, alone) and torch.equal(together, moved)
        return
    # PyTorch's loops take the last few elements of a tensor by other instructions: an ulp of exp
    # and one of the quotient after it.
    rtol = 4 * torch.finfo(backend.dtype).eps
    for other in (alone, moved):
        torch.testing.assert_close(together, other, rtol=rtol, atol=rtol)


# ---- size and strides -----------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["dapo", "gspo", "gmpo", "vespo"])
def test_a_million_tokens_in_one_sequence(backend, preset):
    if backend.name == "triton":
        pytest.skip("the interpreter takes minutes for a million tokens")
    T = 1_000_000
    loss = PolicyLoss.preset(preset)
    logprobs = -torch.rand(1, T)
    batch = {
        "logprobs": logprobs,
        "advantages": torch.tensor([1.5]),
        "old_logprobs": logprobs + 1e-4 * torch.randn(1, T),
        "mask": torch.rand(1, T) < 0.9,
    }
    exact = call(loss, batch, torch.float64) if backend.name == "eager" else None
    if exact is None:
        with rlkern.use_backend("eager"):
            exact = call(loss, batch, torch.float64)
    called = call(loss, batch, backend.dtype)
    # vespo's weight depends on a sum of a million log-ratios.
    rtol = 1e-3 if preset == "vespo" else 10 * RTOL[torch.float32]
    close(called.loss, exact.loss, rtol)
    close(called.grad, exact.grad, rtol)
    assert called.metrics["tokens"] == batch["mask"].sum()


@pytest.mark.parametrize("preset", ["grpo", "gspo", "gmpo"])
def test_a_hundred_thousand_short_sequences(backend, preset):
    if backend.name == "triton":
        pytest.skip("the interpreter takes minutes for 100,000 sequences")
    B = 100_000
    lengths = torch.randint(0, 6, (B,))
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()
    total = int(cu_seqlens[-1])
    loss = PolicyLoss.preset(preset, kl_coef=0.04)
    logprobs = -torch.rand(total)
    batch = {
        "logprobs": logprobs,
        "advantages": torch.randn(B),
        "old_logprobs": logprobs + 0.1 * torch.randn(total),
        "ref_logprobs": logprobs + 0.1 * torch.randn(total),
        "cu_seqlens": cu_seqlens,
    }
    called = call(loss, batch, backend.dtype)
    with rlkern.use_backend("eager"):
        exact = call(loss, batch, torch.float64)
    close(called.grad, exact.grad, 2e-5)
    assert called.loss.item() == pytest.approx(exact.loss.item(), abs=1e-5)
    assert called.metrics["sequences"] == B and called.metrics["tokens"] == total


@pytest.mark.parametrize("preset", ["grpo", "gspo", "gmpo", "vespo"])
def test_strided_views(backend, preset):
    loss = PolicyLoss.preset(preset, **EVERYTHING)
    batch = random_batch(5, 9)
    plain = call(loss, batch, backend.dtype)

    def between(x):  # every second column of a wider tensor
        wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]

    def transposed(x):
        return x.t().contiguous().t() if x.dim() == 2 else x

    def rows_apart(x):
        wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), True if x.dtype == torch.bool else 9.0,
                          dtype=x.dtype)  # fmt: skip
        wide[..., 1:-2] = x
        return wide[..., 1:-2]

    for view in (between, transposed, rows_apart):
        views = {name: view(x) for name, x in batch.items()}
        assert_same(call(loss, views, backend.dtype), plain)
    # One row for all: stride 0.
    row = {n: x[:1] for n, x in batch.items()}
    expanded = {n: x.expand(3, *x.shape[1:]) for n, x in row.items()}
    copied = {n: x.contiguous() for n, x in expanded.items()}
    assert_same(call(loss, expanded, backend.dtype), call(loss, copied, backend.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_widened(backend, dtype):
    if backend.dtype == torch.float64:
        pytest.skip("16-bit inputs are computed in fp32")
    loss = PolicyLoss.preset("grpo", **EVERYTHING)
    batch = random_batch(5, 9)
    narrow = {n: x.to(dtype) if x.is_floating_point() else x for n, x in batch.items()}
    logprobs = narrow.pop("logprobs").requires_grad_()
    value, metrics = loss(logprobs, narrow.pop("advantages"), **narrow)
    value.backward()
    widened = {n: x.to(dtype) if x.is_floating_point() else x for n, x in batch.items()}
    expected = call(loss, {n: x.float() if x.is_floating_point() else x
                           for n, x in widened.items()})  # fmt: skip
    assert value.dtype == torch.float32 and logprobs.grad.dtype == dtype
    assert torch.equal(value, expected.loss) and same(metrics.vector, expected.metrics.vector)
    assert torch.equal(logprobs.grad, expected.grad.to(dtype))


# ---- inside PyTorch -------------------------------------------------------------------------


def example(loss, dtype=torch.float32, **shape):
    batch = {
        n: x.to(dtype) if x.is_floating_point() else x
        for n, x in used_by(loss, random_batch(4, 5, **shape)).items()
    }
    return batch.pop("logprobs").requires_grad_(), batch.pop("advantages"), batch


def test_without_gradients_there_is_no_graph(backend):
    loss = PolicyLoss.preset("grpo")
    logprobs, advantages, rest = example(loss, backend.dtype)
    with torch.no_grad():
        out = loss(logprobs, advantages, **rest)
    assert out.loss.grad_fn is None and not out.loss.requires_grad
    detached = loss(logprobs.detach(), advantages, **rest)
    assert not detached.loss.requires_grad and same(detached.metrics.vector, out.metrics.vector)
    graph = loss(logprobs, advantages, **rest)
    assert graph.loss.requires_grad and not graph.metrics.vector.requires_grad
    assert torch.equal(graph.loss, out.loss) and torch.equal(detached.loss, out.loss)


def test_only_the_entropy_needs_a_gradient(backend):
    loss = PolicyLoss(entropy_coef=0.5)
    logprobs, advantages, rest = example(loss, backend.dtype, seed=1)
    rest["entropy"].requires_grad_()
    loss(logprobs.detach(), advantages, **rest).loss.backward()
    chosen = rest["entropy_mask"] & rest["mask"]
    assert chosen.any()
    close(rest["entropy"].grad, -0.5 * chosen / chosen.sum(), 1e-6)


@pytest.mark.parametrize(
    ("surrogate", "level"), [("clip", "token"), ("clip", "sequence"), ("clip", "sequence_sum"),
                             ("sapo", "token"), ("sapo", "sequence"), ("gmpo", "token")]
)  # fmt: skip
def test_gradcheck(surrogate, level):
    """Where the loss is its gradient's integral: no stopped gradient."""
    aggregation = "seq_mean_token_mean" if surrogate == "gmpo" else "token_mean"
    loss = PolicyLoss(surrogate=surrogate, ratio_level=level, aggregation=aggregation,
                      kl_coef=0.1, kl_ratio_weighted=True, entropy_coef=0.1)  # fmt: skip
    logprobs, advantages, rest = example(loss, torch.float64)
    entropy = rest.pop("entropy").requires_grad_()
    torch.autograd.gradcheck(
        lambda x, h: loss(x, advantages, entropy=h, **rest).loss, (logprobs, entropy)
    )


def test_second_derivatives_raise(backend):
    loss = PolicyLoss.preset("grpo")
    logprobs, advantages, rest = example(loss, backend.dtype)
    value = loss(logprobs, advantages, **rest).loss
    # At once: a gradient without a graph would be left out of a penalty in silence.
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(value, logprobs, create_graph=True)


@pytest.mark.parametrize("preset", ["ppo", "gspo", "gmpo", "vespo"])
def test_compiled_as_one_graph_equals_eager(backend, preset):
    loss = PolicyLoss.preset(preset, entropy_coef=0.1)
    logprobs, advantages, rest = example(loss, backend.dtype)

    def step(logprobs, advantages, **rest):
        value, metrics = loss(logprobs * 1.0, advantages, **rest)
        return value, metrics["ratio_max"], metrics["entropy"]

    expected = step(logprobs, advantages, **rest)
    (grad,) = torch.autograd.grad(expected[0], logprobs)
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(
        logprobs, advantages, **rest
    )
    (compiled_grad,) = torch.autograd.grad(compiled[0], logprobs)
    for a, b in zip(compiled, expected, strict=True):
        close(a, b.detach(), RTOL[backend.dtype])
    close(compiled_grad, grad, RTOL[backend.dtype])


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_opcheck(backend, packed):
    if not backend.is_kernel:
        pytest.skip("eager is the definition itself and has no operator")
    op = getattr(torch.ops.rlkern, _schema.operator_name("policy_loss", backend.name)).default
    for preset in ("grpo", "gspo", "gmpo"):
        loss = PolicyLoss.preset(preset, **EVERYTHING)
        batch = random_batch(4, 5)
        offsets = None
        if packed:
            batch, _ = pack(batch)
            offsets = batch.pop("cu_seqlens").long()
        names = ("logprobs", "advantages", "mask", "old_logprobs", "ref_logprobs")
        names += ("rollout_logprobs", "entropy", "token_weights", "entropy_mask")
        tensors = [batch[name] for name in names]
        tensors[0].requires_grad_()
        tensors[6].requires_grad_()
        given = (None, None, None)
        numbers = options(loss, Denominators())
        torch.library.opcheck(op, (*tensors, offsets, *given, numbers, True, True))


def test_an_upstream_gradient_scales(backend):
    loss = PolicyLoss.preset("dapo", entropy_coef=0.1)
    logprobs, advantages, rest = example(loss, backend.dtype)
    value = loss(logprobs, advantages, **rest).loss
    (one,) = torch.autograd.grad(value, logprobs, retain_graph=True)
    (three,) = torch.autograd.grad(value * 3, logprobs)
    close(three, 3 * one, RTOL[backend.dtype])


@pytest.mark.parametrize("preset", ["dapo", "grpo", "gspo", "dr_grpo", "cispo", "gmpo"])
def test_micro_batches_with_global_denominators_equal_the_joined_batch(backend, preset):
    loss = PolicyLoss.preset(preset, entropy_coef=0.1, kl_coef=0.1)
    batch = used_by(loss, random_batch(8, 9))
    tokens, chosen = batch["mask"].sum(), (batch["mask"] & batch["entropy_mask"]).sum()
    given = {"entropy_normalizer": chosen.double()}
    if loss.aggregation == "token_mean":
        given["normalizer"] = tokens.double()
    else:
        given["num_sequences"] = 8
    joined = call(loss, batch, backend.dtype, **given | needed(loss))
    parts = [
        call(loss, {n: x[rows] for n, x in batch.items()}, backend.dtype, **given | needed(loss))
        for rows in (slice(0, 3), slice(3, 4), slice(4, 8))
    ]
    close(sum(p.loss for p in parts), joined.loss, 10 * RTOL[backend.dtype])
    close(torch.cat([p.grad for p in parts]), joined.grad, RTOL[backend.dtype])
    close(torch.cat([p.entropy_grad for p in parts]), joined.entropy_grad, RTOL[backend.dtype])

"""The policy loss's CUDA kernels, run on the CPU, against eager PyTorch in float64.

A block has 32 threads here and 256 on a GPU, and a thread's chain is 32 tokens, so that a sequence
of more than 1024 tokens has several chains. tests/losses/batches.py derives 1.5e-6 of a term's size
and 2e-6 for the chains. Here results are judged without the size of the terms that they cancel
from, and a sequence's ratio carries the error of a whole summed log-ratio, so that 1e-5 is allowed:
of one plus the result, and of the largest gradient.
"""

from __future__ import annotations

import itertools
import math
import random
import sys
from pathlib import Path

import pytest
import torch
from emulated_kernels import why_not
from emulated_policy import emulated_policy

from rlkern import PolicyLoss
from rlkern.losses import PRESETS, RolloutCorrection
from rlkern.ops import policy_loss as operator

sys.path.append(str(Path(__file__).parents[1] / "losses"))
from batches import call, call_packed, close, random_batch, used_by  # noqa: E402

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())
TOLERANCE = 1e-5
LAYOUTS = {"padded": call, "packed": call_packed}
CASES = 160
MASKABLE = ("logprobs", "old_logprobs", "ref_logprobs", "rollout_logprobs", "entropy")


@pytest.fixture(scope="module")
def built():
    return emulated_policy()


@pytest.fixture
def kernels(built, monkeypatch):
    """PolicyLoss runs on them in fp32."""
    built.threads = built.finish_threads = 32
    built.max_blocks = 2**31 - 1
    built.calls = 0
    built.serve(monkeypatch)
    yield built
    assert built.calls, "the test went past the kernels"


def near(actual, expected, message):
    if math.isnan(expected):
        assert math.isnan(actual), message
    elif actual != expected:  # infinities
        error = abs(actual - expected)
        assert error <= TOLERANCE * (1 + abs(expected)), (*message, actual, expected)


def compare(actual, expected, message=""):
    """Two results of batches.call."""
    near(float(actual.loss), float(expected.loss), (message, "loss"))
    close(actual.grad, expected.grad, TOLERANCE, f"{message} gradient ")
    assert (actual.entropy_grad is None) == (expected.entropy_grad is None)
    if actual.entropy_grad is not None:
        close(actual.entropy_grad, expected.entropy_grad, 4e-6, f"{message} entropy gradient ")
    found, wanted = actual.metrics.item_dict(), expected.metrics.item_dict()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        near(found[name], value, (message, name))


def check(loss, batch, layout="padded", message="", **given):
    batch = used_by(loss, batch)
    actual = LAYOUTS[layout](loss, batch, torch.float32, **given)
    compare(actual, LAYOUTS[layout](loss, batch, torch.float64, **given), message)
    return actual


def needed(loss):
    return {"normalizer": 37.0} if loss.aggregation == "seq_mean_token_sum_norm" else {}


def garbage(batch, value):
    """The batch with `value` wherever a token does not count."""
    masked = ~batch["mask"]
    return {n: x.masked_fill(masked, value) if n in MASKABLE else x for n, x in batch.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per_token", [False, True], ids=["A[B]", "A[B,T]"])
@pytest.mark.parametrize("preset", PRESETS)
def test_presets(kernels, preset, per_token, layout):
    loss = PolicyLoss.preset(preset)
    batch = random_batch(5, 45, per_token=per_token, seed=len(preset))
    del batch["token_weights"], batch["rollout_logprobs"]
    check(loss, batch, layout, preset, **needed(loss))


def random_case(rng, seed):
    surrogates = ["clip"] * 3 + list(operator.SURROGATES)
    fields = {"surrogate": rng.choice(surrogates)}
    surrogate = fields["surrogate"]
    if surrogate in ("clip", "cispo", "sapo"):
        fields["ratio_level"] = rng.choice(operator.RATIO_LEVELS)
    aggregations = [a for a in operator.AGGREGATIONS if surrogate != "gmpo"]
    fields["aggregation"] = rng.choice(aggregations or ["seq_mean_token_mean"])

    def sometimes(share=0.3, **more):
        if rng.random() < share:
            fields.update(more)

    if surrogate == "clip":
        sometimes(dual_clip=3.0)
        sometimes(ratio_cap=2.0)
    fields["kl_estimator"] = rng.choice(operator.ESTIMATORS)
    clamps = [None, "openrlhf"] + (["verl"] if fields["kl_estimator"].startswith("k3") else [])
    fields["kl_clamp"] = rng.choice(clamps)
    sometimes(kl_coef=0.1, kl_ratio_weighted=rng.random() < 0.5)
    sometimes(entropy_coef=0.01, entropy_aggregation=rng.choice(["token_mean", "same"]))
    sometimes(off_policy_threshold=0.05)
    level = "token" if surrogate == "vespo" else rng.choice(operator.CORRECTION_LEVELS)
    mode, low = rng.choice(operator.CORRECTION_MODES), rng.choice([None, 0.5])
    sometimes(correction=RolloutCorrection(level=level, mode=mode, low=low, high=2.0))
    if fields["aggregation"].startswith("seq_mean"):
        sometimes(skip_empty=True)
    loss = PolicyLoss(**fields)

    B, T = rng.choice([1, 2, 5]), rng.choice([1, 5, 33, 70])
    batch = random_batch(B, T, per_token=rng.random() < 0.5, seed=seed)
    if rng.random() < 0.1:
        batch["mask"][:] = False
    if rng.random() < 0.2:
        del batch["mask"]
    else:
        batch = garbage(batch, rng.choice([math.nan, math.inf, -200.0]))
    for name, use in (("old_logprobs", 0.8), ("token_weights", 0.3), ("entropy_mask", 0.5)):
        if rng.random() > use:
            del batch[name]
    if not loss.kl_coef and rng.random() < 0.5:
        del batch["ref_logprobs"]
    if not loss.entropy_coef and rng.random() < 0.5:
        del batch["entropy"]
    given = needed(loss)
    if loss.aggregation == "token_mean" and rng.random() < 0.3:
        given["normalizer"] = rng.choice([7.0, torch.tensor(11)])
    if loss.aggregation.startswith("seq_mean") and not loss.skip_empty and rng.random() < 0.3:
        given["num_sequences"] = rng.choice([3.0, torch.tensor(4)])
    if loss.entropy_coef and loss.entropy_aggregation == "token_mean" and rng.random() < 0.3:
        given["entropy_normalizer"] = torch.tensor(13)
    return loss, batch, given


@pytest.mark.parametrize("part", range(4))
def test_random_options(kernels, part):
    """Of every surrogate, option and argument, with garbage under the mask."""
    rng = random.Random(part)
    for seed in range(CASES // 4):
        loss, batch, given = random_case(rng, 1000 * part + seed)
        layout = rng.choice(["padded", "packed"] if "mask" in batch else ["padded"])
        kernels.max_blocks = rng.choice([1, 2, 2**31 - 1])
        check(loss, batch, layout, f"{part}:{seed} {loss} {layout}", **given)


@pytest.mark.parametrize("preset", ["dapo", "grpo", "gspo", "gmpo"])
def test_several_chains_and_warps(kernels, preset):
    """More tokens than a chain of every thread; 64 threads, and the totals added by two warps."""
    kernels.threads = kernels.finish_threads = 64
    loss = PolicyLoss.preset(preset)
    batch = random_batch(3, 64 * kernels.module.CHAIN + 77, seed=1)
    del batch["token_weights"], batch["rollout_logprobs"]
    check(loss, batch, message=preset)


def test_the_block_of_a_gpu(kernels):
    kernels.threads = 256
    loss = PolicyLoss.preset("gspo")
    batch = random_batch(2, 600, seed=2)
    del batch["token_weights"], batch["rollout_logprobs"]
    check(loss, batch)


@pytest.mark.parametrize("preset", PRESETS)
def test_garbage_under_the_mask_changes_nothing(kernels, preset):
    loss = PolicyLoss.preset(preset)
    batch = used_by(loss, random_batch(3, 20, seed=3))
    results = [
        call(loss, garbage(batch, value), **needed(loss))
        for value in (0.0, math.nan, math.inf, -200.0)
    ]
    for other in results[1:]:
        assert torch.equal(results[0].loss, other.loss)
        assert torch.equal(results[0].grad, other.grad)
        assert repr(results[0].metrics.item_dict()) == repr(other.metrics.item_dict())


@pytest.mark.parametrize("preset", PRESETS)
def test_log_ratios_of_a_thousand_give_no_nan(kernels, preset):
    loss = PolicyLoss.preset(preset)
    batch = used_by(loss, random_batch(2, 6, seed=4, empty=False))
    batch["old_logprobs"] = batch["logprobs"] + torch.tensor([[1000.0], [-1000.0]])
    called = call(loss, batch, **needed(loss))
    assert not called.loss.isnan() and not called.grad.isnan().any()


def test_the_same_call_twice_and_a_sequence_alone(kernels):
    loss = PolicyLoss.preset("gspo", kl_coef=0.1, aggregation="seq_mean_token_sum")
    batch = used_by(loss, random_batch(4, 50, seed=5))
    first, again = call(loss, batch), call(loss, batch)
    assert torch.equal(first.loss, again.loss) and torch.equal(first.grad, again.grad)
    assert first.metrics.item_dict() == again.metrics.item_dict()
    alone = call(loss, {n: x[2:3] for n, x in batch.items()}, num_sequences=4.0)
    assert torch.equal(first.grad[2:3], alone.grad)
    moved = {n: x.flip(0) for n, x in batch.items()}
    assert torch.equal(call(loss, moved).grad, first.grad.flip(0))


def test_rows_with_a_stride(kernels):
    loss = PolicyLoss.preset("grpo", entropy_coef=0.1)
    batch = random_batch(3, 40, seed=6)
    apart = {n: x[:, 3:31] if x.dim() == 2 else x for n, x in batch.items()}
    together = {n: x.contiguous() for n, x in apart.items()}
    first, second = (call(loss, used_by(loss, b)) for b in (apart, together))
    assert torch.equal(first.grad, second.grad) and torch.equal(first.loss, second.loss)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (1, 1), (300, 1)], ids=str)
@pytest.mark.parametrize("preset", ["dapo", "gspo", "gmpo", "vespo", "grpo"])
def test_no_sequences_no_tokens_and_many(kernels, preset, shape):
    loss = PolicyLoss.preset(preset)
    B, T = shape
    batch = random_batch(B, max(T, 1), seed=7, empty=False)
    batch = {n: x[:, :T] if x.dim() == 2 else x for n, x in batch.items()}
    del batch["token_weights"], batch["rollout_logprobs"]
    check(loss, batch)


def test_packed_sequences_of_every_length(kernels):
    sizes = [0, 1, 40, 0, 0, 3, 100, 0]
    total = sum(sizes)
    loss = PolicyLoss.preset("gspo")
    batch = {n: x[0] for n, x in random_batch(1, total, per_token=True, seed=8).items()}
    for name in ("mask", "token_weights", "rollout_logprobs", "entropy_mask", "entropy"):
        del batch[name]
    batch["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)
    for skip_empty in (False, True):
        sometimes = loss.replace(skip_empty=skip_empty)
        compare(call(sometimes, batch), call(sometimes, batch, torch.float64))


@pytest.mark.parametrize(
    "offsets",
    [
        [0, -5, 7, 12],
        [0, 9, 5, 12],
        [0, 5, 9, 13],
        [1, 5, 9, 12],
        [0, 5, 9, 11],
        [2**62, -(2**62), 2**62, -1],
    ],
    ids=str,
)
def test_wrong_offsets_read_nothing_outside_and_show(kernels, offsets):
    """No value of a GPU tensor can be checked without waiting for it. What lies around the tensors
    is left alone (the address sanitizer sees to that), and the result is NaN."""
    loss = PolicyLoss.preset("gspo")
    options = operator.options(loss, operator.Denominators(None, None, None))
    args = [torch.randn(12), torch.randn(12), None, torch.randn(12), *[None] * 5]
    args += [torch.tensor(offsets), None, None, None, options, True, False]
    out = kernels.forward(*args)
    assert out[0].isnan() and out[4].isnan().all()
    grad, _ = kernels.backward(torch.tensor(1.0), *out[2:])
    assert grad.isnan().all()
    args[9] = torch.tensor([0, 4, 8, 12])
    assert all(t.isfinite().all() for t in kernels.forward(*args))


@pytest.mark.parametrize("sizes", [(0, 0), (1, 0), (0, 5), (7, 7), (128, 131), (300, 1)], ids=str)
@pytest.mark.parametrize("shift", [0, 1])
def test_backward(kernels, sizes, shift):
    """Of both gradients at any alignment, in several grids."""
    kernels.max_blocks = 1
    grads = [torch.randn(n + shift)[shift:] for n in sizes]
    scale, upstream = torch.randn(2), torch.randn(())
    out = kernels.backward(upstream, *grads, scale)
    kernels.calls += 1
    for i in range(2):
        assert torch.equal(out[i], grads[i] * (upstream * scale[i]))

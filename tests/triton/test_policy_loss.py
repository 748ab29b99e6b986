"""policy_loss in Triton against float64: on a GPU, or in Triton's interpreter.

Tolerance. d = logp - old is rounded to |d| 2^-24, which exp turns into a relative error, 2e-7 at
the |d| <= 3 of these batches; exp, expm1 and log add 3e-7 each, some ten products and quotients
half an ulp each, a fp32 sum 16 steps of a lane and 10 levels of lanes, half an ulp each: 4e-6.
"""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton_device import DEVICE, INTERPRETED, MARKS, on_gpu  # noqa: E402

import rlkern  # noqa: E402
from rlkern import PolicyLoss, RolloutCorrection  # noqa: E402
from rlkern.losses import PRESETS  # noqa: E402
from rlkern.ops.policy_loss import options  # noqa: E402
from rlkern.reference.aggregation import Denominators  # noqa: E402
from rlkern.reference.policy_loss import Batch  # noqa: E402
from rlkern.triton._math import exp_and_expm1, expm1_less  # noqa: E402

pytestmark = MARKS

INF, NAN = math.inf, math.nan
TOLERANCE = 4e-6
PER_TOKEN = ("old_logprobs", "ref_logprobs", "rollout_logprobs", "entropy", "token_weights")


def moved(value, dtype):
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(DEVICE, dtype if value.is_floating_point() and value.dim() else None)


def run(loss, batch, backend="triton", dtype=torch.float32):
    """Loss, gradients for an upstream of 1.5, the metrics' vector."""
    batch = {name: moved(value, dtype) for name, value in batch.items()}
    leaves = [batch["logprobs"].detach().requires_grad_()]
    batch["logprobs"] = leaves[0]
    if loss.entropy_coef:
        leaves.append(batch["entropy"].detach().requires_grad_())
        batch["entropy"] = leaves[1]
    with rlkern.use_backend(backend):
        out = loss(batch.pop("logprobs"), batch.pop("advantages"), **batch)
    return out.loss.detach(), *torch.autograd.grad(out.loss * 1.5, leaves), out.metrics.vector


def check(loss, batch, tolerance=TOLERANCE):
    """Against float64 eager; returns what Triton computed."""
    actual = run(loss, batch)
    assert actual[0].dtype == torch.float32
    for got, wanted in zip(actual, run(loss, batch, "eager", torch.float64), strict=True):
        got = got.double()
        same = (got == wanted) | (got.isnan() & wanted.isnan())
        error = torch.where(same, 0.0, (got - wanted).abs() / (1 + wanted.abs()))
        assert (error <= tolerance).all(), (loss, error.max(), got, wanted)
    return actual


def random_batch(loss, *, B=3, T=37, packed=False, one_advantage=True, masked=0.7, garbage=NAN):
    """What a loss takes, garbage where the mask is false; packed with an empty sequence."""
    shape = (B, T)
    batch = {}
    if packed:
        lengths = [random.choice([0, 1, T]) for _ in range(B)]
        batch["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        shape = (sum(lengths),)
    logprobs = -torch.rand(shape) * 3
    batch["old_logprobs"] = logprobs + 0.3 * torch.randn(shape)
    if loss.kl_coef:
        batch["ref_logprobs"] = logprobs + 0.5 * torch.randn(shape)
    if loss.correction or loss.off_policy_threshold is not None:
        rollout = logprobs + 0.3 * torch.randn(shape)
        batch["rollout_logprobs"] = torch.where(torch.rand(shape) < 0.1, NAN, rollout)
    if loss.entropy_coef:
        batch["entropy"] = torch.rand(shape)
    batch["mask"] = torch.rand(shape) < masked
    advantages = torch.randn(B if one_advantage else shape)
    batch["advantages"] = torch.where(torch.rand(advantages.shape) < 0.1, 0.0, advantages)
    batch["logprobs"] = logprobs
    for name in ("logprobs", *PER_TOKEN):
        if name in batch:
            batch[name] = torch.where(batch["mask"], batch[name], garbage)
    if loss.aggregation == "seq_mean_token_sum_norm":
        batch["normalizer"] = 7.0
    return batch


def random_loss():
    pick = random.choice
    chance = random.random
    surrogate = pick(
        ["clip", "clip", *sorted({p.get("surrogate", "clip") for p in PRESETS.values()})]
    )
    fields = {"surrogate": surrogate}
    if surrogate in ("clip", "cispo", "sapo"):
        fields["ratio_level"] = pick(["token", "sequence", "sequence_token", "sequence_sum"])
    if surrogate == "clip":
        fields["dual_clip"] = pick([None, None, 3.0])
        fields["ratio_cap"] = pick([None, None, 2.0, 1.1])
    fields["aggregation"] = (
        "seq_mean_token_mean"
        if surrogate == "gmpo"
        else pick(
            [
                "token_mean",
                "token_sum",
                "seq_mean_token_mean",
                "seq_mean_token_sum",
                "seq_mean_token_sum_norm",
            ]
        )
    )
    fields["skip_empty"] = fields["aggregation"].startswith("seq_mean") and chance() < 0.3
    if chance() < 0.5:
        fields["kl_coef"] = 0.1
        fields["kl_estimator"] = pick(["k1", "abs", "k2", "k3", "k1_st", "abs_st", "k3_st"])
        clamps = [None, "openrlhf"] + ["verl"] * fields["kl_estimator"].startswith("k3")
        fields["kl_clamp"] = pick(clamps)
        fields["kl_ratio_weighted"] = chance() < 0.5
    if chance() < 0.4:
        fields |= {"entropy_coef": 0.01, "entropy_aggregation": pick(["token_mean", "same"])}
    if chance() < 0.3:
        fields["off_policy_threshold"] = 0.05
    if chance() < 0.4:
        fields["correction"] = RolloutCorrection(
            level="token" if surrogate == "vespo" else pick(["token", "sequence", "geometric"]),
            mode=pick(["truncate", "mask"]),
            low=pick([None, 0.5]),
        )
    return PolicyLoss(**fields)


# ---- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset):
    random.seed(preset)
    torch.manual_seed(random.getrandbits(32))
    loss = PolicyLoss.preset(preset)
    check(loss, random_batch(loss, packed=random.random() < 0.5))


@pytest.mark.parametrize("seed", range(16 if INTERPRETED else 400))
def test_random_options(seed):
    random.seed(seed)
    torch.manual_seed(seed)
    loss = random_loss()
    batch = random_batch(
        loss,
        B=random.choice([1, 3]),
        T=random.choice([1, 5, 40, 300]),
        packed=random.random() < 0.5,
        one_advantage=random.random() < 0.6,
        masked=random.choice([0.0, 0.7, 0.7, 1.0]),
        garbage=random.choice([NAN, INF, -INF, -200.0]),
    )
    shape = batch["mask"].shape
    if random.random() < 0.3:
        batch["token_weights"] = torch.rand(shape)
    if loss.entropy_coef and random.random() < 0.5:
        batch["entropy_mask"] = torch.rand(shape) < 0.5
    if random.random() < 0.2:
        del batch["old_logprobs"]
        if loss.off_policy_threshold is not None and loss.correction is None:
            del batch["rollout_logprobs"]
    if random.random() < 0.2 and not batch["mask"].logical_not().any():
        del batch["mask"]
    if loss.aggregation == "token_mean" and random.random() < 0.5:
        batch["normalizer"] = random.choice([2.0**24 + 1, torch.tensor(11)])
    if loss.aggregation.startswith("seq_mean") and not loss.skip_empty and random.random() < 0.5:
        batch["num_sequences"] = random.choice([5, torch.tensor(3.5)])
    check(loss, batch)


@pytest.mark.parametrize("preset", ["dapo", "gspo"])
def test_sequences_longer_than_a_chain_of_blocks(preset):
    loss = PolicyLoss.preset(preset, kl_coef=0.1)
    torch.manual_seed(1)
    random.seed(1)
    # Many terms of either sign: against the largest of the partial sums, not the total.
    check(loss, random_batch(loss, B=1, T=16384 + 1500, masked=0.9))


@on_gpu
@pytest.mark.parametrize("preset", ["dapo", "gspo", "gmpo"])
@pytest.mark.parametrize(("B", "T"), [(1, 1_000_000), (100_000, 3)])
def test_large_batches(preset, B, T):
    loss = PolicyLoss.preset(preset)
    check(loss, random_batch(loss, B=B, T=T))


@pytest.mark.parametrize("preset", ["grpo", "gspo", "gmpo", "vespo", "rloo"])
@pytest.mark.parametrize(("B", "T"), [(0, 5), (2, 0), (0, 0), (1, 1)])
def test_little_or_nothing(preset, B, T):
    loss = PolicyLoss.preset(preset)
    check(loss, random_batch(loss, B=B, T=T, masked=1.0))


# ---- extremes -----------------------------------------------------------------------------------


@triton.jit
def _math_kernel(x, e, expm1_x, less, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    value = tl.load(x + lane)
    exp_x, minus_one = exp_and_expm1(value)
    tl.store(e + lane, exp_x)
    tl.store(expm1_x + lane, minus_one)
    tl.store(less + lane, expm1_less(value, minus_one))


def test_exponentials():
    parts = [
        torch.linspace(-87.0, 88.72, 20000),
        torch.logspace(-30, 0, 6000),
        -torch.logspace(-30, 0, 6000),
        torch.tensor([0.0, 88.722, 88.73, 1000.0, INF, -104.0, -1000.0, -INF, NAN, 1.0, -1.0]),
    ]
    values = torch.cat(parts)
    size = triton.next_power_of_2(len(values))
    x = torch.zeros(size)
    x[: len(values)] = values
    x = x.to(DEVICE)
    found = [torch.empty_like(x) for _ in range(3)]
    _math_kernel[(1,)](x, *found, BLOCK=size, enable_fp_fusion=False)
    wide = x.double()
    exact = [wide.exp(), torch.expm1(wide), torch.expm1(wide) - wide]
    # float64 itself cancels here; the next term is x / 12 of these.
    tiny = wide.abs() < 1e-4
    exact[2] = torch.where(tiny, wide**2 / 2 + wide**3 / 6 + wide**4 / 24, exact[2])
    for got, wanted in zip(found, exact, strict=True):
        wanted = wanted.where(wanted.isnan() | (wanted < 3.4028235e38), INF)
        same = (got == wanted) | (got.isnan() & wanted.isnan())
        # Below the smallest normal number only the absolute error is bounded.
        error = torch.where(same, 0.0, (got - wanted).abs() / wanted.abs().clamp(min=2.0**-126))
        assert error.max() < 3e-7, (x[error.argmax()], error.max())


@pytest.mark.parametrize("surrogate", ["clip", "sapo", "gmpo"])
@pytest.mark.parametrize("bound", [20.0, None])
def test_log_ratios_of_1000_give_no_nan(surrogate, bound):
    levels = ["token"]
    if surrogate == "clip":
        levels += ["sequence", "sequence_token", "sequence_sum"]
    for level in levels:
        loss = PolicyLoss(
            surrogate=surrogate,
            ratio_level=level,
            log_ratio_clamp=bound,
            aggregation="seq_mean_token_mean" if surrogate == "gmpo" else "token_mean",
            kl_coef=0.1,
            kl_clamp="verl",
        )
        logp, old = (torch.tensor([[a], [b]]) for a, b in ((-1.0, -1001.0), (-1001.0, -1.0)))
        for advantage in (0.0, 1.0, -1.0):
            # One sequence at a time: over several, inf - inf is NaN, as the formula has it.
            for i in range(2):
                batch = {
                    "logprobs": logp[i : i + 1],
                    "old_logprobs": old[i : i + 1],
                    "ref_logprobs": old[i : i + 1],
                    "advantages": torch.tensor([advantage]),
                }
                value, grad, vector = run(loss, batch)
                assert not value.isnan() and not grad.isnan().any() and not vector.isnan().any()
                if level == "token" and bound and surrogate != "gmpo":
                    assert value.isfinite() and grad.isfinite().all()


def same(a, b):
    return all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(a, b, strict=True))


EVERYTHING = dict(entropy_coef=0.1, kl_coef=0.1, off_policy_threshold=0.05)


@pytest.mark.parametrize("preset", ["gspo", "gmpo", "dppo_kl"])
def test_garbage_under_the_mask_changes_nothing(preset):
    loss = PolicyLoss.preset(preset, correction=RolloutCorrection(high=1.5), **EVERYTHING)
    results = []
    for garbage in (0.0, NAN, -INF):
        torch.manual_seed(3)
        results.append(run(loss, random_batch(loss, T=9, garbage=garbage, one_advantage=False)))
    assert not any(x.isnan().any() for x in results[0])
    assert all(same(result, results[0]) for result in results[1:])


# ---- independence -------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["dapo", "gspo"])
def test_same_bits_again_beside_others_and_elsewhere(preset):
    torch.manual_seed(4)
    loss = PolicyLoss.preset(preset, kl_coef=0.1, aggregation="token_sum")
    batch = random_batch(loss, B=3, T=1500)
    first = run(loss, batch)
    assert same(run(loss, batch), first)
    # In rows of another stride and alignment.
    wide = dict(batch)
    for name, value in batch.items():
        if value.dim() == 2:
            wide[name] = torch.zeros(3, 1507, dtype=value.dtype)
            wide[name][:, 3:1503] = value
            wide[name] = wide[name].to(DEVICE)[:, 3:1503]
    assert same(run(loss, wide), first)
    # Alone, and packed without what the mask leaves behind.
    alone = {name: value[1:2] for name, value in batch.items()}
    assert torch.equal(run(loss, alone)[1], first[1][1:2])
    packed = {n: v.reshape(-1) if v.dim() == 2 else v for n, v in batch.items()}
    packed["cu_seqlens"] = torch.tensor([0, 1500, 3000, 4500])
    again = run(loss, packed)
    assert torch.equal(again[1].view(3, 1500), first[1]) and same(again[2:], first[2:])


def test_offsets_beyond_32_bits():
    """Rows 2^31 elements apart; on a CPU the memory between them is never touched."""
    apart = 2**31 + 24
    try:
        memory = torch.empty(apart + 8, dtype=torch.float32, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"no address space for 8 GiB: {error}")
    torch.manual_seed(5)
    loss = PolicyLoss.preset("dapo")
    batch = random_batch(loss, B=2, T=8, masked=1.0)
    far = memory.as_strided((2, 8), (apart, 1))
    far.copy_(batch["old_logprobs"])
    assert same(run(loss, batch | {"old_logprobs": far}), run(loss, batch))


# ---- the operator -------------------------------------------------------------------------------


def test_no_gradient_that_nobody_asks_for():
    loss = PolicyLoss.preset("gspo", entropy_coef=0.1, kl_coef=0.1)
    torch.manual_seed(6)
    batch = {name: moved(value, torch.float32) for name, value in random_batch(loss).items()}
    wanted = run(loss, batch)
    given = Denominators()
    value, vector, *grads, _ = torch.ops.rlkern.policy_loss_triton(
        *Batch(**batch), *given, options(loss, given), False, False
    )
    assert [grad.shape for grad in grads] == [(0,), (0,)]
    assert torch.equal(value, wanted[0]) and torch.equal(vector, wanted[-1])


@on_gpu
def test_nothing_waits_for_the_gpu():
    loss = PolicyLoss.preset("dapo", kl_coef=0.1)
    batch = random_batch(loss)
    batch["normalizer"] = torch.tensor(11.0)
    batch = {name: moved(value, torch.float32) for name, value in batch.items()}
    run(loss, batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(loss, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")

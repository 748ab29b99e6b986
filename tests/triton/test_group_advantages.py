"""group_advantages in Triton against float64: on a GPU, or in Triton's interpreter.

Tolerance. Statistics are taken in float64 from the same fp32 numbers and advantages rounded once,
half an ulp of fp32. Rewards of up to 1e6 are known to 2^-33 in float64, and where they are divided
by a standard deviation of at least 0.1, advantages to 2^-29.
"""

from __future__ import annotations

import math
import random

import pytest
import torch

pytest.importorskip("triton")
from triton_device import DEVICE, INTERPRETED, MARKS, on_gpu  # noqa: E402

import rlkern  # noqa: E402
from rlkern.reference.group_advantages import BASELINES, SCALES, GroupOptions  # noqa: E402
from rlkern.triton import group_advantages as kernels  # noqa: E402

pytestmark = MARKS
NAN = math.nan
HALF_ULP = 2.0**-24
FLOAT64 = 2.0**-29


@pytest.fixture
def small_blocks(monkeypatch):
    """Groups of several blocks without many rewards."""
    monkeypatch.setattr(kernels, "_BLOCK", 4)
    monkeypatch.setattr(kernels, "_LARGE_BLOCK", 8)


def moved(value, dtype):
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(DEVICE, dtype if value.is_floating_point() else None)


def run(rewards, options, backend="triton", dtype=torch.float32):
    options = {name: moved(value, dtype) for name, value in options.items()}
    with rlkern.use_backend(backend):
        return rlkern.group_advantages(moved(rewards, dtype), **options)


def check(rewards, **options):
    """Against float64 eager; returns what Triton computed."""
    got = run(rewards, options)
    right = run(rewards, options, "eager", torch.float64)
    assert got.dtype == torch.float32 and got.shape == right.shape
    error = (got.double() - right).abs()
    assert (error <= HALF_ULP * right.abs() + FLOAT64).all(), (options, error.max(), got, right)
    return got.cpu()


def random_rewards(shape):
    rewards = random.choice(
        [
            torch.randn(shape),
            torch.randint(0, 2, shape).float(),
            1e6 + torch.randint(0, 2, shape).float(),
        ]
    )
    return torch.where(torch.rand(shape) < random.choice([0.0, 0.1, 0.5]), NAN, rewards)


def random_groups(N):
    if random.random() < 0.5:
        return {"group_size": random.choice([n for n in range(1, N + 1) if N % n == 0])}
    # Ids that no fp32 or int32 tells apart, in any order.
    return {"group_ids": torch.randint(0, max(2, N // 5), (N,)) - 2**40}


def random_options(shape):
    options = {"baseline": random.choice(BASELINES), "scale": random.choice(SCALES)}
    if options["baseline"] not in ("given", "none") or options["scale"] != "none":
        options["singleton"] = random.choice(["zero", "raw"])
    if options["scale"] in ("std", "batch_std"):
        options["unbiased"] = random.random() < 0.5
    if options["scale"] != "none":
        options["eps"] = random.choice([1e-4, 1e-9])
    if options["baseline"] == "length_weighted":
        options["lengths"] = torch.randint(0, 4, shape[:1])
    if options["baseline"] == "given":
        options["baseline_rewards"] = torch.randn(shape)
    if len(shape) == 2 and random.random() < 0.5:
        options["reward_weights"] = torch.randn(shape[1])
    return options


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(150 if INTERPRETED else 1000))
def test_random_options(seed, small_blocks):
    random.seed(seed)
    torch.manual_seed(seed)
    N = random.choice([1, 2, 6, 20, 36])
    shape = random.choice([(N,), (N,), (N, 1), (N, 3)])
    check(random_rewards(shape), **random_groups(N), **random_options(shape))


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scale", ["std", "batch_std"])
def test_whole_blocks(baseline, scale):
    """The sizes that calls have: groups of a block and more, of many and by ids."""
    random.seed(baseline + scale)
    torch.manual_seed(1)
    size = kernels._BLOCK
    for N, groups in (
        (3 * size, {"group_size": size}),
        (4 * size + 4, {"group_size": 2 * size + 2}),
        (2 * size + 3, {"group_ids": (torch.rand(2 * size + 3) < 0.2).int()}),
    ):
        options = {}
        if baseline == "length_weighted":
            options["lengths"] = torch.randint(0, 1000, (N,))
        if baseline == "given":
            options["baseline_rewards"] = torch.randn(N)
        check(torch.randn(N), baseline=baseline, scale=scale, **groups, **options)


def test_large_rewards_and_equal_ones():
    rewards = torch.tensor([1e6, 1e6 + 1, 0.3, 0.3, NAN, 7.0])
    got = check(rewards, group_size=2, eps=0.0)
    torch.testing.assert_close(got[:2], torch.tensor([-(0.5**0.5), 0.5**0.5]))
    assert got[2:].tolist() == [0, 0, 0, 0]
    raw = check(rewards, group_size=2, eps=0.0, singleton="raw")
    assert raw[4:].tolist() == [0, 7]


def test_the_first_of_the_best_alone_gets_the_lead(small_blocks):
    """Over blocks of 4 places: the best in the first, in the second, twice, and twice apart."""
    for rewards, lead in (
        ([9, 1, 2, 3, 4, 5], (0, 4)),
        ([1, 2, 3, 4, 5, 9], (5, 4)),
        ([1, 9, 9, 4, 5, 3], (1, 0)),
        ([1, 2, 9, 4, 5, 9], (2, 0)),
        ([8, 2, 3, 4, 9, 1], (4, 1)),
        ([9, 2, 3, 4, 8, 1], (0, 1)),
    ):
        got = check(torch.tensor(rewards).float(), group_size=6, baseline="pass_at_k", scale="none")
        wanted = torch.zeros(6)
        wanted[lead[0]] = lead[1]
        assert torch.equal(got, wanted)


def test_ids_in_any_order_give_what_equal_groups_give(small_blocks):
    torch.manual_seed(2)
    rewards = torch.randn(36)
    place = torch.randperm(36)
    ids = torch.arange(36) // 9
    for baseline in ("mean", "leave_one_out"):
        side_by_side = run(rewards, {"group_size": 9, "baseline": baseline})
        shuffled = run(rewards[place], {"group_ids": ids[place], "baseline": baseline})
        torch.testing.assert_close(shuffled.cpu(), side_by_side.cpu()[place])


@on_gpu
@pytest.mark.parametrize("groups", [1, 1000, 250_000])
def test_large_batches(groups):
    N = 500_000
    check(torch.randn(N), group_size=N // groups)
    check(torch.randn(N), group_ids=torch.randint(0, groups, (N,)))


def test_nothing():
    check(torch.zeros(0), group_size=3)
    check(torch.zeros(0, 2), group_ids=torch.zeros(0, dtype=torch.int32))


# ---- independence --------------------------------------------------------------------------------


def test_same_bits_again_beside_others_and_elsewhere(small_blocks):
    torch.manual_seed(3)
    rewards = torch.randn(40)
    first = run(rewards, {"group_size": 10})
    assert torch.equal(run(rewards, {"group_size": 10}), first)
    assert torch.equal(run(rewards[10:20], {"group_size": 10}), first[10:20])
    shifted = torch.cat([torch.zeros(3), rewards]).to(DEVICE)[3:]
    assert torch.equal(run(shifted, {"group_size": 10}), first)


# ---- the operator --------------------------------------------------------------------------------


def test_operator_passes_opcheck(small_blocks):
    numbers = GroupOptions(joined=True, normalized=True).numbers()
    rewards = torch.randn(6, 2, device=DEVICE)
    torch.library.opcheck(
        torch.ops.rlkern.group_advantages_triton.default,
        (rewards, 3, None, None, None, None, numbers),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_tensors_that_would_be_misread_are_refused():
    numbers = GroupOptions().numbers()
    rewards = torch.zeros(6, 1, device=DEVICE)
    nothing = [None] * 3
    with pytest.raises(ValueError, match="contiguous float32"):
        kernels.forward(rewards.double(), 2, None, *nothing, numbers)
    with pytest.raises(ValueError, match="divisor of 6"):
        kernels.forward(rewards, 4, None, *nothing, numbers)
    with pytest.raises(ValueError, match=r"group_ids: expected \[6\] int64"):
        kernels.forward(rewards, 0, torch.zeros(3, device=DEVICE).long(), *nothing, numbers)
    with pytest.raises(ValueError, match=r"lengths: expected \[6\] float32"):
        given = torch.zeros(3, device=DEVICE), None, None
        kernels.forward(rewards, 2, None, *given, GroupOptions("length_weighted").numbers())
    with pytest.raises(ValueError, match="7 numbers"):
        kernels.forward(rewards, 2, None, *nothing, numbers[:3])


@on_gpu
@pytest.mark.parametrize("groups", ["group_size", "group_ids"])
def test_nothing_waits_for_the_gpu(groups):
    rewards = torch.randn(12, 2, device=DEVICE)
    given = {groups: 4 if groups == "group_size" else torch.arange(12, device=DEVICE) % 5}
    run(rewards, given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(rewards, given)
    finally:
        torch.cuda.set_sync_debug_mode("default")

"""The CUDA kernels of group_advantages, run on the CPU, against the definition in float64.

Sums are right to 1e-13 of the largest rise (csrc/cuda/group_ids.cuh), which is at most 20 here, and
deviations are at least a hundredth of it: what remains is the rounding to fp32.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from advantage_batches import U, group_batch, in_double
from emulated_advantages import emulated_advantages
from emulated_kernels import why_not
from infinite_groups import check_infinite, several_with_an_infinite_one

from rlkern.reference.group_advantages import (
    BASELINES,
    SCALES,
    GroupBatch,
    GroupOptions,
    group_advantages,
)

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())
NAN = float("nan")


@pytest.fixture(scope="module")
def built():
    return emulated_advantages()


@pytest.fixture
def kernels(built):
    built.group_threads = 32
    built.max_blocks = 2**31 - 1
    return built


def check(kernels, batch, options):
    exact = group_advantages(in_double(batch), options)
    found = kernels.group_advantages(*batch, options.numbers())
    torch.testing.assert_close(found.double(), exact, rtol=2 * U, atol=1e-11, equal_nan=True)
    return found


@pytest.mark.parametrize("group_size", [0, 1, 3, 8, 32, 45], ids=lambda n: f"of{n}" if n else "ids")
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
def test_every_option(kernels, baseline, scale, group_size):
    batch = group_batch(baseline, group_size=group_size)
    for singleton, unbiased in itertools.product(("zero", "raw"), (True, False)):
        options = GroupOptions(baseline, scale, unbiased, 1e-4, singleton)
        check(kernels, batch, options)


@pytest.mark.parametrize("group_size", [0, 4], ids=["ids", "of4"])
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize(
    ("baseline", "scale"),
    [("mean", "std"), ("pass_at_k", "none"), ("batch_mean", "batch_std"), ("given", "std")],
)
def test_several_rewards(kernels, baseline, scale, normalized, group_size):
    batch = group_batch(baseline, 3, group_size)
    batch.rewards[1] = NAN  # a row without any
    for weights in (batch.weights, None):
        options = GroupOptions(baseline, scale, joined=True, normalized=normalized)
        check(kernels, batch._replace(weights=weights), options)


def test_one_column_may_be_joined_too(kernels):
    options = GroupOptions(joined=True, normalized=True)
    check(kernels, group_batch("mean", 1, 4)._replace(weights=torch.tensor([2.0])), options)


@pytest.mark.parametrize("ragged", [False, True], ids=["segments", "ids"])
def test_rewards_that_nearly_cancel(kernels, ragged):
    """1e6 + {0, 1} gives +-0.707, and equal rewards give 0 whatever they are."""
    rewards = torch.tensor([1e6, 1e6 + 1, 0.1, 0.1, -3e38, -3e38, 1e-45, 0.0, -0.0, 0.0])[:, None]
    ids = torch.arange(5).repeat_interleave(2)
    batch = GroupBatch(rewards, 0, ids) if ragged else GroupBatch(rewards, 2)
    found = check(kernels, batch, GroupOptions(eps=0.0))
    root = 0.5**0.5
    wanted = torch.tensor([-root, root, 0, 0, 0, 0, root, -root, 0, 0])
    torch.testing.assert_close(found, wanted, rtol=2 * U, atol=0)


@pytest.mark.parametrize("ragged", [False, True], ids=["segments", "ids"])
def test_the_extremes_of_fp32(kernels, ragged):
    """A rise of twice the largest float beside one of the smallest."""
    rewards = torch.tensor([3e38, -3e38, 0.0, 1e-45, 0.0, 3e-45])[:, None]
    ids = torch.arange(2).repeat_interleave(3)
    batch = GroupBatch(rewards, 0, ids) if ragged else GroupBatch(rewards, 3)
    check(kernels, batch, GroupOptions(eps=0.0))


@pytest.mark.parametrize("grouping", ["equal", "mixed"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
def test_an_infinite_reward_is_where_its_statistics_are(kernels, baseline, scale, grouping):
    def compute(batch, options):
        return kernels.group_advantages(*batch, options.numbers())

    check_infinite(compute, baseline, scale, grouping)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("ragged", [False, True], ids=["segments", "ids"])
def test_an_infinite_reward_of_several(kernels, ragged, normalized):
    rewards = several_with_an_infinite_one()
    batch = GroupBatch(rewards, 0, torch.arange(9) // 3) if ragged else GroupBatch(rewards, 3)
    found = check(kernels, batch, GroupOptions(joined=True, normalized=normalized))
    spoiled = range(9) if normalized else range(3, 6)
    # The row without any reward is left out, a sum that is NaN is not.
    assert found.isnan().tolist() == [i in spoiled and i != 6 for i in range(9)] and found[6] == 0


@pytest.mark.parametrize("ragged", [False, True], ids=["segments", "ids"])
def test_a_tie_for_the_best_leads_by_nothing(kernels, ragged):
    rewards = torch.tensor([1.0, 3.0, 3.0, NAN, 2.0, -1.0, -0.0, 0.0])[:, None]
    ids = torch.arange(2).repeat_interleave(4)
    batch = GroupBatch(rewards, 0, ids) if ragged else GroupBatch(rewards, 4)
    found = kernels.group_advantages(*batch, GroupOptions("pass_at_k", "none").numbers())
    assert found.tolist() == [0.0] * 4 + [2.0, 0.0, 0.0, 0.0]
    rewards[2] = 5.0
    found = kernels.group_advantages(*batch, GroupOptions("pass_at_k", "none").numbers())
    assert found.tolist() == [0.0, 0.0, 2.0, 0.0, 2.0, 0.0, 0.0, 0.0]


def test_lengths_of_nothing_give_the_mean(kernels):
    rewards = torch.tensor([1.0, 2.0, 6.0])[:, None]
    options = GroupOptions("length_weighted", "none")
    for batch in (GroupBatch(rewards, 3), GroupBatch(rewards, 0, torch.zeros(3, dtype=torch.long))):
        found = check(kernels, batch._replace(lengths=torch.zeros(3)), options)
        assert found.tolist() == [-2.0, -1.0, 3.0]


@pytest.mark.parametrize("group_size", [0, 8], ids=["ids", "of8"])
def test_the_same_call_twice_and_in_another_order(kernels, group_size):
    """By ids the order of the rewards does not show, nor does which row leads a group."""
    options = GroupOptions().numbers()
    batch = group_batch("mean", group_size=group_size, seed=3)
    kernels.group_threads = 256
    first = kernels.group_advantages(*batch, options)
    for _ in range(4):
        assert torch.equal(first, kernels.group_advantages(*batch, options))
    if group_size == 0:
        order = torch.randperm(len(first))
        moved = batch._replace(rewards=batch.rewards[order], group_ids=batch.group_ids[order])
        assert torch.equal(first[order], kernels.group_advantages(*moved, options))


@pytest.mark.parametrize("baseline", ["mean", "pass_at_k"])
def test_a_grid_of_several_blocks_and_grids(kernels, baseline):
    batch = group_batch(baseline, group_size=5)
    first = kernels.group_advantages(*batch, GroupOptions(baseline).numbers())
    kernels.max_blocks = 1
    again = kernels.group_advantages(*batch, GroupOptions(baseline).numbers())
    assert torch.equal(first, again)
    for threads in (64, 256):
        kernels.group_threads = threads
        assert torch.equal(
            first, kernels.group_advantages(*batch, GroupOptions(baseline).numbers())
        )


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_rewards(kernels, count):
    rewards = torch.arange(1.0, count + 1)[:, None]
    ids = torch.full((count,), -7)
    for batch in (GroupBatch(rewards, 0, ids), GroupBatch(rewards, 1)):
        for options in (
            GroupOptions(),
            GroupOptions("batch_mean", "batch_std"),
            GroupOptions(joined=True, normalized=True),
        ):
            check(kernels, batch, options) if count else kernels.group_advantages(
                *batch, options.numbers()
            )


def test_ids_that_collide_and_one_large_group(kernels):
    """Multiples of 2^32 differ in no low bit; 3000 rewards of one group differ by single units."""
    kernels.group_threads = 64
    g = torch.Generator().manual_seed(4)
    ids = torch.randint(0, 40, (3000,), generator=g) << 32
    rewards = torch.randn(3000, 1, generator=g)
    check(kernels, GroupBatch(rewards, 0, ids), GroupOptions())
    rewards = torch.zeros(3000, 1)
    rewards[1234] = 1.0
    ids = torch.full((3000,), 5)
    check(kernels, GroupBatch(rewards, 0, ids), GroupOptions())


def test_sums_stay_within_64_bits(kernels):
    """All rewards but one at the top of the fixed-point range."""
    for rows in (1, 2, 3, 1023, 1024, 1025, 2**30):
        bits = kernels.module.fraction_bits(rows)
        assert rows * 2**bits < 2**63 and 32 <= bits <= 52
    rewards = torch.ones(2049, 1)
    rewards[0] = 0.0
    ids = torch.zeros(2049, dtype=torch.long)
    check(kernels, GroupBatch(rewards, 0, ids), GroupOptions())

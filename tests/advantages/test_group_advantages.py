"""group_advantages against its formulas written out, for every option and every kind of ids."""

from __future__ import annotations

import functools
import itertools
import math

import literal_groups as literal
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rlkern
from rlkern import _backend
from rlkern.reference.group_advantages import BASELINES, SCALES, SINGLETONS

NAN = math.nan
# Statistics in double, so what is left is the result's one rounding to float, and 1e-12 of the
# largest rewards (10) for a difference that cancels.
RTOL = {torch.float32: 1.01 * 2**-24, torch.float64: 1e-12}
ATOL = 1e-11

LARGEST = 2**63 - 1
# Of 12 rewards each.
GROUPS = {
    "equal": 4,
    "one": 12,
    "singles": 1,
    "sorted": [0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 4, 4],
    "sorted far apart": [-(2**63)] * 5 + [-7] + [0] * 4 + [LARGEST] * 2,
    "falling": [9, 9, 9, 4, 4, 4, 4, 4, 1, 0, 0, 0],
    "mixed": [2, 0, 1, 1, 0, 2, 2, 0, 5, 2, 0, 0],
    "mixed far apart": [LARGEST, 3, -(2**63), 3, LARGEST, LARGEST, 7 << 40, 3, 3, 3, 0, 7 << 40],
    "all one id": [5] * 12,
    "all different": [11, 3, 7, 0, 1, 2, 10, 9, 8, 4, 5, 6],
}
REWARDS = {  # as float32 holds them, so that one expectation serves both dtypes
    "any": [0.3, -1.7, 2.5, 0.1, 9.9, -0.4, 1.1, 1.3, -2.2, 0.7, 3.1, -0.9],
    "with NaN": [NAN, 1.5, NAN, 0.25, -2.0, 1.0, 0.5, NAN, 3.5, -1.0, NAN, 2.0],
    "ties": [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0],
    "one value": [0.1] * 12,
    "one reward": [NAN] * 7 + [0.7] + [NAN] * 4,
    "none": [NAN] * 12,
}
REWARDS = {name: tuple(torch.tensor(values).tolist()) for name, values in REWARDS.items()}
LENGTHS = [3, 0, 7, 1, 1, 12, 5, 0, 2, 2, 9, 4]
GIVEN = torch.tensor([0.5, 0.5, -1.0, 2.0, 0.1, 0.0, 1.0, 0.3, -0.2, 0.9, 1.0, 0.2]).tolist()


@functools.cache
def expectation(rewards, groups, baseline, **options):
    """Of REWARDS and GROUPS by name."""
    labels = grouping(GROUPS[groups])[1]
    if baseline == "length_weighted":
        options["lengths"] = LENGTHS
    elif baseline == "given":
        options["given"] = GIVEN
    return literal.column(REWARDS[rewards], labels, baseline, **options)


def grouping(groups, rows=12):
    """The arguments and a label for every reward."""
    if isinstance(groups, int):
        return {"group_size": groups}, [i // groups for i in range(rows)]
    return {"group_ids": torch.tensor(groups)}, groups


def takes_statistics(baseline, scale):
    return baseline not in ("given", "none") or scale != "none"


def needed(baseline, dtype):
    if baseline == "length_weighted":
        return {"lengths": torch.tensor(LENGTHS)}
    return {"baseline_rewards": torch.tensor(GIVEN, dtype=dtype)} if baseline == "given" else {}


def close(actual, expected, scale=1.0):
    assert not actual.requires_grad
    torch.testing.assert_close(
        actual.double(),
        torch.tensor(expected, dtype=torch.float64).view(actual.shape),
        rtol=RTOL[actual.dtype],
        atol=ATOL * scale,
    )


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
def test_equals_its_formula(group_backend, poisoned, baseline, scale):
    more = needed(baseline, group_backend.dtype)
    for groups, values in itertools.product(GROUPS, REWARDS):
        how, _ = grouping(GROUPS[groups])
        rewards = torch.tensor(REWARDS[values], dtype=group_backend.dtype)
        for unbiased, singleton, eps in itertools.product(
            (True, False) if scale in ("std", "batch_std") else (True,),
            SINGLETONS if takes_statistics(baseline, scale) else SINGLETONS[:1],
            (1e-4,) if scale == "none" else (1e-4, 1e-9),
        ):
            options = {"scale": scale, "unbiased": unbiased, "eps": eps, "singleton": singleton}
            poisoned(48)
            actual = rlkern.group_advantages(rewards, **how, baseline=baseline, **options, **more)
            # eps divides what no deviation does: baseline none, equal rewards.
            close(actual, expectation(values, groups, baseline, **options), 1 / eps)


ROWS = [
    [0.3, 1.0, -2.0],
    [NAN, 0.0, 1.0],
    [1.5, NAN, NAN],
    [NAN, NAN, NAN],
    [2.0, 1.0, 0.5],
    [0.0, 1.0, NAN],
    [-1.0, 0.0, 4.0],
    [0.7, 1.0, 0.25],
]


@pytest.mark.parametrize("weights", [None, [1.0, 0.5, -2.0]])
@pytest.mark.parametrize("baseline", ["mean", "given", "pass_at_k", "batch_mean"])
def test_several_rewards(group_backend, baseline, weights):
    dtype = group_backend.dtype
    rewards = torch.tensor(ROWS, dtype=dtype)
    given = torch.linspace(-1, 2, 24, dtype=dtype).view(8, 3)
    more = {"baseline_rewards": given} if baseline == "given" else {}
    literally = {"given": given.tolist()} if baseline == "given" else {}
    for groups in (4, 8, [1, 1, 0, 0, 1, 0, 1, 1], [7 << 50, -3, -3, 0, 0, 0, -3, -3]):
        how, labels = grouping(groups, 8)
        for scale, unbiased, singleton in (("std", True, "zero"), ("none", False, "raw")):
            options = {"baseline": baseline, "scale": scale, "unbiased": unbiased}
            if takes_statistics(baseline, scale):
                options["singleton"] = singleton
            actual = rlkern.group_advantages(
                rewards, **how, **options, **more, reward_weights=weights
            )
            expected = literal.several(
                rewards.tolist(), labels, weights or [1.0] * 3, **options, **literally
            )
            close(actual, expected)
    tensor = torch.tensor(weights or [1.0] * 3, dtype=torch.float64)
    assert torch.equal(
        rlkern.group_advantages(rewards, group_size=4, reward_weights=weights),
        rlkern.group_advantages(rewards, group_size=4, reward_weights=tensor),
    )


def test_several_rewards_over_tokens(group_backend):
    """GDPO as verl has it: the weighted sum spread over tokens, then whitened."""
    if _backend.why_not("whiten", group_backend.name, "cpu", group_backend.dtype):
        pytest.skip(f"whiten has no {group_backend.name} kernel")
    rewards = torch.tensor(ROWS, dtype=group_backend.dtype)
    mask = torch.arange(5) < torch.tensor([5, 3, 0, 4, 1, 2, 5, 3])[:, None]
    weights = [1.0, 0.5, 2.0]
    for unbiased in (True, False):
        actual = rlkern.group_advantages(
            rewards, group_size=4, reward_weights=weights, batch="tokens", mask=mask,
            unbiased=unbiased,
        )  # fmt: skip
        labels = [i // 4 for i in range(8)]
        total, scored = literal.weighted_sum(rewards.tolist(), labels, weights, unbiased=unbiased)
        counts = [bool(m) and scored[i] for i in range(8) for m in mask[i]]
        spread = [total[i] for i in range(8) for _ in range(5)]
        expected = literal.whitened(spread, counts, unbiased=unbiased)
        # The sum is a float before it is whitened: one more rounding, of values up to 4.
        torch.testing.assert_close(
            actual.double(), torch.tensor(expected, dtype=torch.float64).view(8, 5),
            rtol=4 * RTOL[actual.dtype], atol=8 * RTOL[actual.dtype],
        )  # fmt: skip
        # And it is the whitening of the spread sums, no more.
        summed = torch.tensor(total, dtype=actual.dtype)[:, None].expand(8, 5)
        again = rlkern.whiten(summed, torch.tensor(counts).view(8, 5), unbiased=unbiased)
        torch.testing.assert_close(actual, again, rtol=1e-6, atol=1e-6)


FLOATS = st.floats(-100, 100, width=32) | st.sampled_from([0.0, 1.0, NAN])


@given(
    st.lists(st.tuples(FLOATS, st.integers(-2, 3)), max_size=40),
    st.sampled_from(BASELINES[:4]),
    st.sampled_from(["std", "none"]),
    st.sampled_from([1, 1 << 61, -(1 << 61)]),
)
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_rewards_in_any_groups(group_backend, pairs, baseline, scale, spacing):
    values, labels = [x for x, _ in pairs], [label * spacing for _, label in pairs]
    rewards = torch.tensor(values, dtype=group_backend.dtype)
    ids = torch.tensor(labels, dtype=torch.int64)
    lengths = list(range(len(values)))
    more = {"lengths": torch.tensor(lengths)} if baseline == "length_weighted" else {}
    actual = rlkern.group_advantages(rewards, group_ids=ids, baseline=baseline, scale=scale, **more)
    expected = literal.column(values, labels, baseline=baseline, scale=scale, lengths=lengths)
    # A sum of squares about a member loses at most the number of members in its last digits, and
    # the deviation half of that.
    torch.testing.assert_close(
        actual.double(),
        torch.tensor(expected, dtype=torch.float64),
        rtol=RTOL[actual.dtype] + 1e-12,
        atol=1e-10,
    )


@pytest.mark.parametrize("where", [1, 255, 256, 257, 300, 16383, 16384, 16385, 39999])
@pytest.mark.parametrize("spacing", [1, 1 << 40], ids=["narrow", "far apart"])
def test_ids_that_rise_until_they_do_not(group_backend, where, spacing):
    """Groups are taken for consecutive until an id is less than the one before it, wherever that
    is: at the end of what is looked at first, or of what one thread works on."""
    ids = torch.arange(40000) // 7 + 5
    ids[where:] = torch.arange(40000 - where) // 5
    ids *= spacing
    rewards = torch.randn(40000).to(group_backend.dtype)
    rewards[::11] = NAN
    found = rlkern.group_advantages(rewards, group_ids=ids)
    order = ids.argsort(stable=True)
    wanted = torch.empty_like(found)
    # The same rewards with their groups one after another.
    wanted[order] = rlkern.group_advantages(rewards[order], group_ids=ids[order])
    # Sums in another order, and one rounding to the result's dtype: two units in the last place.
    eps = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found, wanted, rtol=2 * eps, atol=4 * eps)

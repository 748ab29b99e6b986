"""An infinite reward makes NaN what its statistics enter, on every backend alike."""

from __future__ import annotations

import pytest
import torch
from infinite_groups import GROUPINGS, INF, check_infinite, several_with_an_infinite_one

import rlkern
from rlkern import _backend
from rlkern.reference.group_advantages import BASELINES, SCALES


def by_the_function(batch, options):
    how = {"group_size": batch.group_size or None, "group_ids": batch.group_ids}
    if batch.lengths is not None:
        how["lengths"] = batch.lengths
    if batch.given is not None:
        how["baseline_rewards"] = batch.given[:, 0]
    return rlkern.group_advantages(
        batch.rewards[:, 0],
        **how,
        baseline=options.baseline,
        scale=options.scale,
        singleton=options.singleton,
    )


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
def test_it_is_where_its_statistics_are(group_backend, baseline, scale, grouping):
    check_infinite(by_the_function, baseline, scale, grouping, group_backend.dtype)


@pytest.mark.parametrize("how", [{"group_size": 3}, {"group_ids": torch.tensor([4, 4, 4, 0] * 3)}])
def test_of_several_rewards(group_backend, how):
    rewards = several_with_an_infinite_one(group_backend.dtype)
    if "group_ids" in how:
        how = {"group_ids": how["group_ids"][: len(rewards)]}
    for weights in (None, [0.0, 1.0]):
        out = rlkern.group_advantages(rewards, **how, reward_weights=weights)
        # The row without any reward is left out, a sum that is NaN is not.
        assert out.isnan().tolist() == [True] * 6 + [False] + [True] * 2 and out[6] == 0


def test_of_several_rewards_over_tokens(group_backend):
    if _backend.why_not("whiten", group_backend.name, "cpu", group_backend.dtype):
        pytest.skip(f"whiten has no {group_backend.name} kernel")
    rewards = several_with_an_infinite_one(group_backend.dtype)
    mask = torch.ones(9, 2, dtype=torch.bool)
    mask[1, 1] = False
    out = rlkern.group_advantages(rewards, group_size=3, batch="tokens", mask=mask)
    counts = mask.clone()
    counts[6] = False
    assert torch.equal(out.isnan(), counts) and torch.equal(out[~counts], out.new_zeros(3))


@pytest.mark.parametrize("at", [0, 39_000, 79_999])
def test_in_many_parts(group_backend, at):
    """Groups and a batch whose parts are summed on their own."""
    if group_backend.name == "triton":
        pytest.skip("Triton sums no parts")
    rewards, ids = torch.randn(80_000, dtype=group_backend.dtype), torch.arange(80_000) % 40
    rewards[at] = -INF
    out = rlkern.group_advantages(rewards, group_ids=ids)
    assert torch.equal(out.isnan(), ids == ids[at])
    assert rlkern.group_advantages(rewards, group_size=8, scale="batch_std").isnan().all()

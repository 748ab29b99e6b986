"""The rule of infinite rewards (docs/advantages.md), whoever computes: all advantages that a
statistic with an infinite reward enters are NaN, and no others."""

from __future__ import annotations

import torch

from rlkern.reference.group_advantages import GroupBatch, GroupOptions

INF, NAN = float("inf"), float("nan")
BAD = [
    [INF, 0.0, 1.0],
    [-INF, 0.0, 1.0],
    [1.0, 0.0, INF],
    [INF, INF, 2.0],
    [2.0, -INF, -INF],
    [INF, -INF, 1.0],
    [NAN, INF, 2.0],
    [NAN, INF, NAN],  # a single reward
    [-INF, NAN, NAN],
]
FIRST, LAST = [0.0, 2.0, 5.0], [1.0, NAN, 4.0]
GROUPINGS = ("equal", "sorted", "mixed")


def takes(baseline, scale):
    """Whether a statistic of the group enters, and one of the batch."""
    of_group = baseline in ("mean", "leave_one_out", "length_weighted", "pass_at_k")
    return (
        of_group or scale in ("std", "mean"),
        baseline == "batch_mean" or scale == "batch_std",
    )


def batch_of(rewards, baseline, ids=None):
    rows = len(rewards)
    return GroupBatch(
        rewards,
        3 if ids is None else 0,
        ids,
        torch.arange(rows, dtype=rewards.dtype) % 4 if baseline == "length_weighted" else None,
        torch.full_like(rewards, 0.5) if baseline == "given" else None,
    )


def computed(compute, rewards, options, grouping):
    if grouping == "equal":
        return compute(batch_of(rewards, options.baseline), options)
    ids = torch.arange(len(rewards)) // 3
    order = torch.arange(len(rewards))
    if grouping == "mixed":
        order = order.view(-1, 3).T.flatten()
    batch = batch_of(rewards, options.baseline, ids)
    moved = [x[order] if isinstance(x, torch.Tensor) else x for x in batch]
    out = torch.empty(len(rewards), dtype=rewards.dtype)
    out[order] = compute(GroupBatch(*moved), options)
    return out


def check_infinite(compute, baseline, scale, grouping, dtype=torch.float32):
    """`compute` turns a GroupBatch and GroupOptions into advantages."""
    of_group, of_batch = takes(baseline, scale)
    # Of a batch each kind of bad group has to spoil all by itself.
    batches = [[bad] for bad in BAD] if of_batch else [BAD]
    for bad in batches:
        rewards = torch.tensor([FIRST, *bad, LAST], dtype=dtype).view(-1, 1)
        for singleton in ("zero", "raw") if of_group or of_batch else ("zero",):
            options = GroupOptions(baseline, scale, singleton=singleton)
            out = computed(compute, rewards, options, grouping)
            tame = rewards.where(~rewards.isinf(), 0.25)
            expected = computed(compute, tame, options, grouping)
            assert expected.isfinite().all()
            if of_batch:
                expected[:] = NAN
            elif of_group:
                expected[3:-3] = NAN
            else:
                expected = expected.where(~rewards[:, 0].isinf(), rewards[:, 0])
            expected[rewards[:, 0].isnan()] = 0
            torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


def several_with_an_infinite_one(dtype=torch.float32):
    """Two rewards each, groups of 3; the infinite one beside a NaN cell, and a row of those."""
    return torch.tensor(
        [[0, 1], [1, 0], [2, 5], [1, NAN], [-INF, NAN], [0, 2], [NAN, NAN], [1, 1], [3, 0]],
        dtype=dtype,
    )

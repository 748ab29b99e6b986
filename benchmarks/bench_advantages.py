"""Advantages against eager PyTorch and torch.compile: by group, and whitened."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.case import Case, Contestant, Floor

# ---- group_advantages ---------------------------------------------------------------------------

GROUP_SHAPE = {"rewards": 65536}
GROUP_QUICK_SHAPE = {"rewards": 2048}
#: Mean completions of a prompt; the groups have from 2 to 14.
GROUP_MEAN = 8
EPS = 1e-4
# An advantage is at most a few: fp32 sums of a group's rewards are good to a few ulp of them, over
# a deviation that two rewards of a small group may make as small as 1e-2.
GROUP_TOLERANCE = 1e-3
SORTED, SHUFFLED = "ragged groups, sorted", "ragged groups, shuffled"


def scattered(rewards, ids, count):
    """As one would write it knowing that the ids are numbers below `count`."""
    zeros = rewards.new_zeros(count)
    size = zeros.index_add(0, ids, torch.ones_like(rewards))
    mean = zeros.index_add(0, ids, rewards) / size
    centred = rewards - mean[ids]
    variance = zeros.index_add(0, ids, centred.square()) / (size - 1).clamp(min=1)
    advantages = centred / (variance.sqrt()[ids] + EPS)
    return advantages.where(size[ids] > 1, 0.0)


def looped(rewards, ids, count):
    """Group by group, as verl and OpenRLHF write it: lists by id, a mean and a std for each."""
    groups: dict[int, list[int]] = {}
    for row, name in enumerate(ids.tolist()):
        groups.setdefault(name, []).append(row)
    advantages = torch.zeros_like(rewards)
    for rows in groups.values():
        if len(rows) > 1:
            mine = rewards[rows]
            advantages[rows] = (mine - mine.mean()) / (mine.std() + EPS)
    return advantages


def build_groups():
    import rlkern

    # A block around each call would weigh as much as the call: where there are native kernels
    # they are the automatic choice.
    with rlkern.use_backend("native"):
        rlkern.group_advantages(torch.zeros(2), group_size=2)
    return lambda rewards, ids, count: rlkern.group_advantages(rewards, group_ids=ids)


GROUP_BUILDERS = {
    "rlkern": build_groups,
    "eager": lambda: scattered,
    "torch.compile": lambda: torch.compile(scattered, dynamic=False),
    "a loop over groups": lambda: looped,
}


class GroupAdvantages(Case):
    """Rewards of groups of 2 to 14 completions; the peers know that the ids are dense."""

    operator = "group_advantages"
    contestants = tuple(
        Contestant(task, name, build)
        for task in (SORTED, SHUFFLED)
        for name, build in GROUP_BUILDERS.items()
    )
    #: Rewards are read and advantages written, in fp32, and the ids read, twice as wide.
    bounds = {task: ("copy", "read", "read") for task in (SORTED, SHUFFLED)}
    tolerance = GROUP_TOLERANCE

    def __init__(self, rewards: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.bulk = torch.randn(rewards, generator=generator)
        sizes = torch.randint(2, 2 * GROUP_MEAN - 1, (rewards,), generator=generator)
        ids = torch.repeat_interleave(torch.arange(rewards), sizes)[:rewards]
        self.count = int(ids[-1]) + 1
        self.rewards = self.bulk.clone()
        order = torch.randperm(rewards, generator=generator)
        self.ids = {SORTED: ids, SHUFFLED: ids[order]}

    @staticmethod
    def floors(**params: Any) -> tuple[Floor, ...]:
        if params != GROUP_SHAPE:
            return ()
        return tuple(Floor(f"{t}/rlkern", (f"{t}/eager",), 10) for t in (SORTED, SHUFFLED))

    def prepare(self, task: str) -> tuple[Any, ...]:
        # The ceilings scale the bulk in place.
        self.bulk.copy_(self.rewards)
        return self.bulk, self.ids[task], self.count

    def errors(self, task: str, outputs: Any) -> dict[str, float]:
        """The worst advantage's distance from float64's, relative above 1."""
        exact = scattered(self.rewards.double(), self.ids[task], self.count)
        return {"advantages": worst(outputs, exact)}


def worst(outputs, exact) -> float:
    return ((outputs.double() - exact).abs() / exact.abs().clamp(min=1)).max().item()


# ---- whiten -------------------------------------------------------------------------------------

WHITEN_SHAPE = {"sequences": 512, "tokens": 4096}
WHITEN_QUICK_SHAPE = {"sequences": 8, "tokens": 256}
# Values up to six deviations, from an fp32 mean and variance of 1e6 values.
WHITEN_TOLERANCE = 1e-4
WHITEN = "masked whitening"


def masked_whiten(values, mask):
    """As verl writes it."""
    count = mask.sum()
    mean = (values * mask).sum() / count
    variance = ((values - mean).square() * mask).sum() / count * (count / (count - 1))
    return (values - mean) * torch.rsqrt(variance + 1e-8) * mask


def build_whiten():
    import rlkern

    with rlkern.use_backend("native"):
        rlkern.whiten(torch.zeros(2))
    return rlkern.whiten


class Whiten(Case):
    """Ragged sequences of advantages, half as long as the padding or longer."""

    operator = "whiten"
    contestants = (
        Contestant(WHITEN, "rlkern", build_whiten),
        Contestant(WHITEN, "eager", lambda: masked_whiten),
        Contestant(WHITEN, "torch.compile", lambda: torch.compile(masked_whiten, dynamic=False)),
    )
    #: The moments read everything once, before the first result can be written.
    bounds = {WHITEN: ("read", "copy")}
    tolerance = WHITEN_TOLERANCE

    def __init__(self, sequences: int, tokens: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.bulk = torch.randn(sequences, tokens, generator=generator)
        self.values = self.bulk.clone()
        lengths = torch.randint(tokens // 2, tokens + 1, (sequences, 1), generator=generator)
        self.mask = torch.arange(tokens) < lengths

    def prepare(self, task: str) -> tuple[torch.Tensor, ...]:
        self.bulk.copy_(self.values)
        return self.bulk, self.mask

    def errors(self, task: str, outputs: Any) -> dict[str, float]:
        """The worst value's distance from float64's, relative above 1."""
        exact = masked_whiten(self.values.double(), self.mask)
        return {"whitened": worst(outputs, exact)}


# ---- contests -----------------------------------------------------------------------------------


@pytest.mark.parametrize("contestant", [c.key for c in GroupAdvantages.contestants])
def test_group_advantages(contest, quick, contestant):
    contest(GroupAdvantages, GROUP_QUICK_SHAPE if quick else GROUP_SHAPE, contestant)


@pytest.mark.parametrize("contestant", [c.key for c in Whiten.contestants])
def test_whiten(contest, quick, contestant):
    contest(Whiten, WHITEN_QUICK_SHAPE if quick else WHITEN_SHAPE, contestant)

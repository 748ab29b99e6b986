"""group_advantages against the loops that trainers carry, scatter form and compiled form."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import peers
from benchmarks.case import FULL, SHORT, Case, Contestant, Floor

SHAPE = {"rewards": 65536}
QUICK_SHAPE = {"rewards": 2048}
#: Mean completions of a prompt; the groups have from 2 to 14.
GROUP_MEAN = 8
EPS = 1e-4
# The slack that fp32 peers need; rlkern itself rounds once. A peer's mean is off by 2^-24 of the
# sum of its rewards, up to 4, so 2.4e-7, which is divided by the deviation. Some 630 of the groups
# are pairs, whose differences are N(0, 2): the closest pair is about 1 / (0.56 * 630) apart, a
# deviation of 2e-3, and 1.2e-4 is what comes out. Eight times that lets a pair be closer.
TOLERANCE = 1e-3
SORTED, SHUFFLED = "ragged groups, sorted", "ragged groups, shuffled"
EQUAL = {f"groups of {size}": size for size in (8, 64)}
#: The rewards of one step of a usual GRPO run.
SIDE_SHAPES = ({"rewards": 1024},)


def scattered(rewards, ids, count):
    """As one would write it knowing that the ids are numbers below `count`."""
    zeros = rewards.new_zeros(count)
    size = zeros.index_add(0, ids, torch.ones_like(rewards))
    mean = zeros.index_add(0, ids, rewards) / size
    centred = rewards - mean[ids]
    variance = zeros.index_add(0, ids, centred.square()) / (size - 1).clamp(min=1)
    advantages = centred / (variance.sqrt()[ids] + EPS)
    return advantages.where(size[ids] > 1, 0.0)


def scattered_by_any(rewards, ids, count):
    """For ids that may be any numbers, which is what rlkern serves."""
    found, places = torch.unique(ids, return_inverse=True)
    return scattered(rewards, places, found.numel())


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


def build_verl(name: str):
    """Of rewards at a completion's one token."""
    function = peers.member("verl.trainer.ppo.core_algos", name)
    ones: dict[int, torch.Tensor] = {}

    def run(rewards, ids, count):
        if len(rewards) not in ones:
            ones[len(rewards)] = torch.ones(len(rewards), 1)
        found = function(rewards[:, None], ones[len(rewards)], ids.numpy(), epsilon=EPS)
        return found[0].squeeze(1)

    return run


def view_of(size: int):
    """As GRPO trainers write it, the groups one after another."""

    def run(rewards):
        groups = rewards.view(-1, size)
        centred = groups - groups.mean(1, keepdim=True)
        return (centred / (groups.std(1, keepdim=True) + EPS)).view(-1)

    return run


def build_equal(size: int):
    import rlkern

    with rlkern.use_backend("native"):
        rlkern.group_advantages(torch.zeros(2), group_size=2)
    return lambda rewards: rlkern.group_advantages(rewards, group_size=size)


EQUAL_BUILDERS = {
    "rlkern": build_equal,
    "eager": view_of,
    "torch.compile": lambda size: torch.compile(view_of(size), dynamic=False),
}


def build_groups():
    import rlkern

    # A block around each call would weigh as much as the call: where there are native kernels
    # they are the automatic choice.
    with rlkern.use_backend("native"):
        rlkern.group_advantages(torch.zeros(2), group_size=2)
    return lambda rewards, ids, count: rlkern.group_advantages(rewards, group_ids=ids)


GROUP_BUILDERS = {
    "rlkern": build_groups,
    "eager, any ids": lambda: scattered_by_any,
    "eager": lambda: scattered,
    "torch.compile": lambda: torch.compile(scattered, dynamic=False),
    "a loop over groups": lambda: looped,
    "verl": lambda: build_verl("compute_grpo_vectorized_outcome_advantage"),
    "verl, its loop": lambda: build_verl("compute_grpo_outcome_advantage"),
}


class GroupAdvantages(Case):
    """Rewards of groups of 2 to 14 completions; "eager" and "torch.compile" are told that the ids
    are dense, and how many there are."""

    operator = "group_advantages"
    contestants = tuple(
        Contestant(task, name, build)
        for task in (SORTED, SHUFFLED)
        for name, build in GROUP_BUILDERS.items()
    ) + tuple(
        Contestant(task, name, lambda build=build, size=size: build(size))
        for task, size in EQUAL.items()
        for name, build in EQUAL_BUILDERS.items()
    )
    #: Rewards are read and advantages written, in fp32, and the ids read, twice as wide.
    bounds = {task: ("copy", "read", "read") for task in (SORTED, SHUFFLED)} | {
        task: ("copy",) for task in EQUAL
    }
    tolerance = TOLERANCE

    def __init__(self, rewards: int, cache: str) -> None:
        self.cache = cache
        generator = torch.Generator().manual_seed(0)
        self.bulk = torch.randn(rewards, generator=generator)
        sizes = torch.randint(2, 2 * GROUP_MEAN - 1, (rewards,), generator=generator)
        ids = torch.repeat_interleave(torch.arange(rewards), sizes)[:rewards]
        # No group of one at the end, which verl leaves as it is.
        ids[-2:] = ids[-2]
        self.count = int(ids[-1]) + 1
        self.rewards = self.bulk.clone()
        order = torch.randperm(rewards, generator=generator)
        self.ids = {SORTED: ids, SHUFFLED: ids[order]}

    @staticmethod
    def floors(**params: Any) -> tuple[Floor, ...]:
        if {name: params[name] for name in SHAPE} != SHAPE:
            return ()
        # "eager" knows of its ids what rlkern has to find out; sorted they tell it for little.
        return tuple(
            Floor(f"{t}/rlkern", (f"{t}/{peer}",), 10)
            for t, peer in (
                (SORTED, "eager, any ids"),
                (SORTED, "eager"),
                (SHUFFLED, "eager, any ids"),
            )
        )

    def prepare(self, task: str) -> tuple[Any, ...]:
        # The ceilings scale the bulk in place.
        self.bulk.copy_(self.rewards)
        return (self.bulk,) if task in EQUAL else (self.bulk, self.ids[task], self.count)

    def errors(self, task: str, outputs: Any) -> dict[str, float]:
        """The worst advantage's distance from float64's, relative above 1."""
        rewards = self.rewards.double()
        if task in EQUAL:
            exact = view_of(EQUAL[task])(rewards)
        else:
            exact = scattered(rewards, self.ids[task], self.count)
        return {"advantages": worst(outputs, exact)}


def worst(outputs, exact) -> float:
    return ((outputs.double() - exact).abs() / exact.abs().clamp(min=1)).max().item()


SHAPES = [(SHAPE | {"cache": cache}, plan) for cache, plan in (("warm", FULL), ("cold", SHORT))]
SHAPES += [(shape | {"cache": "warm"}, SHORT) for shape in SIDE_SHAPES]


@pytest.mark.parametrize("shape, plan", SHAPES, ids=[str([*s.values()]) for s, _ in SHAPES])
@pytest.mark.parametrize("contestant", [c.key for c in GroupAdvantages.contestants])
def test_group_advantages(contest, quick, shape, plan, contestant):
    if quick:
        shape = QUICK_SHAPE | {"cache": shape["cache"]}
    contest(GroupAdvantages, shape, contestant, plan)

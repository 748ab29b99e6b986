"""group_advantages on a GPU: 65536 rewards in groups of any sizes and order, and 8192 in groups of
eight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.contestants import relative, usual
from benchmarks.gpu.registry import GpuCase, register

RAGGED, EQUAL = "65536 by ids", "8192 in groups of 8"
EPS = 1e-4


def ours(rewards, ids):
    import rlkern

    if ids is None:
        return rlkern.group_advantages(rewards, group_size=8)
    return rlkern.group_advantages(rewards, group_ids=ids)


def by_ids(rewards, ids):
    groups, index = torch.unique(ids, return_inverse=True)  # waits for the GPU

    def total(x):
        return x.new_zeros(len(groups)).index_add(0, index, x)

    size = total(torch.ones_like(rewards))
    off = rewards - (total(rewards) / size)[index]
    std = (total(off**2) / (size - 1).clamp(min=1)).sqrt()
    return off / (std[index] + EPS)


def by_eight(rewards, ids):
    groups = rewards.view(-1, 8)
    off = groups - groups.mean(1, keepdim=True)
    return (off / (groups.std(1, keepdim=True) + EPS)).flatten()


EAGER = {RAGGED: by_ids, EQUAL: by_eight}


@register
class GroupAdvantages(GpuCase):
    operator = "group_advantages"
    contestants = (*usual(RAGGED, ours, by_ids, compiles=False), *usual(EQUAL, ours, by_eight))

    @staticmethod
    def small_calls(device: str) -> None:
        import rlkern
        from rlkern.reference.group_advantages import BASELINES

        count = 120
        rewards = torch.randn(count, device=device)
        rewards[7] = torch.nan
        extra = {
            "length_weighted": {"lengths": torch.arange(count, device=device)},
            "given": {"baseline_rewards": torch.zeros(count, device=device)},
        }
        ids = torch.randint(-9, 9, (count,), device=device)
        for groups in ({"group_ids": ids}, {"group_size": 5}, {"group_size": 40}):
            for baseline in BASELINES:
                rlkern.group_advantages(
                    rewards, **groups, baseline=baseline, **extra.get(baseline, {})
                )
            rlkern.group_advantages(torch.randn(count, 3, device=device), **groups)

    def __init__(self, device: str, tiny: bool) -> None:
        super().__init__(device, tiny)
        g = torch.Generator(device).manual_seed(0)
        self.inputs: dict[str, tuple[Tensor, Tensor | None]] = {}
        for task, count in ((RAGGED, 65536), (EQUAL, 8192)):
            count = 64 if tiny else count
            # Scores in eighths: rewards that nearly tie make every fp32 formula wrong.
            rewards = torch.randint(0, 9, (count,), generator=g, device=device) / 8
            ids = None
            if task == RAGGED:
                ids = torch.randint(0, count // 8, (count,), generator=g, device=device) * 2**40
            self.inputs[task] = rewards, ids

    def shape(self) -> str:
        return "float32"

    def prepare(self, task: str) -> tuple[Any, ...]:
        return self.inputs[task]

    def bytes_moved(self, task: str) -> int:
        """Rewards and ids; advantages."""
        rewards, ids = self.inputs[task]
        return len(rewards) * (4 + 4 + (0 if ids is None else 8))

    def errors(self, task: str, outputs: Any) -> dict[str, tuple[float, float]]:
        """Against the same lines in float64: in fp32 a few roundings of sums of eight."""
        rewards, ids = self.inputs[task]
        return {"advantages": (relative(outputs, EAGER[task](rewards.double(), ids)), 1e-5)}

"""Group-wise reward normalisation: A = (s - baseline) / (scale + eps), statistics in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BASELINES = (
    "mean",
    "leave_one_out",
    "length_weighted",
    "pass_at_k",
    "batch_mean",
    "given",
    "none",
)
#: Those that are the group's own.
GROUP_BASELINES = BASELINES[:4]
SCALES = ("std", "batch_std", "mean", "none")
SINGLETONS = ("zero", "raw")


class GroupOptions(NamedTuple):
    """In the order of csrc/common/group_advantages.h, names as their place in their list."""

    baseline: str = "mean"
    scale: str = "std"
    unbiased: bool = True
    eps: float = 1e-4
    singleton: str = "zero"
    joined: bool = False  # several rewards: their weighted sum, and no more
    normalized: bool = False  # and that over the batch

    def uses_group(self) -> bool:
        return self.baseline in GROUP_BASELINES or self.scale in ("std", "mean")

    def uses_batch(self) -> bool:
        return self.baseline == "batch_mean" or self.scale == "batch_std"

    def numbers(self) -> list[float]:
        return [
            float(BASELINES.index(self.baseline)),
            float(SCALES.index(self.scale)),
            float(self.unbiased),
            self.eps,
            float(self.singleton == "raw"),
            float(self.joined),
            float(self.normalized),
        ]


class GroupBatch(NamedTuple):
    """Rewards [N, K] and what belongs to them."""

    rewards: Tensor
    group_size: int = 0  # 0: by group_ids
    group_ids: Tensor | None = None  # [N] int64
    lengths: Tensor | None = None  # [N]
    given: Tensor | None = None  # [N, K]
    weights: Tensor | None = None  # [K]


class _Groups:
    """Sums over groups, spread over their members; NaN rewards are in none of them."""

    def __init__(self, index: Tensor, count: int, scored: Tensor) -> None:
        self.index, self.count, self.scored = index, count, scored
        self.size = self.total(scored.double())

    def total(self, x: Tensor) -> Tensor:
        """0 where not scored."""
        x = x.where(self.scored, 0.0)
        return x.new_zeros(self.count).index_add(0, self.index, x)[self.index]

    def extreme(self, x: Tensor, reduce: str) -> Tensor:
        fill = torch.inf if reduce == "amin" else -torch.inf
        found = x.new_full((self.count,), fill)
        return found.scatter_reduce(0, self.index, x.where(self.scored, fill), reduce)[self.index]

    def has(self, flags: Tensor) -> Tensor:
        return self.total(flags.double()) > 0

    def moments(self, s: Tensor, options: GroupOptions) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and standard deviation, and the deviations from the mean.

        About the group's smallest reward, so that equal ones deviate by exactly 0 and 1e6 + {0, 1}
        by 0.5. Of one reward: mean 0 and deviation 1, which keep it as it is.
        """
        least = self.extreme(s, "amin")
        rise = s - least
        mean_rise = self.total(rise) / self.size.clamp(min=1)
        centred = rise - mean_rise
        degrees = self.size - 1 if options.unbiased else self.size
        std = (self.total(centred**2) / degrees.clamp(min=1)).sqrt()
        single = self.size == 1
        return (
            (least + mean_rise).where(~single, 0.0),
            std.where(~single, 1.0),
            centred.where(~single, s),
        )


def group_advantages(batch: GroupBatch, options: GroupOptions) -> Tensor:
    """[N], in float64 throughout and rounded once to the rewards' dtype."""
    rewards = batch.rewards.double()
    rows = torch.arange(rewards.shape[0], device=rewards.device)
    if batch.group_ids is None:
        index, count = rows // batch.group_size, rewards.shape[0] // batch.group_size
    else:
        ids, index = torch.unique(batch.group_ids, return_inverse=True)
        count = ids.shape[0]
    lengths = None if batch.lengths is None else batch.lengths.double()
    columns = [
        _column(
            rewards[:, k],
            None if batch.given is None else batch.given[:, k].double(),
            lengths,
            index,
            count,
            options,
        )
        for k in range(rewards.shape[1])
    ]
    if not options.joined:
        return columns[0].to(batch.rewards.dtype)
    # A NaN cell adds nothing; a row of them is left out.
    weights = rewards.new_ones(len(columns)) if batch.weights is None else batch.weights.double()
    total = (torch.stack(columns, 1) * weights).sum(1)
    if options.normalized:
        left_out = rewards.isnan().all(1)
        # NaN says that the row is left out; a sum that is NaN counts, and spoils the batch.
        total = total.where(~total.isnan(), torch.inf)
        total = _column(
            total.where(~left_out, torch.nan),
            None,
            None,
            torch.zeros_like(rows),
            1,
            GroupOptions(unbiased=options.unbiased, eps=options.eps),
        )
    return total.to(batch.rewards.dtype)


def _column(
    s: Tensor,
    given: Tensor | None,
    lengths: Tensor | None,
    index: Tensor,
    count: int,
    options: GroupOptions,
) -> Tensor:
    """The advantages of one reward per sample."""
    scored = ~s.isnan()
    s = s.where(scored, 0.0)
    group = _Groups(index, count, scored)
    whole = _Groups(torch.zeros_like(index), 1, scored)
    mean, std, centred = group.moments(s, options)
    single, others = group.size == 1, (group.size - 1).clamp(min=1)

    if options.baseline == "mean":
        difference = centred
    elif options.baseline == "leave_one_out":
        # s - (sum - s) / (n - 1)
        difference = centred * (group.size / others).where(~single, 1.0)
    elif options.baseline == "length_weighted":
        assert lengths is not None
        weighted = group.total(lengths * centred) / _nonzero(group.total(lengths))
        difference = (centred - weighted).where(~single, s)
    elif options.baseline == "pass_at_k":
        difference = _best_over_second(s, group).where(~single, s)
    elif options.baseline == "batch_mean":
        difference = whole.moments(s, options)[2]
    elif options.baseline == "given":
        assert given is not None
        difference = s - given
    else:
        difference = s

    batch_single = whole.size == 1
    alone, infinite = torch.zeros_like(scored), torch.zeros_like(scored)
    if options.uses_group():
        alone, infinite = alone | single, infinite | group.has(s.isinf())
    if options.uses_batch():
        alone, infinite = alone | batch_single, infinite | whole.has(s.isinf())
    if options.scale == "none":
        advantage = difference
    elif options.scale == "mean":
        scale = mean.where(~single, 1.0)
        advantage = (difference / (scale + options.eps)).where(scale > 0, 0.0)
    else:
        scale = std if options.scale == "std" else whole.moments(s, options)[1]
        advantage = difference / (scale + options.eps)
        if options.baseline != "none":
            # Equal rewards have no direction, whatever they are compared with.
            advantage = advantage.where(scale != 0, 0.0)
    if options.singleton == "zero":
        advantage = advantage.where(~alone, 0.0)
    advantage = advantage.where(~infinite, torch.nan)
    return advantage.where(scored, 0.0)


def _nonzero(x: Tensor) -> Tensor:
    return x.where(x != 0, 1.0)


def _best_over_second(s: Tensor, group: _Groups) -> Tensor:
    """The best sample's lead, at the first of the best; 0 at all others."""
    best = group.extreme(s, "amax")
    rows = torch.arange(s.shape[0], device=s.device)
    is_best = group.scored & (s == best)
    # Smallest row among the best of each group.
    first = rows.new_full((group.count,), s.shape[0])
    first = first.scatter_reduce(0, group.index, rows.where(is_best, s.shape[0]), "amin")
    chosen = first[group.index] == rows
    second = s.new_full((group.count,), -torch.inf)
    rest = s.where(group.scored & ~chosen, -torch.inf)
    second = second.scatter_reduce(0, group.index, rest, "amax")[group.index]
    return torch.where(chosen, s - second, 0.0)

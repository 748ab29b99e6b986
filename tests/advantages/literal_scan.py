"""gae, discounted_returns and vtrace of formulas.md read literally: one sequence, one token at a
time, in Python's floats, which are float64.

With every value comes its scale: the same recurrence over absolute values, to which rounding
errors are relative.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


class Literal(NamedTuple):
    """Two results and their scales, float64, in the layout of the batch."""

    first: torch.Tensor
    second: torch.Tensor
    first_scale: torch.Tensor
    second_scale: torch.Tensor


def walk(row, bootstrap, gamma, lam, mask_mode, bars):
    """(first, second, scale of both) of each token, None where it is masked.

    Args:
        row: (reward, value, log_ratio, counts, done) of each token; log_ratio None for gae.
    """
    results = [None] * len(row)
    next_value, x, x_scale = bootstrap, 0.0, 0.0
    begun = False
    for t in reversed(range(len(row))):
        reward, value, log_ratio, counts, done = row[t]
        if not counts:
            if mask_mode == "carry" or not begun:
                continue
            reward, value, log_ratio, done = 0.0, 0.0, None if log_ratio is None else 0.0, False
        begun = True
        discount = 0.0 if done else gamma
        rho = c = rho_pg = 1.0
        if log_ratio is not None:
            ratio = math.exp(log_ratio) if log_ratio < 709 else math.inf
            rho, c, rho_pg = (min(bar, ratio) for bar in bars)
        if done:
            next_value = x = x_scale = 0.0  # also where they are not finite
        delta = reward + discount * next_value - value
        scale = abs(reward) + discount * abs(next_value) + abs(value)
        advantage = rho_pg * (reward + discount * (next_value + lam * x) - value)
        advantage_scale = rho_pg * (scale + discount * lam * x_scale)
        x = rho * delta + discount * lam * c * x
        x_scale = rho * scale + discount * lam * c * x_scale
        if counts and log_ratio is None:
            results[t] = (x, x + value, x_scale, x_scale + abs(value))
        elif counts:
            results[t] = (x + value, advantage, x_scale + abs(value), advantage_scale)
        next_value = value
    return results


def literal(batch, *, gamma, lam, mask_mode="carry", bars=(1.0, 1.0, 1.0)) -> Literal:
    """Of a batch that holds rewards and, where given, values, log_ratios, mask, dones,
    bootstrap_value and cu_seqlens; lam a number or [B]. bars: of rho, c and rho_pg.

    Without values the first results are discounted returns, and lam has to be 1.
    """
    rewards = batch["rewards"]
    assert "values" in batch or lam == 1.0
    shape = rewards.shape
    out = torch.zeros(4, *shape, dtype=torch.float64)
    if "cu_seqlens" in batch:
        ends = batch["cu_seqlens"].tolist()
        places = [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]
    else:
        places = list(range(shape[0]))
    lams = lam.tolist() if isinstance(lam, torch.Tensor) else [lam] * len(places)

    def column(name, place, otherwise):
        if batch.get(name) is None:
            return [otherwise] * rewards[place].shape[0]
        return batch[name][place].tolist()

    bootstraps = batch.get("bootstrap_value")
    for i, place in enumerate(places):
        row = zip(
            column("rewards", place, None),
            column("values", place, 0.0),
            column("log_ratios", place, None),
            column("mask", place, True),
            column("dones", place, False),
            strict=True,
        )
        bootstrap = 0.0 if bootstraps is None else float(bootstraps[i])
        results = walk(list(row), bootstrap, gamma, lams[i], mask_mode, bars)
        rows = [(0.0,) * 4 if result is None else result for result in results]
        out[(slice(None), *((place,) if isinstance(place, slice) else (i,)))] = (
            torch.tensor(rows, dtype=torch.float64).reshape(-1, 4).T
        )
    return Literal(*out)

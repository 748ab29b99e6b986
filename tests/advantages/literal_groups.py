"""group_advantages and whiten as literal Python: the formulas over lists, their sums exact.

Rewards are taken as fractions, so that a mean and a variance have no rounding of their own.
"""

from __future__ import annotations

import math
from fractions import Fraction

GROUP_BASELINES = ("mean", "leave_one_out", "length_weighted", "pass_at_k")


def mean(values):
    return sum(map(Fraction, values), Fraction(0)) / len(values)


def variance(values, unbiased):
    centre = mean(values)
    squares = sum(((Fraction(v) - centre) ** 2 for v in values), Fraction(0))
    return squares / (len(values) - 1 if unbiased else len(values))


def root(x):
    """Of a fraction, also of one that no float holds well."""
    return math.sqrt(x)


def subtracted(baseline, i, s, mine, everyone, lengths, given):
    """What the advantage of reward i is made of, its baseline taken off."""
    x = Fraction(s[i])
    if baseline == "mean":
        return x - mean([s[j] for j in mine])
    if baseline == "leave_one_out":
        return x - mean([s[j] for j in mine if j != i])
    if baseline == "length_weighted":
        weight = sum(Fraction(lengths[j]) for j in mine)
        if weight == 0:
            return x - mean([s[j] for j in mine])
        return x - sum(Fraction(lengths[j]) * Fraction(s[j]) for j in mine) / weight
    if baseline == "pass_at_k":
        best = max(s[j] for j in mine)
        first = next(j for j in mine if s[j] == best)
        return x - Fraction(max(s[j] for j in mine if j != first)) if i == first else Fraction(0)
    if baseline == "batch_mean":
        return x - mean([s[j] for j in everyone])
    return x - (Fraction(given[i]) if baseline == "given" else 0)


def advantage(i, s, mine, everyone, baseline, scale, unbiased, eps, singleton, lengths, given):
    alone, batch_alone = len(mine) == 1, len(everyone) == 1
    needs_group = baseline in GROUP_BASELINES or scale in ("std", "mean")
    needs_batch = baseline == "batch_mean" or scale == "batch_std"
    if singleton == "zero" and ((needs_group and alone) or (needs_batch and batch_alone)):
        return 0.0
    # A single reward has mean 0 and deviation 1: it is kept.
    kept = alone if baseline in GROUP_BASELINES else baseline == "batch_mean" and batch_alone
    x = Fraction(s[i])
    if not kept:
        x = subtracted(baseline, i, s, mine, everyone, lengths, given)
    if scale == "none":
        return float(x)
    if scale == "mean":
        mu = Fraction(1) if alone else mean([s[j] for j in mine])
        return 0.0 if mu <= 0 else float(x) / (float(mu) + eps)
    over, single = (mine, alone) if scale == "std" else (everyone, batch_alone)
    sigma = 1.0 if single else root(variance([s[j] for j in over], unbiased))
    if sigma == 0 and baseline != "none":
        return 0.0
    return float(x) / (sigma + eps)


def column(
    s,
    groups,
    baseline="mean",
    scale="std",
    unbiased=True,
    eps=1e-4,
    singleton="zero",
    lengths=None,
    given=None,
):
    """Advantages of one reward per completion; `groups` has a label for each."""
    everyone = [i for i, x in enumerate(s) if not math.isnan(x)]
    result = [0.0] * len(s)
    for i in everyone:
        mine = [j for j in everyone if groups[j] == groups[i]]
        result[i] = advantage(
            i, s, mine, everyone, baseline, scale, unbiased, eps, singleton, lengths, given
        )
    return result


def weighted_sum(rows, groups, weights, given=None, **options):
    """Of the columns' advantages, and which rows have a reward."""
    columns = list(zip(*rows, strict=True))
    givens = [None] * len(columns) if given is None else list(zip(*given, strict=True))
    parts = [column(c, groups, given=g, **options) for c, g in zip(columns, givens, strict=True)]
    total = [
        sum(w * a for w, a in zip(weights, row, strict=True)) for row in zip(*parts, strict=True)
    ]
    return total, [not all(map(math.isnan, row)) for row in rows]


def several(rows, groups, weights, unbiased=True, eps=1e-4, **options):
    """GDPO over sequences: each column normalised, then their sum."""
    total, counts = weighted_sum(rows, groups, weights, unbiased=unbiased, eps=eps, **options)
    total = [x if counted else math.nan for x, counted in zip(total, counts, strict=True)]
    return column(total, [0] * len(total), unbiased=unbiased, eps=eps)


def whitened(values, mask, shift_mean=True, scale=True, unbiased=True, eps=1e-8, eps_mode="add"):
    """Of a flat list."""
    counting = [x for x, m in zip(values, mask, strict=True) if m]
    centre, factor, offset = mean(counting), 1.0, 0.0
    if scale:
        var = float(variance(counting, unbiased))
        factor = 1 / math.sqrt(var + eps if eps_mode == "add" else max(var, eps))
        offset = 0.0 if shift_mean else float(centre)
    return [
        float(Fraction(x) - centre) * factor + offset if m else 0.0
        for x, m in zip(values, mask, strict=True)
    ]

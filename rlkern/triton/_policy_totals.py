"""What policy_loss keeps of a sequence, and what follows of the batch's: loss, metrics, scales.

The counterpart of csrc/common/policy_totals.h.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rlkern.triton._math import INF
from rlkern.triton._policy_math import (
    CISPO,
    GMPO,
    SEQ_MEAN_TOKEN_SUM_NORM,
    TOKEN_MEAN,
    TOKEN_SUM,
    UNCORRECTED,
    VESPO,
)

# A sequence's totals, float64: 22 sums and 6 maxima in the order of csrc/common/policy_totals.h.
COLUMNS = tl.constexpr(32)
METRIC_SUMS = tl.constexpr(18)
SUMS = tl.constexpr(22)
TOTALS = tl.constexpr(28)

METRICS = METRIC_SUMS.value + TOTALS.value - SUMS.value


@triton.jit
def store_totals(
    row, tokens, at_least_one, ratio_here, ratio_max, minus_ratio_min, gmpo_loss, share64,
    t_loss, t_kl, t_entropy, t_approx, t_low, t_high, t_extra, t_ratio, t_rollout, t_squared,
    t_kept, t_phi, t_bonus, t_chosen,
    SURROGATE: tl.constexpr, BY_SEQUENCE: tl.constexpr, CORRECTION: tl.constexpr,
    OFF_POLICY: tl.constexpr, ONE_ADVANTAGE: tl.constexpr, BONUS_SHARED: tl.constexpr,
):  # fmt: skip
    """A sequence's row."""
    zero = tl.full((), 0.0, tl.float64)
    none = tokens == 0
    one = zero + 1.0
    units = tokens
    metric_share = one
    if BY_SEQUENCE:
        units = one
        metric_share = 1.0 / at_least_one
        t_ratio = zero + ratio_here
        largest = t_ratio
        least = t_ratio
    else:
        largest = zero + tl.max(ratio_max, 0)
        least = zero - tl.max(minus_ratio_min, 0)
    tl.store(row, tokens)
    tl.store(row + 1, one)
    tl.store(row + 2, units)
    if SURROGATE == GMPO:
        tl.store(row + 3, gmpo_loss)
    else:
        tl.store(row + 3, t_loss * share64)
    tl.store(row + 4, zero)
    tl.store(row + 5, t_kl)
    tl.store(row + 6, t_entropy)
    tl.store(row + 7, t_approx)
    tl.store(row + 8, t_low * metric_share)
    tl.store(row + 9, t_high * metric_share)
    if SURROGATE == CISPO:
        tl.store(row + 10, zero)
        tl.store(row + 11, t_extra * metric_share)
    else:
        tl.store(row + 10, t_extra * metric_share)
        tl.store(row + 11, zero)
    tl.store(row + 12, t_ratio)
    if CORRECTION != UNCORRECTED:
        tl.store(row + 13, t_rollout)
        tl.store(row + 14, t_squared)
    else:
        tl.store(row + 13, tokens)
        tl.store(row + 14, tokens)
    if OFF_POLICY:
        tl.store(row + 15, t_kept)
    else:
        tl.store(row + 15, tokens)
    if SURROGATE == VESPO:
        if ONE_ADVANTAGE:
            # A sequence without a token has phi(w = 1), as in TRL.
            tl.store(row + 16, tl.where(none, 1.0, t_phi / at_least_one))
            tl.store(row + 17, one)
        else:
            tl.store(row + 16, t_phi)
            tl.store(row + 17, tokens)
    else:
        tl.store(row + 16, zero)
        tl.store(row + 17, zero)
    tl.store(row + 18, t_kl * share64)
    if BONUS_SHARED:
        tl.store(row + 19, t_bonus * share64)
    else:
        tl.store(row + 19, t_bonus)
    tl.store(row + 20, t_chosen)
    tl.store(row + 21, tl.where(none, zero, one))
    tl.store(row + 22, largest)
    tl.store(row + 23, -least)
    low_share = t_low / at_least_one
    high_share = t_high / at_least_one
    # Without a token, a sequence has no share, except at the level of sequences, where it is one.
    absent = zero - INF
    if BY_SEQUENCE:
        absent = zero
    tl.store(row + 24, tl.where(none, absent, low_share))
    tl.store(row + 25, tl.where(none, absent, -low_share))
    tl.store(row + 26, tl.where(none, absent, high_share))
    tl.store(row + 27, tl.where(none, absent, -high_share))


@triton.jit
def _given(tensor, number, rest, zero):
    """A denominator in float64, NaN where the caller gave none; a number comes in two floats."""
    if tensor is None:
        return zero + number + rest
    else:
        return tl.load(tensor)


@triton.jit
def _entry(values, columns, i):
    return tl.sum(tl.where(columns == i, values, 0.0), 0)


@triton.jit(do_not_specialize=["sequences"])
def finish_kernel(
    totals, sequences,
    normalizer, normalizer_number, normalizer_rest,
    num_sequences, num_sequences_number, num_sequences_rest,
    entropy_normalizer, entropy_normalizer_number, entropy_normalizer_rest,
    kl_coef, entropy_coef,
    loss, metrics, scale,
    AGGREGATION: tl.constexpr, SKIP_EMPTY: tl.constexpr, KL: tl.constexpr,
    BONUS: tl.constexpr, BONUS_SAME: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What follows from the sequences' totals, as policy_result in csrc/common/policy_totals.h."""
    column = tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    zero = tl.full((), 0.0, tl.float64)
    is_max = (column >= SUMS)[None, :]
    total = tl.where(is_max, zero - INF, tl.zeros([ROWS, COLUMNS], tl.float64))
    for start in range(0, sequences, ROWS):
        inside = (start + row < sequences)[:, None] & (column < TOTALS)[None, :]
        at = (start + row).to(tl.int64)[:, None] * COLUMNS + column[None, :]
        x = tl.load(totals + at, mask=inside, other=0.0)
        total = tl.where(
            is_max, tl.where(inside & (x > total), x, total), total + tl.where(inside, x, 0.0)
        )
    sums = tl.sum(tl.where(is_max, 0.0, total), 0)
    maxima = tl.max(tl.where(is_max, total, zero - INF), 0)

    divisor = zero + 1.0
    own = zero
    norm = _given(normalizer, normalizer_number, normalizer_rest, zero)
    if AGGREGATION == TOKEN_MEAN:
        tokens = _entry(sums, column, 0)
        is_given = norm == norm
        divisor = tl.where(is_given, norm, tl.where(tokens > 1, tokens, 1.0))
        own = tl.where(is_given, zero, tokens)
    elif AGGREGATION != TOKEN_SUM:
        wanted = _given(num_sequences, num_sequences_number, num_sequences_rest, zero)
        is_given = wanted == wanted
        there = _entry(sums, column, 21 if SKIP_EMPTY else 1)
        divisor = tl.where(is_given, wanted, tl.where(there > 1, there, 1.0))
        own = tl.where(is_given, zero, there)
        if AGGREGATION == SEQ_MEAN_TOKEN_SUM_NORM:
            divisor *= norm
    bonus_divisor = divisor
    if not BONUS_SAME:
        wanted = _given(
            entropy_normalizer, entropy_normalizer_number, entropy_normalizer_rest, zero
        )
        chosen = _entry(sums, column, 20)
        bonus_divisor = tl.where(wanted == wanted, wanted, tl.where(chosen > 1, chosen, 1.0))

    policy = _entry(sums, column, 3)
    value = policy
    if KL:
        value += _entry(sums, column, 18) * kl_coef
    value = value / divisor
    if BONUS:
        value -= _entry(sums, column, 19) * entropy_coef / bonus_divisor
    tl.store(loss, value.to(tl.float32))
    tl.store(scale, (1.0 / divisor).to(tl.float32))
    tl.store(scale + 1, (1.0 / bonus_divisor).to(tl.float32))
    # What the caller did not fix divides the merged sums; what it did, this batch's.
    merged = policy * tl.where(own > 1, own, 1.0) / divisor
    sums = tl.where(column == 3, merged, tl.where(column == 4, own, sums))
    tl.store(metrics + column, sums, mask=column < METRIC_SUMS)
    is_maximum = (column >= SUMS) & (column < TOTALS)
    tl.store(metrics + (METRIC_SUMS - SUMS) + column, maxima, mask=is_maximum)

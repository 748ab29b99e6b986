"""What the terms of policy_loss need to know of their whole sequence."""

from __future__ import annotations

import triton
import triton.language as tl

from rlkern.triton._math import clamped, product
from rlkern.triton._policy_math import (
    GMPO,
    LOG_BOUND,
    VESPO,
    VESPO_LOG_FLOOR,
    correction_weight,
    gmpo_term,
    or_zero,
)
from rlkern.triton._tokens import counting, floats, floats_or


@triton.jit
def sequence_sums(
    logprobs, advantages, mask, old_logprobs, rollout_logprobs, token_weights,
    sequence, begin, size, lane, one_advantage,
    logprobs_row, advantages_row, mask_row, old_row, rollout_row, weights_row,
    clip_low, clip_high, log_ratio_clamp, correction_low, correction_high,
    SURROGATE: tl.constexpr, SUMS_D: tl.constexpr, OFF_POLICY: tl.constexpr,
    SEQUENCE_CORRECTION: tl.constexpr, LOG_WEIGHTS: tl.constexpr,
    CORRECTION_MASKS: tl.constexpr, SHARED: tl.constexpr, ONE_ADVANTAGE: tl.constexpr,
    BLOCK: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Sums in float64, 0 where nobody asks for them, and how many tokens count."""
    zero = tl.full((), 0.0, tl.float64)
    NEEDS_SUMS: tl.constexpr = SUMS_D or SURROGATE == GMPO or OFF_POLICY or SEQUENCE_CORRECTION
    t_d = zero
    t_correction = zero
    t_drift = zero
    t_log_weight = zero
    t_clipped = zero
    t_weight = zero
    t_advantage = zero
    count = size
    if NEEDS_SUMS or (SHARED and mask is not None):
        counted = tl.zeros([BLOCK], tl.int32)
        for chain in range(0, size, CHAIN * BLOCK):
            s_d = tl.zeros([BLOCK], tl.float32)
            s_correction = tl.zeros([BLOCK], tl.float32)
            s_drift = tl.zeros([BLOCK], tl.float32)
            s_log_weight = tl.zeros([BLOCK], tl.float32)
            s_clipped = tl.zeros([BLOCK], tl.float32)
            s_weight = tl.zeros([BLOCK], tl.float32)
            s_advantage = tl.zeros([BLOCK], tl.float32)
            for start in range(chain, tl.minimum(chain + CHAIN * BLOCK, size), BLOCK):
                at = begin + start
                inside = lane < tl.minimum(size - start, BLOCK).to(tl.int32)
                counts = counting(mask, sequence * mask_row + at, lane, inside)
                counted += counts.to(tl.int32)
                if NEEDS_SUMS:
                    logprob = floats(logprobs, sequence * logprobs_row + at, lane, inside, counts)
                    old = floats_or(
                        old_logprobs, sequence * old_row + at, lane, inside, counts, logprob
                    )
                    d = logprob - old
                    if SUMS_D:
                        if SURROGATE == VESPO:
                            s_d += clamped(d, -log_ratio_clamp, log_ratio_clamp)
                        else:
                            s_d += d
                    if rollout_logprobs is not None:
                        rollout = floats(
                            rollout_logprobs, sequence * rollout_row + at, lane, inside, counts
                        )
                    else:
                        rollout = old
                    if SEQUENCE_CORRECTION:
                        s_correction += or_zero(old - rollout)
                    if OFF_POLICY:
                        s_drift += or_zero(rollout - logprob)
                    if LOG_WEIGHTS:
                        log_weight = tl.log(
                            correction_weight(
                                or_zero(old - rollout), correction_low, correction_high,
                                CORRECTION_MASKS,
                            )
                        )  # fmt: skip
                        if SURROGATE == VESPO:
                            log_weight = clamped(log_weight, VESPO_LOG_FLOOR, LOG_BOUND)
                        s_log_weight += tl.where(counts, log_weight, 0.0)
                    if SURROGATE == GMPO:
                        if ONE_ADVANTAGE:
                            a = tl.where(counts, one_advantage, 0.0)
                        else:
                            a = floats(
                                advantages, sequence * advantages_row + at, lane, inside, counts
                            )
                        weight = floats_or(
                            token_weights, sequence * weights_row + at, lane, inside, counts,
                            tl.where(counts, 1.0, 0.0),
                        )  # fmt: skip
                        clipped = gmpo_term(d, a, clip_low, clip_high)[0]
                        s_clipped += product(weight, clipped)
                        s_weight += weight
                        s_advantage += a
            if SUMS_D:
                t_d += tl.sum(s_d, 0).to(tl.float64)
            if SEQUENCE_CORRECTION:
                t_correction += tl.sum(s_correction, 0).to(tl.float64)
            if OFF_POLICY:
                t_drift += tl.sum(s_drift, 0).to(tl.float64)
            if LOG_WEIGHTS:
                t_log_weight += tl.sum(s_log_weight, 0).to(tl.float64)
            if SURROGATE == GMPO:
                t_clipped += tl.sum(s_clipped, 0).to(tl.float64)
                t_weight += tl.sum(s_weight, 0).to(tl.float64)
                t_advantage += tl.sum(s_advantage, 0).to(tl.float64)
        if mask is not None:
            count = tl.sum(counted, 0).to(tl.int64)
    return t_d, t_correction, t_drift, t_log_weight, t_clipped, t_weight, t_advantage, count

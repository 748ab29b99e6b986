"""policy_loss in Triton: loss, gradient and every metric in two launches.

The first has a program per sequence. It walks over the sequence's tokens at most three times, as
the native kernel does: sums that the terms need, the terms with gradient and metrics, and, where
the tokens share a ratio, its gradient. The second is one program that adds the sequences' totals,
in the order in which they lie, and divides. Nothing waits for the host, nothing is added by
atomics: a call repeated has the same bits.

Sums run in fp32 over the lanes of a few blocks, then in float64. The blocks' size depends on
nothing, and accesses are not specialised by alignment, so the order of a sequence's sums depends
on its length alone: not on the other sequences, nor on where it lies in memory.

The formulas and their guards against 0 * inf are csrc/common/policy_formulas.h's.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkern.triton._math import INF, clamped, exp, exp_and_expm1, expm1_less, product
from rlkern.triton._tokens import (
    OPTIONS,
    counting,
    flags,
    floats,
    floats_or,
    fp32,
    require_tokens,
    row_stride,
    two_floats,
)

# 512 threads with 2 tokens each: the sums' lanes are what takes registers. Left to itself ptxas
# spills a little where that lets two programs share a multiprocessor.
_BLOCK = 1024
_WARPS = 16
_MAX_REGISTERS = 128
# Blocks whose terms a lane adds in fp32 before float64 takes over.
_CHAIN = 16
# Totals that the second launch adds at a time.
_ROWS = 128
_FINISH_WARPS = 8
_SCALE_BLOCK = 1024
# A sequence's totals, float64: 22 sums and 6 maxima in the order of csrc/common/policy_totals.h.
_COLUMNS = tl.constexpr(32)
_METRIC_SUMS = tl.constexpr(18)
_SUMS = tl.constexpr(22)
_TOTALS = tl.constexpr(28)

_METRICS = _METRIC_SUMS.value + _TOTALS.value - _SUMS.value

# As csrc/common/policy_options.h numbers them.
_CLIP = tl.constexpr(0)
_CISPO = tl.constexpr(1)
_SAPO = tl.constexpr(2)
_GMPO = tl.constexpr(3)
_VESPO = tl.constexpr(4)
_DPPO_TV = tl.constexpr(5)
_DPPO_KL = tl.constexpr(6)
_TOKEN = tl.constexpr(0)
_SEQUENCE = tl.constexpr(1)
_SEQUENCE_TOKEN = tl.constexpr(2)
_SEQUENCE_SUM = tl.constexpr(3)
_K1 = tl.constexpr(0)
_ABS = tl.constexpr(1)
_K2 = tl.constexpr(2)
_K1_ST = tl.constexpr(4)
_ABS_ST = tl.constexpr(5)
_UNCORRECTED = tl.constexpr(-1)
_BY_TOKEN = tl.constexpr(0)
_GEOMETRIC = tl.constexpr(2)
_TOKEN_MEAN = tl.constexpr(0)
_SEQ_MEAN_TOKEN_MEAN = tl.constexpr(1)
_SEQ_MEAN_TOKEN_SUM_NORM = tl.constexpr(3)
_TOKEN_SUM = tl.constexpr(4)

# Bounds of verl's and TRL's code that no option changes.
_LOG_BOUND = tl.constexpr(20.0)
_SEQUENCE_TOKEN_LOG_BOUND = tl.constexpr(10.0)
_VESPO_LOG_FLOOR = tl.constexpr(math.log(1e-8))
_KL_LOG_BOUND = tl.constexpr(20.0)
_KL_VALUE_BOUND = tl.constexpr(10.0)
_DPPO_EPS = tl.constexpr(1e-8)
_LARGEST = tl.constexpr(3.4028234663852886e38)


# ---- one token ----------------------------------------------------------------------------------


@triton.jit
def _or_zero(x):
    return tl.where(x == x, x, 0.0)


@triton.jit
def _kl_estimate(raw, ESTIMATOR: tl.constexpr, BOUNDED: tl.constexpr):
    """The estimator and its slope with respect to the log-probability; raw = ref - logprob."""
    x = raw
    if BOUNDED:
        x = clamped(raw, -_KL_LOG_BOUND, _KL_LOG_BOUND)
    if ESTIMATOR == _K1 or ESTIMATOR == _K1_ST:
        value = -x
        slope = tl.full(x.shape, 1.0, tl.float32)
    elif ESTIMATOR == _ABS or ESTIMATOR == _ABS_ST:
        value = tl.abs(x)
        slope = tl.where(x > 0, -1.0, tl.where(x < 0, 1.0, 0.0))
    elif ESTIMATOR == _K2:
        value = x * x * 0.5
        slope = -x
    else:
        expm1_x = exp_and_expm1(x)[1]
        value = expm1_less(x, expm1_x)
        slope = -expm1_x
    if BOUNDED:
        inside = (tl.abs(raw) <= _KL_LOG_BOUND) & (tl.abs(value) <= _KL_VALUE_BOUND)
        slope = tl.where(inside, slope, 0.0)
        value = clamped(value, -_KL_VALUE_BOUND, _KL_VALUE_BOUND)
    if ESTIMATOR >= _K1_ST:
        slope = -raw  # straight through: of the unclamped x^2 / 2
    return value, slope


@triton.jit
def _rollout_weight(log_weight, correction_low, correction_high, MASKS: tl.constexpr):
    w = exp(clamped(log_weight, -_LOG_BOUND, _LOG_BOUND))
    if MASKS:
        return tl.where((w >= correction_low) & (w <= correction_high), w, 0.0)
    else:
        return clamped(w, correction_low, correction_high)


@triton.jit
def _vespo_phi(log_w, k, lam):
    phi = exp(lam + k * log_w - lam * exp(log_w))
    return tl.where(phi <= _LARGEST, phi, 0.0)


@triton.jit
def _gmpo_term(d, a, clip_low, clip_high):
    """gmpo's clipped log-ratio, and whether the token's own log-ratio passed."""
    bounded = clamped(d, -clip_low, clip_high)
    is_open = ((a > 0) & (d <= bounded)) | ((a < 0) & (d >= bounded))
    return tl.where(a == 0, 0.0, tl.where(is_open, d, bounded)), is_open


@triton.jit
def _clip_term(r, a, ratio_low, ratio_high, ratio_cap, dual_clip, DUAL: tl.constexpr):
    capped = tl.where(r > ratio_cap, ratio_cap, r)
    free = product(capped, a)
    clipped = product(clamped(r, ratio_low, ratio_high), a)
    is_free = free <= clipped
    loss = -tl.where(is_free, free, clipped)
    # Inside the range the clipped branch is r A too, and the smaller one where a cap below the
    # range's end holds the other.
    free_slope = is_free & (r <= ratio_cap)
    clip_slope = ~is_free & (r >= ratio_low) & (r <= ratio_high)
    slope = tl.where(free_slope | clip_slope, loss, 0.0)
    low = (capped < ratio_low) & (a < 0)
    high = (capped > ratio_high) & (a > 0)
    dual = low
    if DUAL:
        ceiling = -dual_clip * a
        over = (a < 0) & (loss > ceiling)
        loss = tl.where(over, ceiling, loss)
        slope = tl.where(over, 0.0, slope)
        dual = (a < 0) & (capped > dual_clip)
    return loss, slope, low, high, dual


@triton.jit
def _sapo_term(r, a, tau_pos, tau_neg):
    """The sigmoid's derivative is s (1 - s) = e / (1 + e)^2, e = exp(-|u|), which does not
    cancel."""
    tau = tl.where(a > 0, tau_pos, tau_neg)
    u = tau * (r - 1.0)
    e = exp(-tl.abs(u))
    inverse = 1.0 / (1.0 + e)
    sigmoid = tl.where(u >= 0, inverse, tl.where(u < 0, e * inverse, u))
    slope = product(4.0 * e * inverse * inverse, r)
    return -product(4.0 / tau * sigmoid, a), -product(slope, a)


@triton.jit
def _dppo_keeps(a, logprob, old, clip_low, clip_high, KL: tl.constexpr):
    p, p_less = exp_and_expm1(logprob)
    q, q_less = exp_and_expm1(old)
    rises = a > 0
    if KL:
        # 1 - p as -expm1(logprob): by subtraction it would lose what the logarithm looks at.
        ratio = (_DPPO_EPS - q_less) / (_DPPO_EPS - p_less)
        divergence = product(q, old - logprob) + product(-q_less, tl.log(ratio))
        up = (divergence <= clip_high) | (p <= q)
        down = (divergence <= clip_low) | (p >= q)
    else:
        up = p - q <= clip_high
        down = p - q >= -clip_low
    return (rises & up) | (~rises & down)


# ---- one sequence -------------------------------------------------------------------------------


_POINTERS = [
    "logprobs", "advantages", "mask", "old_logprobs", "ref_logprobs", "rollout_logprobs", "entropy",
    "token_weights", "entropy_mask", "offsets", "grad_logprobs", "grad_entropy", "totals",
]  # fmt: skip
_INTEGERS = [
    "length", "logprobs_row", "advantages_row", "mask_row", "old_row", "ref_row", "rollout_row",
    "entropy_row", "weights_row", "entropy_mask_row", "grad_row",
]  # fmt: skip


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_POINTERS)
def _sequence_kernel(
    logprobs, advantages, mask, old_logprobs, ref_logprobs, rollout_logprobs, entropy,
    token_weights, entropy_mask, offsets, grad_logprobs, grad_entropy, totals,
    length, logprobs_row, advantages_row, mask_row, old_row, ref_row, rollout_row,
    entropy_row, weights_row, entropy_mask_row, grad_row,
    clip_low, clip_high, ratio_low, ratio_high, dual_clip, ratio_cap, log_ratio_clamp,
    least_ratio, largest_ratio, kl_coef, entropy_coef, off_policy_threshold,
    correction_low, correction_high, tau_pos, tau_neg, k_pos, lambda_pos, k_neg, lambda_neg,
    SURROGATE: tl.constexpr, LEVEL: tl.constexpr, DUAL: tl.constexpr,
    KL: tl.constexpr, ESTIMATOR: tl.constexpr, KL_BOUNDED: tl.constexpr,
    KL_WEIGHTED: tl.constexpr, BONUS: tl.constexpr, BONUS_SHARED: tl.constexpr,
    SHARED: tl.constexpr, OFF_POLICY: tl.constexpr, CORRECTION: tl.constexpr,
    CORRECTION_MASKS: tl.constexpr, ONE_ADVANTAGE: tl.constexpr,
    BLOCK: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """The gradients of one sequence, without the batch's denominators, and its totals."""
    sequence = tl.program_id(0).to(tl.int64)
    if offsets is None:
        begin = sequence * 0
        size = begin + length
    else:
        begin = tl.load(offsets + sequence)
        size = tl.load(offsets + sequence + 1) - begin
    lane = tl.arange(0, BLOCK)
    zero = tl.full((), 0.0, tl.float64)
    BY_SEQUENCE: tl.constexpr = LEVEL == _SEQUENCE
    COUPLED: tl.constexpr = LEVEL == _SEQUENCE or LEVEL == _SEQUENCE_SUM
    SEQUENCE_CORRECTION: tl.constexpr = CORRECTION > _BY_TOKEN
    DPPO: tl.constexpr = SURROGATE == _DPPO_TV or SURROGATE == _DPPO_KL
    SUMS_D: tl.constexpr = LEVEL != _TOKEN or SURROGATE == _VESPO
    LOG_WEIGHTS: tl.constexpr = CORRECTION == _BY_TOKEN and (
        SURROGATE == _GMPO or SURROGATE == _VESPO
    )
    NEEDS_SUMS: tl.constexpr = SUMS_D or SURROGATE == _GMPO or OFF_POLICY or SEQUENCE_CORRECTION
    CLIPS: tl.constexpr = SURROGATE == _CLIP or SURROGATE == _CISPO or SURROGATE == _GMPO or DPPO
    THROUGH_RATIO: tl.constexpr = SURROGATE == _CLIP or SURROGATE == _SAPO
    THROUGH: tl.constexpr = THROUGH_RATIO or (KL and KL_WEIGHTED)
    # Whether a token has a gradient of its own beside the shared ratio's.
    OWN: tl.constexpr = KL or SURROGATE == _CISPO

    one_advantage = 0.0
    if ONE_ADVANTAGE:
        one_advantage = tl.load(advantages + sequence)

    # -- what the terms need to know of the whole sequence --
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
                        if SURROGATE == _VESPO:
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
                        s_correction += _or_zero(old - rollout)
                    if OFF_POLICY:
                        s_drift += _or_zero(rollout - logprob)
                    if LOG_WEIGHTS:
                        log_weight = tl.log(
                            _rollout_weight(
                                _or_zero(old - rollout), correction_low, correction_high,
                                CORRECTION_MASKS,
                            )
                        )  # fmt: skip
                        if SURROGATE == _VESPO:
                            log_weight = clamped(log_weight, _VESPO_LOG_FLOOR, _LOG_BOUND)
                        s_log_weight += tl.where(counts, log_weight, 0.0)
                    if SURROGATE == _GMPO:
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
                        clipped = _gmpo_term(d, a, clip_low, clip_high)[0]
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
            if SURROGATE == _GMPO:
                t_clipped += tl.sum(s_clipped, 0).to(tl.float64)
                t_weight += tl.sum(s_weight, 0).to(tl.float64)
                t_advantage += tl.sum(s_advantage, 0).to(tl.float64)
        if mask is not None:
            count = tl.sum(counted, 0).to(tl.int64)

    tokens = count.to(tl.float64)
    at_least_one = tl.where(tokens > 1, tokens, 1.0)
    # 1 or 0: where the interpreter spreads a scalar condition over a block, it makes a float of it.
    near = 1.0
    ratio_here = 1.0
    ratio_open = 1.0
    sequence_weight = 1.0
    phi_pos = 0.0
    phi_neg = 0.0
    gmpo_slope = 0.0
    gmpo_loss = zero
    if OFF_POLICY:
        drift = (t_drift / at_least_one).to(tl.float32)
        near = tl.where(drift > off_policy_threshold, 0.0, 1.0)
    if SEQUENCE_CORRECTION:
        log_weight64 = t_correction
        if CORRECTION == _GEOMETRIC:
            log_weight64 = t_correction / at_least_one
        sequence_weight = _rollout_weight(
            log_weight64.to(tl.float32), correction_low, correction_high, CORRECTION_MASKS
        )
    if LEVEL != _TOKEN:
        if LEVEL == _SEQUENCE_SUM:
            log_ratio = t_d.to(tl.float32)
        else:
            log_ratio = (t_d / at_least_one).to(tl.float32)
        if LEVEL == _SEQUENCE_TOKEN:
            ratio_open = tl.where(log_ratio <= _SEQUENCE_TOKEN_LOG_BOUND, 1.0, 0.0)
            log_ratio = tl.where(
                log_ratio > _SEQUENCE_TOKEN_LOG_BOUND, _SEQUENCE_TOKEN_LOG_BOUND, log_ratio
            )
        ratio_here = exp(log_ratio)
    if SURROGATE == _VESPO:
        log_w = clamped((t_d + t_log_weight).to(tl.float32), _VESPO_LOG_FLOOR, _LOG_BOUND)
        phi_pos = _vespo_phi(log_w, k_pos, lambda_pos)
        phi_neg = _vespo_phi(log_w, k_neg, lambda_neg)
    if SURROGATE == _GMPO:
        weights = tl.where(t_weight > 1, t_weight, 1.0)
        mean_advantage = t_advantage / at_least_one
        geometric = exp((t_clipped / weights).to(tl.float32))
        if LOG_WEIGHTS:
            geometric = product(geometric, exp((t_log_weight / at_least_one).to(tl.float32)))
        if SEQUENCE_CORRECTION:
            geometric = product(geometric, sequence_weight)
        gmpo_loss = -product(mean_advantage, geometric.to(tl.float64))
        if OFF_POLICY:
            gmpo_loss = tl.where((mean_advantage >= 0) | (near > 0), gmpo_loss, zero)
        gmpo_slope = (gmpo_loss / weights).to(tl.float32)

    share = 1.0
    share64 = zero + 1.0
    if SHARED:
        share64 = 1.0 / at_least_one
        share = share64.to(tl.float32)

    # -- the terms --
    t_loss = zero
    t_kl = zero
    t_entropy = zero
    t_approx = zero
    t_low = zero
    t_high = zero
    t_extra = zero
    t_ratio = zero
    t_rollout = zero
    t_squared = zero
    t_kept = zero
    t_phi = zero
    t_through = zero
    t_bonus = zero
    t_chosen = zero
    ratio_max = tl.full([BLOCK], -INF, tl.float32)
    minus_ratio_min = tl.full([BLOCK], -INF, tl.float32)
    counted = tl.zeros([BLOCK], tl.int32)
    for chain in range(0, size, CHAIN * BLOCK):
        s_loss = tl.zeros([BLOCK], tl.float32)
        s_kl = tl.zeros([BLOCK], tl.float32)
        s_entropy = tl.zeros([BLOCK], tl.float32)
        s_approx = tl.zeros([BLOCK], tl.float32)
        s_low = tl.zeros([BLOCK], tl.float32)
        s_high = tl.zeros([BLOCK], tl.float32)
        s_extra = tl.zeros([BLOCK], tl.float32)
        s_ratio = tl.zeros([BLOCK], tl.float32)
        s_rollout = tl.zeros([BLOCK], tl.float32)
        s_squared = tl.zeros([BLOCK], tl.float32)
        s_kept = tl.zeros([BLOCK], tl.float32)
        s_phi = tl.zeros([BLOCK], tl.float32)
        s_through = tl.zeros([BLOCK], tl.float32)
        s_bonus = tl.zeros([BLOCK], tl.float32)
        s_chosen = tl.zeros([BLOCK], tl.float32)
        for start in range(chain, tl.minimum(chain + CHAIN * BLOCK, size), BLOCK):
            at = begin + start
            inside = lane < tl.minimum(size - start, BLOCK).to(tl.int32)
            counts = counting(mask, sequence * mask_row + at, lane, inside)
            if mask is not None:
                counted += counts.to(tl.int32)
            logprob = floats(logprobs, sequence * logprobs_row + at, lane, inside, counts)
            old = floats_or(old_logprobs, sequence * old_row + at, lane, inside, counts, logprob)
            if ONE_ADVANTAGE:
                a = tl.where(counts, one_advantage, 0.0)
            else:
                a = floats(advantages, sequence * advantages_row + at, lane, inside, counts)

            d = logprob - old
            exp_d, expm1_d = exp_and_expm1(d)
            s_approx += expm1_less(d, expm1_d)
            r = exp_d
            is_open = counts
            if LEVEL != _TOKEN:
                r = tl.where(counts, ratio_here, 0.0)
                if LEVEL == _SEQUENCE_TOKEN:
                    is_open = tl.where(counts, ratio_open, 0.0) > 0
            elif SURROGATE != _GMPO:
                below = d < -log_ratio_clamp
                above = d > log_ratio_clamp
                r = tl.where(below, least_ratio, tl.where(above, largest_ratio, exp_d))
                is_open = ~(below | above)
            if not BY_SEQUENCE:
                s_ratio += tl.where(counts, r, 0.0)
                ratio_max = tl.where(counts & (r > ratio_max), r, ratio_max)
                minus_ratio_min = tl.where(counts & (-r > minus_ratio_min), -r, minus_ratio_min)

            # The policy term: its value, its derivative by log r and by logprob with r held.
            loss = tl.zeros([BLOCK], tl.float32)
            through = loss
            direct = loss
            if SURROGATE == _CLIP:
                loss, through, low, high, dual = _clip_term(
                    r, a, ratio_low, ratio_high, ratio_cap, dual_clip, DUAL
                )
                if DUAL:
                    s_extra += tl.where(counts & dual, 1.0, 0.0)
            elif SURROGATE == _CISPO:
                direct = -product(clamped(r, ratio_low, ratio_high), a)
                low = r < ratio_low
                high = r > ratio_high
                s_extra += tl.where(high & (a > 0), 1.0, 0.0)
            elif SURROGATE == _SAPO:
                loss, through = _sapo_term(r, a, tau_pos, tau_neg)
            elif SURROGATE == _GMPO:
                # The sequence's loss is added once, not per token; here is its derivative alone.
                is_free = _gmpo_term(d, a, clip_low, clip_high)[1]
                direct = tl.where(is_free & counts, gmpo_slope, 0.0)
                low = (d < -clip_low) & (a < 0)
                high = (d > clip_high) & (a > 0)
            elif SURROGATE == _VESPO:
                phi = tl.where(a >= 0, phi_pos, phi_neg)
                s_phi += tl.where(counts, phi, 0.0)
                direct = -product(phi, a)
            elif DPPO:
                keep = _dppo_keeps(a, logprob, old, clip_low, clip_high, SURROGATE == _DPPO_KL)
                capped = tl.where(r > ratio_cap, ratio_cap, r)
                direct = tl.where(keep, -product(capped, a), 0.0)
                low = ~keep & (a < 0)
                high = ~keep & (a > 0)
            else:
                direct = -a
            if CLIPS:
                s_low += tl.where(counts & low, 1.0, 0.0)
                s_high += tl.where(counts & high, 1.0, 0.0)
            if not (THROUGH_RATIO or SURROGATE == _GMPO):
                loss = product(direct, logprob)

            rollout_weight = sequence_weight
            if CORRECTION != _UNCORRECTED:
                if CORRECTION == _BY_TOKEN:
                    rollout = floats(
                        rollout_logprobs, sequence * rollout_row + at, lane, inside, counts
                    )
                    rollout_weight = _rollout_weight(
                        _or_zero(old - rollout), correction_low, correction_high, CORRECTION_MASKS
                    )
                rollout_weight = tl.where(counts, rollout_weight, 0.0)
                s_rollout += rollout_weight
                s_squared += rollout_weight * rollout_weight
            if OFF_POLICY:
                kept = (a >= 0) | (tl.where(counts, near, 0.0) > 0)
                s_kept += tl.where(counts & kept, 1.0, 0.0)
            # gmpo's weights are in its mean already.
            if SURROGATE == _GMPO:
                if token_weights is not None:
                    weight = floats(
                        token_weights, sequence * weights_row + at, lane, inside, counts
                    )
                    direct = product(direct, weight)
            else:
                if OFF_POLICY:
                    loss = tl.where(kept, loss, 0.0)
                    through = tl.where(kept, through, 0.0)
                    direct = tl.where(kept, direct, 0.0)
                if token_weights is not None:
                    weight = floats(
                        token_weights, sequence * weights_row + at, lane, inside, counts
                    )
                    loss = product(loss, weight)
                    through = product(through, weight)
                    direct = product(direct, weight)
                if CORRECTION != _UNCORRECTED and SURROGATE != _VESPO:
                    loss = product(loss, rollout_weight)
                    through = product(through, rollout_weight)
                    direct = product(direct, rollout_weight)
                s_loss += loss
                if SHARED:
                    through *= share
                    direct *= share

            if ref_logprobs is not None:
                ref = floats(ref_logprobs, sequence * ref_row + at, lane, inside, counts)
                kl, kl_slope = _kl_estimate(ref - logprob, ESTIMATOR, KL_BOUNDED)
                if KL_WEIGHTED:
                    kl = product(kl, r)
                    kl_slope = product(kl_slope, r)
                # Some estimators' slope is not 0 where zeros stand for a masked token.
                s_kl += tl.where(counts, kl, 0.0)
                if KL:
                    direct += tl.where(counts, kl_coef * share * kl_slope, 0.0)
                    if KL_WEIGHTED:
                        through += tl.where(counts, kl_coef * share * kl, 0.0)

            if grad_logprobs is not None:
                out = grad_logprobs + (sequence * grad_row + at) + lane
                if COUPLED:
                    if THROUGH:
                        s_through += through
                    if OWN:
                        tl.store(out, direct, mask=inside)
                else:
                    grad = direct
                    if THROUGH:
                        grad += tl.where(is_open, through, 0.0)
                    tl.store(out, tl.where(counts, grad, 0.0), mask=inside)
            if entropy is not None:
                h = floats(entropy, sequence * entropy_row + at, lane, inside, counts)
                s_entropy += h
                if BONUS:
                    chosen = counts
                    if entropy_mask is not None:
                        chosen = flags(entropy_mask, sequence * entropy_mask_row + at, lane, counts)
                    s_bonus += tl.where(chosen, h, 0.0)
                    s_chosen += tl.where(chosen, 1.0, 0.0)
                    if grad_entropy is not None:
                        each = -entropy_coef
                        if BONUS_SHARED:
                            each = -entropy_coef * share
                        out = grad_entropy + (sequence * grad_row + at) + lane
                        tl.store(out, tl.where(chosen, each, 0.0), mask=inside)

        t_approx += tl.sum(s_approx, 0).to(tl.float64)
        if SURROGATE != _GMPO:
            t_loss += tl.sum(s_loss, 0).to(tl.float64)
        if not BY_SEQUENCE:
            t_ratio += tl.sum(s_ratio, 0).to(tl.float64)
        if CLIPS:
            t_low += tl.sum(s_low, 0).to(tl.float64)
            t_high += tl.sum(s_high, 0).to(tl.float64)
        if SURROGATE == _CISPO or DUAL:
            t_extra += tl.sum(s_extra, 0).to(tl.float64)
        if SURROGATE == _VESPO:
            t_phi += tl.sum(s_phi, 0).to(tl.float64)
        if CORRECTION != _UNCORRECTED:
            t_rollout += tl.sum(s_rollout, 0).to(tl.float64)
            t_squared += tl.sum(s_squared, 0).to(tl.float64)
        if OFF_POLICY:
            t_kept += tl.sum(s_kept, 0).to(tl.float64)
        if ref_logprobs is not None:
            t_kl += tl.sum(s_kl, 0).to(tl.float64)
        if entropy is not None:
            t_entropy += tl.sum(s_entropy, 0).to(tl.float64)
            if BONUS:
                t_bonus += tl.sum(s_bonus, 0).to(tl.float64)
                t_chosen += tl.sum(s_chosen, 0).to(tl.float64)
        if COUPLED and grad_logprobs is not None:
            t_through += tl.sum(s_through, 0).to(tl.float64)

    if mask is not None:
        tokens = tl.sum(counted, 0).to(tl.float64)
        at_least_one = tl.where(tokens > 1, tokens, 1.0)

    # -- the shared ratio's gradient --
    if COUPLED and grad_logprobs is not None:
        through_each = t_through
        if BY_SEQUENCE:
            through_each = t_through / at_least_one
        each = through_each.to(tl.float32)
        # Another thread may have stored what this one is about to read.
        tl.debug_barrier()
        for start in range(0, size, BLOCK):
            at = begin + start
            inside = lane < tl.minimum(size - start, BLOCK).to(tl.int32)
            counts = counting(mask, sequence * mask_row + at, lane, inside)
            out = grad_logprobs + (sequence * grad_row + at) + lane
            grad = tl.where(counts, each, 0.0)
            if OWN:
                grad += tl.load(out, mask=counts, other=0.0)
            tl.store(out, grad, mask=inside)

    # -- totals --
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
    row = totals + sequence * _COLUMNS
    tl.store(row, tokens)
    tl.store(row + 1, one)
    tl.store(row + 2, units)
    if SURROGATE == _GMPO:
        tl.store(row + 3, gmpo_loss)
    else:
        tl.store(row + 3, t_loss * share64)
    tl.store(row + 4, zero)
    tl.store(row + 5, t_kl)
    tl.store(row + 6, t_entropy)
    tl.store(row + 7, t_approx)
    tl.store(row + 8, t_low * metric_share)
    tl.store(row + 9, t_high * metric_share)
    if SURROGATE == _CISPO:
        tl.store(row + 10, zero)
        tl.store(row + 11, t_extra * metric_share)
    else:
        tl.store(row + 10, t_extra * metric_share)
        tl.store(row + 11, zero)
    tl.store(row + 12, t_ratio)
    if CORRECTION != _UNCORRECTED:
        tl.store(row + 13, t_rollout)
        tl.store(row + 14, t_squared)
    else:
        tl.store(row + 13, tokens)
        tl.store(row + 14, tokens)
    if OFF_POLICY:
        tl.store(row + 15, t_kept)
    else:
        tl.store(row + 15, tokens)
    if SURROGATE == _VESPO:
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


# ---- the batch ----------------------------------------------------------------------------------


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
def _finish_kernel(
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
    column = tl.arange(0, _COLUMNS)
    row = tl.arange(0, ROWS)
    zero = tl.full((), 0.0, tl.float64)
    is_max = (column >= _SUMS)[None, :]
    total = tl.where(is_max, zero - INF, tl.zeros([ROWS, _COLUMNS], tl.float64))
    for start in range(0, sequences, ROWS):
        inside = (start + row < sequences)[:, None] & (column < _TOTALS)[None, :]
        at = (start + row).to(tl.int64)[:, None] * _COLUMNS + column[None, :]
        x = tl.load(totals + at, mask=inside, other=0.0)
        total = tl.where(
            is_max, tl.where(inside & (x > total), x, total), total + tl.where(inside, x, 0.0)
        )
    sums = tl.sum(tl.where(is_max, 0.0, total), 0)
    maxima = tl.max(tl.where(is_max, total, zero - INF), 0)

    divisor = zero + 1.0
    own = zero
    norm = _given(normalizer, normalizer_number, normalizer_rest, zero)
    if AGGREGATION == _TOKEN_MEAN:
        tokens = _entry(sums, column, 0)
        is_given = norm == norm
        divisor = tl.where(is_given, norm, tl.where(tokens > 1, tokens, 1.0))
        own = tl.where(is_given, zero, tokens)
    elif AGGREGATION != _TOKEN_SUM:
        wanted = _given(num_sequences, num_sequences_number, num_sequences_rest, zero)
        is_given = wanted == wanted
        there = _entry(sums, column, 21 if SKIP_EMPTY else 1)
        divisor = tl.where(is_given, wanted, tl.where(there > 1, there, 1.0))
        own = tl.where(is_given, zero, there)
        if AGGREGATION == _SEQ_MEAN_TOKEN_SUM_NORM:
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
    tl.store(metrics + column, sums, mask=column < _METRIC_SUMS)
    is_maximum = (column >= _SUMS) & (column < _TOTALS)
    tl.store(metrics + (_METRIC_SUMS - _SUMS) + column, maxima, mask=is_maximum)


@triton.jit(do_not_specialize=["size"])
def _scale_kernel(
    grad_loss, scale, grad_logprobs, out_logprobs, grad_entropy, out_entropy, size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    upstream = tl.load(grad_loss)
    if grad_logprobs is not None:
        factor = upstream * tl.load(scale)
        grad = tl.load(grad_logprobs + at, mask=inside, other=0.0)
        tl.store(out_logprobs + at, grad * factor, mask=inside)
    if grad_entropy is not None:
        factor = upstream * tl.load(scale + 1)
        grad = tl.load(grad_entropy + at, mask=inside, other=0.0)
        tl.store(out_entropy + at, grad * factor, mask=inside)


# ---- launchers ----------------------------------------------------------------------------------


def _exp(x: float) -> float:
    return math.exp(x) if x < 88.8 else math.inf


@lru_cache(maxsize=64)
def _arguments(options: tuple[float, ...]) -> tuple[tuple[float, ...], dict[str, Any]]:
    """What the sequence kernel takes from the options of ops/policy_loss.py, without the
    denominators: numbers, and what it is compiled for."""
    (
        surrogate, level, clip_low, clip_high, dual_clip, ratio_cap, log_ratio_clamp, kl_coef,
        estimator, kl_clamp, kl_ratio_weighted, entropy_coef, entropy_same, aggregation, _,
        off_policy_threshold, correction, correction_masks, correction_low, correction_high,
        *shapes,
    ) = options  # fmt: skip
    numbers = (
        clip_low, clip_high, 1.0 - clip_low, 1.0 + clip_high, dual_clip, ratio_cap,
        log_ratio_clamp, _exp(-log_ratio_clamp), _exp(log_ratio_clamp), kl_coef, entropy_coef,
        off_policy_threshold, correction_low, correction_high, *shapes,
    )  # fmt: skip
    k3 = int(estimator) in (3, 6)
    shared = int(aggregation) == _SEQ_MEAN_TOKEN_MEAN.value
    compiled_for = {
        "SURROGATE": int(surrogate),
        "LEVEL": int(level),
        "DUAL": int(surrogate) == _CLIP.value and dual_clip < math.inf,
        "KL": kl_coef != 0,
        "ESTIMATOR": int(estimator),
        "KL_BOUNDED": kl_clamp == 2 or (kl_clamp == 1 and k3),
        "KL_WEIGHTED": bool(kl_ratio_weighted),
        "BONUS": entropy_coef != 0,
        "BONUS_SHARED": shared and bool(entropy_same),
        "SHARED": shared,
        "OFF_POLICY": off_policy_threshold < math.inf,
        "CORRECTION": int(correction),
        "CORRECTION_MASKS": bool(correction_masks),
    }
    return tuple(fp32(x) for x in numbers), compiled_for


def forward(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    entropy: Tensor | None,
    token_weights: Tensor | None,
    entropy_mask: Tensor | None,
    offsets: Tensor | None,
    normalizer: Tensor | None,
    num_sequences: Tensor | None,
    entropy_normalizer: Tensor | None,
    options: list[float],
    grad_logprobs: bool,
    grad_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``rlkern::policy_loss_triton``; the schema is in _schema.py."""
    sequences = logprobs.shape[0] if offsets is None else offsets.shape[0] - 1
    one_advantage = advantages.dim() == 1 and advantages.shape[0] == sequences
    per_token = (
        logprobs, None if one_advantage else advantages, mask, old_logprobs, ref_logprobs,
        rollout_logprobs, entropy, token_weights, entropy_mask,
    )  # fmt: skip
    require_tokens(logprobs, "logprobs", per_token)
    if len(options) != 29:
        raise ValueError(f"options: expected 29 numbers, got {len(options)}")
    loss = logprobs.new_empty(())
    metrics = logprobs.new_empty((_METRICS,), dtype=torch.float64)
    logprobs_out = logprobs.new_empty(logprobs.shape if grad_logprobs else (0,))
    entropy_out = logprobs.new_empty(logprobs.shape if grad_entropy else (0,))
    scale = logprobs.new_empty((2,))
    totals = logprobs.new_empty((sequences, _COLUMNS.value), dtype=torch.float64)
    numbers, compiled_for = _arguments(tuple(options[:-3]))
    length = 0 if logprobs.dim() == 1 else logprobs.shape[1]
    with torch.cuda.device_of(logprobs):
        if sequences > 0:
            _sequence_kernel[(sequences,)](
                logprobs, advantages, *per_token[2:], offsets,
                logprobs_out if grad_logprobs else None, entropy_out if grad_entropy else None,
                totals, length, *map(row_stride, per_token), length, *numbers,
                ONE_ADVANTAGE=one_advantage, BLOCK=_BLOCK, CHAIN=_CHAIN, num_warps=_WARPS,
                maxnreg=_MAX_REGISTERS, **compiled_for, **OPTIONS,
            )  # fmt: skip
        _finish_kernel[(1,)](
            totals, sequences,
            normalizer, *two_floats(options[-3]),
            num_sequences, *two_floats(options[-2]),
            entropy_normalizer, *two_floats(options[-1]),
            fp32(options[7]), fp32(options[11]), loss, metrics, scale,
            AGGREGATION=int(options[13]), SKIP_EMPTY=bool(options[14]), KL=compiled_for["KL"],
            BONUS=compiled_for["BONUS"], BONUS_SAME=bool(options[12]), ROWS=_ROWS,
            num_warps=_FINISH_WARPS, **OPTIONS,
        )  # fmt: skip
    return loss, metrics, logprobs_out, entropy_out, scale


def backward(
    grad_loss: Tensor, grad_logprobs: Tensor, grad_entropy: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """``rlkern::policy_loss_bwd_triton``: the gradients times upstream and denominators."""
    grads = grad_logprobs.contiguous(), grad_entropy.contiguous()
    outs = tuple(grad.new_empty(grad.shape) for grad in grads)
    size = max(grad.numel() for grad in grads)
    if size > 0:
        pairs = (
            pair if pair[0].numel() else (None, None) for pair in zip(grads, outs, strict=True)
        )
        with torch.cuda.device_of(grad_loss):
            _scale_kernel[(triton.cdiv(size, _SCALE_BLOCK),)](
                grad_loss, scale, *(tensor for pair in pairs for tensor in pair), size,
                BLOCK=_SCALE_BLOCK, num_warps=4, **OPTIONS,
            )  # fmt: skip
    return outs[0], outs[1]

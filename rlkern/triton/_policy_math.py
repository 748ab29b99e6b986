"""The scalar formulas of policy_loss for one token, and its options' numbers.

The formulas and their guards against 0 * inf are csrc/common/policy_formulas.h's.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from rlkern.triton._math import (
    clamped,
    exp,
    exp_and_expm1,
    expm1_less,
    product,
)

# As csrc/common/policy_options.h numbers them.
CLIP = tl.constexpr(0)
CISPO = tl.constexpr(1)
SAPO = tl.constexpr(2)
GMPO = tl.constexpr(3)
VESPO = tl.constexpr(4)
DPPO_TV = tl.constexpr(5)
DPPO_KL = tl.constexpr(6)
TOKEN = tl.constexpr(0)
SEQUENCE = tl.constexpr(1)
SEQUENCE_TOKEN = tl.constexpr(2)
SEQUENCE_SUM = tl.constexpr(3)
K1 = tl.constexpr(0)
ABS = tl.constexpr(1)
K2 = tl.constexpr(2)
K1_ST = tl.constexpr(4)
ABS_ST = tl.constexpr(5)
UNCORRECTED = tl.constexpr(-1)
BY_TOKEN = tl.constexpr(0)
GEOMETRIC = tl.constexpr(2)
TOKEN_MEAN = tl.constexpr(0)
SEQ_MEAN_TOKEN_MEAN = tl.constexpr(1)
SEQ_MEAN_TOKEN_SUM_NORM = tl.constexpr(3)
TOKEN_SUM = tl.constexpr(4)

# Bounds of verl's and TRL's code that no option changes.
LOG_BOUND = tl.constexpr(20.0)
SEQUENCE_TOKEN_LOG_BOUND = tl.constexpr(10.0)
VESPO_LOG_FLOOR = tl.constexpr(math.log(1e-8))
KL_LOG_BOUND = tl.constexpr(20.0)
KL_VALUE_BOUND = tl.constexpr(10.0)
DPPO_EPS = tl.constexpr(1e-8)
LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def or_zero(x):
    return tl.where(x == x, x, 0.0)


@triton.jit
def kl_estimate(raw, ESTIMATOR: tl.constexpr, BOUNDED: tl.constexpr):
    """The estimator and its slope with respect to the log-probability; raw = ref - logprob."""
    x = raw
    if BOUNDED:
        x = clamped(raw, -KL_LOG_BOUND, KL_LOG_BOUND)
    if ESTIMATOR == K1 or ESTIMATOR == K1_ST:
        value = -x
        slope = tl.full(x.shape, 1.0, tl.float32)
    elif ESTIMATOR == ABS or ESTIMATOR == ABS_ST:
        value = tl.abs(x)
        slope = tl.where(x > 0, -1.0, tl.where(x < 0, 1.0, 0.0))
    elif ESTIMATOR == K2:
        value = x * x * 0.5
        slope = -x
    else:
        expm1_x = exp_and_expm1(x)[1]
        value = expm1_less(x, expm1_x)
        slope = -expm1_x
    if BOUNDED:
        inside = (tl.abs(raw) <= KL_LOG_BOUND) & (tl.abs(value) <= KL_VALUE_BOUND)
        slope = tl.where(inside, slope, 0.0)
        value = clamped(value, -KL_VALUE_BOUND, KL_VALUE_BOUND)
    if ESTIMATOR >= K1_ST:
        slope = -raw  # straight through: of the unclamped x^2 / 2
    return value, slope


@triton.jit
def correction_weight(log_weight, correction_low, correction_high, MASKS: tl.constexpr):
    w = exp(clamped(log_weight, -LOG_BOUND, LOG_BOUND))
    if MASKS:
        return tl.where((w >= correction_low) & (w <= correction_high), w, 0.0)
    else:
        return clamped(w, correction_low, correction_high)


@triton.jit
def vespo_phi(log_w, k, lam):
    phi = exp(lam + k * log_w - lam * exp(log_w))
    return tl.where(phi <= LARGEST, phi, 0.0)


@triton.jit
def gmpo_term(d, a, clip_low, clip_high):
    """gmpo's clipped log-ratio, and whether the token's own log-ratio passed."""
    bounded = clamped(d, -clip_low, clip_high)
    is_open = ((a > 0) & (d <= bounded)) | ((a < 0) & (d >= bounded))
    return tl.where(a == 0, 0.0, tl.where(is_open, d, bounded)), is_open


@triton.jit
def clip_term(r, a, ratio_low, ratio_high, ratio_cap, dual_clip, DUAL: tl.constexpr):
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
def sapo_term(r, a, tau_pos, tau_neg):
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
def dppo_keeps(a, logprob, old, clip_low, clip_high, KL: tl.constexpr):
    p, p_less = exp_and_expm1(logprob)
    q, q_less = exp_and_expm1(old)
    rises = a > 0
    if KL:
        # 1 - p as -expm1(logprob): by subtraction it would lose what the logarithm looks at.
        ratio = (DPPO_EPS - q_less) / (DPPO_EPS - p_less)
        divergence = product(q, old - logprob) + product(-q_less, tl.log(ratio))
        up = (divergence <= clip_high) | (p <= q)
        down = (divergence <= clip_low) | (p >= q)
    else:
        up = p - q <= clip_high
        down = p - q >= -clip_low
    return (rises & up) | (~rises & down)

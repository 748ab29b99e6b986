"""Scalar math that the Triton kernels share, accurate where the language's own functions are not.

Triton's language lacks log1p, expm1 and tanh. libdevice has them, but Triton's interpreter cannot
run libdevice, and a kernel must be the same in both.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
INF = tl.constexpr(float("inf"))
# The lowest finite float: the maximum of nothing, of which differences may still be taken.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def exp2_parts(t):
    """2^t for t <= 0 as (scale, fraction) with 2^t = scale * (1 + fraction).

    The polynomial for (2^f - 1) / f on [-1/2, 1/2] is minimax in its relative error, 2.1e-8, so
    that 2^t - 1 is as good near 0. Below -126.5 the result is exactly 0; NaN gives NaN.
    """
    # At least -127.49 after rounding, so the exponent's field stays 0; the comparison keeps NaN.
    t = tl.where(t < -127.25, -127.25, t)
    # Adding 1.5 * 2^23 rounds t to an integer in the low bits; 127 more makes it an exponent.
    shifted = t + 12583039.0
    f = t - (shifted - 12583039.0)
    scale = (shifted.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)
    p = tl.fma(f, 0.000154035122, 0.00133907353)
    p = tl.fma(f, p, 0.00961823761)
    p = tl.fma(f, p, 0.0555035733)
    p = tl.fma(f, p, 0.240226492)
    p = tl.fma(f, p, 0.693147182)
    return scale, f * p


@triton.jit
def exp2m1(t):
    """2^t - 1 for t <= 0 without cancellation."""
    scale, fraction = exp2_parts(t)
    return tl.fma(scale, fraction, scale - 1.0)


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0, relative error below 5e-7 down to the smallest normal result."""
    return exp2m1(x * LOG2E)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, relative error below 5e-7.

    Below 1/2 the series of 2 artanh(s), s = x / (2 + x) <= 1/5, whose first term left out is
    s^11 / 11, 1e-8 of the sum. Above, 1 + x loses 6e-8 at most, and its logarithm of 0.4 and more
    is well conditioned.
    """
    s = x / (x + 2.0)
    q = s * s
    p = tl.fma(q, 1.0 / 9.0, 1.0 / 7.0)
    p = tl.fma(q, p, 1.0 / 5.0)
    p = tl.fma(q, p, 1.0 / 3.0)
    p = tl.fma(q, p, 1.0)
    return tl.where(x < 0.5, 2.0 * s * p, tl.log(x + 1.0))


@triton.jit
def softcapped(x, softcap):
    """softcap * tanh(x / softcap), with tanh |u| = (1 - e) / (1 + e), e = exp(-2 |u|)."""
    minus = exp2m1(tl.abs(x) * tl.div_rn(-2.0 * LOG2E, softcap))
    magnitude = softcap * (-minus / (minus + 2.0))
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def softcap_derivative(x, softcap):
    """1 - tanh^2(x / softcap) = 4 e / (1 + e)^2, which does not cancel either."""
    scale, fraction = exp2_parts(tl.abs(x) * tl.div_rn(-2.0 * LOG2E, softcap))
    e = tl.fma(scale, fraction, scale)
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def folded(x, SIZE: tl.constexpr):
    """The sums of x's elements whose places are equal modulo SIZE, added pairwise by halves.

    Unlike tl.sum's, the order does not depend on how the compiler spreads x over threads, and so
    not on the alignment of the memory that x came from.
    """
    for _ in tl.static_range(20):
        if x.shape[0] > SIZE:
            x = tl.sum(tl.reshape(x, (2, x.shape[0] // 2)), 0)
    return x


@triton.jit
def exp_and_expm1(x):
    """exp(x) and exp(x) - 1 for x of both signs, each with a relative error below 2e-7.

    x = n log 2 + f with |f| <= log 2 / 2. n is at most 8 bits long and the first part of log 2 is
    9, so their product is exact, fused or not. Above 88.73 exp(x) is inf, below -104 it is 0;
    NaN gives NaN.
    """
    # Outside these bounds the result is the same; the comparisons keep NaN.
    x = tl.where(x > 89.0, 89.0, x)
    x = tl.where(x < -110.0, -110.0, x)
    shifted = x * LOG2E + 12582912.0
    n = shifted - 12582912.0
    f = tl.fma(n, -0.693359375, x)
    f = tl.fma(n, 2.12194440e-4, f)
    p = tl.fma(f, 1.0 / 5040.0, 1.0 / 720.0)
    p = tl.fma(f, p, 1.0 / 120.0)
    p = tl.fma(f, p, 1.0 / 24.0)
    p = tl.fma(f, p, 1.0 / 6.0)
    p = tl.fma(f, p, 0.5)
    p = tl.fma(f, p, 1.0) * f
    # 2^n in two factors: neither 2^128 nor 2^-150 is a normal float.
    exponent = shifted.to(tl.int32, bitcast=True) - 0x4B400000
    half = exponent >> 1
    first = ((half + 127) << 23).to(tl.float32, bitcast=True)
    second = ((exponent - half + 127) << 23).to(tl.float32, bitcast=True)
    e = tl.fma(first, p, first) * second
    scale = first * second
    # Above 20 the 1 is less than half an ulp of exp(x), and 2^128 is inf.
    return e, tl.where(x > 20.0, e, tl.fma(scale, p, scale - 1.0))


@triton.jit
def exp(x):
    return exp_and_expm1(x)[0]


@triton.jit
def expm1_less(x, expm1_x):
    """expm1(x) - x, which cancels near 0: below 1 its series, whose first term left out is 5e-8
    of the sum."""
    p = tl.fma(x, 1.0 / 3628800.0, 1.0 / 362880.0)
    p = tl.fma(x, p, 1.0 / 40320.0)
    p = tl.fma(x, p, 1.0 / 5040.0)
    p = tl.fma(x, p, 1.0 / 720.0)
    p = tl.fma(x, p, 1.0 / 120.0)
    p = tl.fma(x, p, 1.0 / 24.0)
    p = tl.fma(x, p, 1.0 / 6.0)
    p = tl.fma(x, p, 0.5)
    return tl.where(tl.abs(x) < 1.0, x * x * p, expm1_x - x)


@triton.jit
def product(a, b):
    """a * b, 0 where either is 0: a branch that is not taken leaves 0, never 0 * inf."""
    return tl.where((a == 0) | (b == 0), 0.0, a * b)


@triton.jit
def clamped(x, low, high):
    """Between the bounds; NaN stays."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)

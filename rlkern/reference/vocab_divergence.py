"""Divergence between two distributions over the vocabulary, and its gradient, as formulas.

With t = log p - log q of a token, p the policy's distribution, q the reference's:

    KL(p || q) = sum p (t + expm1(-t)),    KL(q || p) = sum q (-t + expm1(t))
    JS = beta KL(p || m) + (1 - beta) KL(q || m),    m = beta p + (1 - beta) q,
         KL(p || m) = sum p (w - log1p(w)),    w = m / p - 1 = (1 - beta) expm1(-t); of q likewise

What was added to sum p t is 0 in all. No term is negative, so that nothing cancels between them,
and an error common to all t, as that of the two normalisations is, enters squared. The gradient is

    p_j (f_j - sum_k p_k f_k),    f = t;    f = -expm1(-t), p f = p - q;    f = -beta log1p(w)

Computes in float64 for float64 logits, in float32 otherwise. Every function takes flat rows: logits
and ref_logits [N, V], the rest [N].
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlkern.reference.token_logprobs import capped

DIVERGENCES = ("kl", "reverse_kl", "js")
#: Entries of a row's state: maximum of the (capped) policy's logits and log of the sum of
#: exponentials relative to it, the same of the reference's, what is taken off t, and sum p f.
STATE = 6


class _Normalised(NamedTuple):
    y: Tensor
    slope: Tensor | None
    top: Tensor
    log_sum: Tensor


def _normalised(logits: Tensor, temperature: Tensor, softcap: float | None) -> _Normalised:
    y, slope = capped(logits, softcap)
    top = y.amax(-1)
    dead = top == -torch.inf
    z = (y - top.where(~dead, 0.0)[:, None]) / temperature[:, None]
    return _Normalised(y, slope, top, torch.logsumexp(z, -1).where(~dead, 0.0))


def _shift(top: Tensor, ref_top: Tensor) -> Tensor:
    """What is taken off the policy's logits before the reference's are: the maxima's difference, in
    steps of 16. A shift of all logits is no difference between the distributions, but would round
    t; and below 16 the logits' own difference is the exact one where they are nearly equal."""
    shift = 16 * ((top - ref_top) / 16).round()
    return shift.where(shift.isfinite(), 0.0)


def _less_expm1(t: Tensor) -> Tensor:
    """t + expm1(-t), by its series near 0."""
    terms = 20 if t.dtype == torch.float64 else 9
    near = t.clamp(-0.5, 0.5)
    series = torch.zeros_like(t)
    for k in reversed(range(2, terms)):
        series = series * -near + 1 / math.factorial(k)
    return torch.where(t.abs() < 0.5, near * near * series, t + torch.expm1(-t))


def _less_log1p(w: Tensor) -> Tensor:
    """w - log1p(w), near 0 by log1p(w) = 2 atanh(w / (2 + w)): with s of that, w s less a tail."""
    terms = 14 if w.dtype == torch.float64 else 6
    small = (w > -0.29) & (w < 0.41)
    near = w.where(small, 0.0)
    s = near / (near + 2)
    tail = torch.zeros_like(w)
    for k in reversed(range(terms)):
        tail = tail * s * s + 2 / (2 * k + 3)
    return torch.where(small, near * s - s**3 * tail, w - torch.log1p(w))


def _kl_term(larger: Tensor, t: Tensor) -> Tensor:
    """p (t + expm1(-t)), from the larger of p and q: no exponential overflows. p = 0 counts for the
    q that stands opposite it; q = 0 < p gives inf."""
    t = t.clamp(min=-1e30)
    e = torch.exp(-t.abs())
    term = torch.where(
        t.abs() < 0.5,
        larger * torch.where(t < 0, e, 1.0) * _less_expm1(t.clamp(-0.5, 0.5)),
        torch.where(t < 0, larger * (e * (t - 1) + 1), larger * ((t - 1) + e)),
    )
    return term.where(larger > 0, 0.0)


def _terms(
    policy: _Normalised, ref: _Normalised, offset: Tensor, temperature: Tensor, kind: str,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of each token its part of the divergence, p f, and p."""
    shift = _shift(policy.top, ref.top)[:, None]
    T = temperature[:, None]
    neither = (policy.y == -torch.inf) & (ref.y == -torch.inf)
    t = (((policy.y - shift) - ref.y) / T - offset[:, None]).where(~neither, 0.0)
    log_larger = torch.where(
        t >= 0,
        (policy.y - policy.top[:, None]) / T - policy.log_sum[:, None],
        (ref.y - ref.top[:, None]) / T - ref.log_sum[:, None],
    )
    larger = log_larger.exp()
    e, expm1 = torch.exp(-t.abs()), torch.expm1(-t.abs())
    p = torch.where(t < 0, larger * e, larger)
    if kind == "kl":
        return _kl_term(larger, t), torch.where(p == 0, 0.0, p * t), p
    if kind == "reverse_kl":
        return _kl_term(larger, -t), torch.where(t < 0, larger * expm1, -larger * expm1), p
    # Of the larger of both, and of the smaller; e stays above 0 so that m / smaller is finite.
    share = torch.where(t < 0, t.new_tensor(1 - beta), t.new_tensor(beta))
    other = 1 - share
    e = e.clamp(min=1e-30)
    w, v = other * expm1, -share * expm1 / e
    value = larger * (share * _less_log1p(w) + other * e * _less_log1p(v))
    return value, -beta * p * torch.log1p(torch.where(t < 0, v, w)), p


def _of_one(kind: str, beta: float) -> tuple[float, float]:
    """The divergence where only the policy, and where only the reference, has a distribution."""
    if kind == "kl":
        return math.inf, 0.0
    if kind == "reverse_kl":
        return 0.0, math.inf
    return -beta * math.log(beta), -(1 - beta) * math.log(1 - beta)


def forward(
    logits: Tensor,
    ref_logits: Tensor,
    counts: Tensor,
    temperature: Tensor,
    softcap: float | None,
    kind: str,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """Returns the divergence [N] and the state [N, STATE]."""
    policy = _normalised(logits, temperature, softcap)
    ref = _normalised(ref_logits, temperature, softcap)
    shift = _shift(policy.top, ref.top).double()
    offset = (policy.top.double() - ref.top.double() - shift) / temperature.double()
    offset = (offset + (policy.log_sum.double() - ref.log_sum.double())).to(policy.y.dtype)
    value, slope, _ = _terms(policy, ref, offset, temperature, kind, beta)
    value, mean = value.sum(-1), slope.sum(-1)

    has, ref_has = policy.top != -torch.inf, ref.top != -torch.inf
    alone, ref_alone = _of_one(kind, beta)
    value = torch.where(has & ~ref_has, alone, value)
    value = torch.where(~has & ref_has, ref_alone, value)
    value = torch.where(has | ref_has, value, 0.0)
    # Of a row without a distribution the gradient is 0, but of an infinite KL.
    none = math.inf if alone == math.inf else 0.0
    mean = torch.where(has & ref_has, mean, torch.where(has, none, 0.0))
    broken = policy.log_sum.isnan() | ref.log_sum.isnan()
    value, mean = (torch.where(broken, torch.nan, x) for x in (value, mean))
    state = torch.stack([policy.top, policy.log_sum, ref.top, ref.log_sum, offset, mean], -1)
    return value.where(counts, 0.0), state.where(counts[:, None], 0.0)


def backward(
    grad: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    counts: Tensor,
    temperature: Tensor,
    softcap: float | None,
    kind: str,
    beta: float,
    state: Tensor,
) -> Tensor:
    """p_j (f_j - sum_k p_k f_k), then through temperature, softcap and rounding, once, to the
    logits' dtype. NaN where the divergence is an infinite KL."""
    top, log_sum, ref_top, ref_log_sum, offset, mean = state.unbind(-1)
    policy = _Normalised(*capped(logits, softcap), top, log_sum)
    ref = _Normalised(*capped(ref_logits, softcap), ref_top, ref_log_sum)
    _, slope, p = _terms(policy, ref, offset, temperature, kind, beta)
    result = grad[:, None] * (slope - p * mean[:, None]) / temperature[:, None]
    if policy.slope is not None:
        result = result * policy.slope
    # What cannot be drawn has no gradient; of reverse KL it would be -q.
    result = result.where(logits != -torch.inf, 0.0)
    neither = ((top == -torch.inf) | (ref_top == -torch.inf)) & mean.isfinite()
    result = torch.where(mean.isfinite()[:, None], result, torch.nan)
    result = torch.where(((grad == 0) | neither)[:, None] & ~mean.isnan()[:, None], 0.0, result)
    return result.where(counts[:, None], 0.0).to(logits.dtype)

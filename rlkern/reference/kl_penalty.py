"""KL estimators per token, with x = ref_logprobs - logprobs.

k1 = -x; abs = |x|; k2 = x^2 / 2; k3 = expm1(x) - x (Schulman, "Approximating KL divergence").
The straight-through forms k1_st, abs_st, k3_st have the estimator's value and the gradient of
the unclamped k2 (verl's "+").
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlkern.reference import safe

ESTIMATORS = ("k1", "abs", "k2", "k3", "k1_st", "abs_st", "k3_st")
#: Names of the bounds on x and on the value: verl clamps k3 alone, OpenRLHF every estimator.
CLAMPS = ("verl", "openrlhf")
X_BOUND = 20.0
VALUE_BOUND = 10.0


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: str, clamp: str | None) -> Tensor:
    """The estimator per token, differentiable with respect to logprobs alone."""
    raw = (ref_logprobs - logprobs).detach()
    kind = estimator.removesuffix("_st")
    clamped = clamp == "openrlhf" or (clamp == "verl" and kind == "k3")
    x = raw.clamp(-X_BOUND, X_BOUND) if clamped else raw
    # With respect to logprobs, so with the sign of -x turned. Written out: autograd through
    # expm1(x) - x in fp32 is all error at x = 1e-9.
    if kind == "k1":
        value, slope = -x, torch.ones_like(x)
    elif kind == "abs":
        value, slope = x.abs(), -x.sign()
    elif kind == "k2":
        value, slope = x * x / 2, -x
    else:
        value, slope = torch.expm1(x) - x, -torch.expm1(x)
    if clamped:
        inside = (raw.abs() <= X_BOUND) & (value.abs() <= VALUE_BOUND)
        slope = slope.where(inside, 0.0)
        value = value.clamp(-VALUE_BOUND, VALUE_BOUND)
    if estimator.endswith("_st"):
        slope = -raw
    return safe.with_slope(value, slope, logprobs)

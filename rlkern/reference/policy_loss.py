"""The clipped-ratio losses, term by term: ratio, surrogate, weights, KL, aggregation, metrics.

m is the mask, |o| the number of counting tokens of a sequence, A the advantage, d = logp - old, r
the ratio; every mean over an empty set is 0. `loss` below is a PolicyLoss or anything with its
fields. Differentiable with respect to logprobs and entropy, once.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlkern.reference.aggregation import Denominators, Sequences, denominator, token_weight
from rlkern.reference.kl_penalty import kl_penalty
from rlkern.reference.safe import exp, product

#: The entries of the metrics' vector that add up over batches, in the kernels' order.
SUMS = (
    "tokens",
    "sequences",
    "ratio_units",  # what ratio and clip metrics are means over: tokens, or sequences
    "policy_loss",
    "policy_loss_units",  # 0 where the caller gave the denominator: the values then add up
    "kl",
    "entropy",
    "approx_kl",
    "clip_low",
    "clip_high",
    "dual_clip",
    "cispo_clip",
    "ratio",
    "rollout_weight",
    "rollout_weight_squared",
    "kept",
    "vespo_phi",
    "vespo_units",
)
#: Those of which the larger one stays; minima stand negated.
MAXIMA = (
    "ratio_max",
    "minus_ratio_min",
    "clip_low_max",  # per sequence, the share of its tokens
    "minus_clip_low_min",
    "clip_high_max",
    "minus_clip_high_min",
)
#: Bounds of verl's and TRL's code that no option changes.
LOG_BOUND = 20.0
SEQUENCE_TOKEN_LOG_BOUND = 10.0
VESPO_LOG_FLOOR = math.log(1e-8)
DPPO_EPS = 1e-8


class Batch(NamedTuple):
    """One value per token, [B, T], or [total] with offsets [B + 1]; all of one dtype."""

    logprobs: Tensor
    advantages: Tensor  # per token, or [B]
    mask: Tensor | None = None  # bool
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    rollout_logprobs: Tensor | None = None
    entropy: Tensor | None = None
    token_weights: Tensor | None = None
    entropy_mask: Tensor | None = None  # bool
    offsets: Tensor | None = None

    @property
    def sequences(self) -> int:
        return (self.logprobs if self.offsets is None else self.offsets[1:]).shape[0]

    @property
    def advantage_per_sequence(self) -> bool:
        return self.advantages.dim() == 1 and self.advantages.shape[0] == self.sequences


class _Tokens(NamedTuple):
    """A batch with its defaults, and zeros for whatever masked positions held."""

    logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    old_logprobs: Tensor
    token_weights: Tensor
    entropy_mask: Tensor
    ref_logprobs: Tensor | None
    rollout_logprobs: Tensor | None
    entropy: Tensor | None

    @classmethod
    def of(cls, batch: Batch, mask: Tensor, advantages: Tensor) -> _Tokens:
        def counting(x: Tensor | None) -> Any:
            return None if x is None else x.where(mask, 0.0)

        old, weights = counting(batch.old_logprobs), counting(batch.token_weights)
        chosen = batch.entropy_mask
        return cls(
            counting(batch.logprobs),
            counting(advantages),
            mask,
            counting(batch.logprobs.detach()) if old is None else old,
            mask.to(batch.logprobs.dtype) if weights is None else weights,
            mask if chosen is None else chosen & mask,
            counting(batch.ref_logprobs),
            counting(batch.rollout_logprobs),
            counting(batch.entropy),
        )


def policy_loss(loss: Any, batch: Batch, given: Denominators) -> tuple[Tensor, Tensor]:
    """The loss, 0-dimensional, and the metrics' vector: SUMS, then MAXIMA, without gradient."""
    ones = torch.ones_like(batch.logprobs)
    given = given.to(ones.dtype)
    mask = ones if batch.mask is None else batch.mask.to(ones.dtype)
    sequences = Sequences(mask, batch.offsets)
    spread = batch.advantage_per_sequence
    advantages = sequences.spread(batch.advantages) if spread else batch.advantages
    tokens = _Tokens.of(batch, mask > 0, advantages)
    d = tokens.logprobs - tokens.old_logprobs
    ratio, bounded = _ratio(loss, d, tokens, sequences)
    weight = _rollout_weight(loss, tokens, sequences)
    near = _near(loss, tokens, sequences)
    keep = ((tokens.advantages >= 0) | sequences.spread(near)).to(mask.dtype)

    phi = None
    if loss.surrogate == "gmpo":
        policy, clipped = _gmpo(loss, d, tokens, sequences)
        policy = product(policy, sequences.mean(weight.log().where(tokens.mask, 0.0)).exp())
        kept = (sequences.mean(tokens.advantages) >= 0) | near
        policy = product(policy, kept.to(mask.dtype))
    else:
        if loss.surrogate == "vespo":
            phi = _vespo_phi(loss, bounded.detach(), weight, tokens, sequences)
            terms = -product(product(phi, tokens.advantages), tokens.logprobs)
            clipped = _Clipped.none(mask)
        else:
            terms, clipped = _surrogate(loss, ratio, tokens)
            terms = product(terms, weight)
        policy = sequences.total(product(product(terms, keep), tokens.token_weights))
        policy = policy * token_weight(loss, sequences)

    kl = None
    if tokens.ref_logprobs is not None:
        kl = kl_penalty(tokens.logprobs, tokens.ref_logprobs, loss.kl_estimator, loss.kl_clamp)
        if loss.kl_ratio_weighted:
            kl = product(kl, ratio)
        kl = kl.where(tokens.mask, 0.0)
    divisor, units = denominator(loss, given, sequences)
    value = policy.sum()
    if kl is not None and loss.kl_coef:
        each = sequences.total(kl) * token_weight(loss, sequences)
        value = value + loss.kl_coef * each.sum()
    value = value / divisor
    if loss.entropy_coef:
        value = value - loss.entropy_coef * _entropy(loss, tokens, given, sequences, divisor)

    # What the caller did not fix divides the merged sums; what it did, this batch's.
    sums = {
        "tokens": mask.sum(),
        "sequences": mask.new_tensor(sequences.count),
        "policy_loss": policy.sum() * units.clamp(min=1) / divisor,
        "policy_loss_units": units,
        "approx_kl": (torch.expm1(d) - d).sum(),
        "rollout_weight": (weight * mask).sum(),
        "rollout_weight_squared": (weight * weight * mask).sum(),
        "kept": (keep * mask).sum(),
    }
    if kl is not None:
        sums["kl"] = kl.sum()
    if tokens.entropy is not None:
        sums["entropy"] = tokens.entropy.sum()
    if phi is not None:
        by_sequence = sequences if spread else None
        sums["vespo_phi"], sums["vespo_units"] = _mean_parts(phi, mask, by_sequence)
        if spread:
            # A sequence without a token has phi(w = 1) = 1, as in TRL.
            sums["vespo_phi"] = sums["vespo_phi"] + (sequences.length == 0).sum()
    ratio_sums, maxima = _ratio_metrics(loss, d, ratio, clipped, mask, sequences)
    sums |= ratio_sums
    vector = [sums.get(name, mask.new_zeros(())) for name in SUMS]
    vector += [maxima[name] for name in MAXIMA]
    return value, torch.stack(vector).detach().double()


def _ratio(loss: Any, d: Tensor, tokens: _Tokens, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """The ratio per token, and the clamped log-ratio of the tokens."""
    bound = math.inf if loss.log_ratio_clamp is None else loss.log_ratio_clamp
    bounded = d.clamp(-bound, bound)
    if loss.ratio_level == "sequence":
        log_ratio = sequences.spread(sequences.mean(d))
    elif loss.ratio_level == "sequence_sum":
        log_ratio = sequences.spread(sequences.total(d))
    elif loss.ratio_level == "sequence_token":
        mean = sequences.spread(sequences.mean(d)).detach()
        log_ratio = (tokens.logprobs - tokens.logprobs.detach() + mean).clamp(
            max=SEQUENCE_TOKEN_LOG_BOUND
        )
    else:
        log_ratio = d if loss.surrogate == "gmpo" else bounded
    return exp(log_ratio), bounded


def _rollout_weight(loss: Any, tokens: _Tokens, sequences: Sequences) -> Tensor:
    """w per token from e = old - rollout, which is 0 where it is NaN; no gradient."""
    if loss.correction is None:
        return torch.ones_like(tokens.old_logprobs)
    assert tokens.rollout_logprobs is not None
    e = _nan_is_zero(tokens.old_logprobs - tokens.rollout_logprobs)
    if loss.correction.level == "sequence":
        e = sequences.spread(sequences.total(e))
    elif loss.correction.level == "geometric":
        e = sequences.spread(sequences.mean(e))
    weight = e.clamp(-LOG_BOUND, LOG_BOUND).exp()
    low = -math.inf if loss.correction.low is None else loss.correction.low
    high = math.inf if loss.correction.high is None else loss.correction.high
    if loss.correction.mode == "truncate":
        return weight.clamp(low, high)
    return weight.where((weight >= low) & (weight <= high), 0.0)


def _near(loss: Any, tokens: _Tokens, sequences: Sequences) -> Tensor:
    """Per sequence, whether the policy is still close to the one that sampled it."""
    if loss.off_policy_threshold is None:
        return torch.ones_like(sequences.length, dtype=torch.bool)
    sampler = tokens.old_logprobs if tokens.rollout_logprobs is None else tokens.rollout_logprobs
    drift = sequences.mean(_nan_is_zero(sampler - tokens.logprobs.detach()))
    return drift <= loss.off_policy_threshold


def _nan_is_zero(x: Tensor) -> Tensor:
    return x.where(~x.isnan(), 0.0)


class _Clipped(NamedTuple):
    """Where a token is clipped, as bool."""

    low: Tensor
    high: Tensor
    dual: Tensor
    cispo: Tensor  # TRL's cispo_clip_ratio: above the range, with a positive advantage

    @classmethod
    def none(cls, like: Tensor) -> _Clipped:
        nowhere = torch.zeros_like(like, dtype=torch.bool)
        return cls(nowhere, nowhere, nowhere, nowhere)


def _surrogate(loss: Any, ratio: Tensor, tokens: _Tokens) -> tuple[Tensor, _Clipped]:
    """The loss per token, to be minimised."""
    logp, advantages = tokens.logprobs, tokens.advantages
    nowhere = _Clipped.none(advantages)
    if loss.surrogate == "reinforce":
        return -product(advantages, logp), nowhere
    if loss.surrogate == "sapo":
        tau = _choose(advantages > 0, loss.sapo_tau_pos, loss.sapo_tau_neg, logp)
        return -product(torch.sigmoid(tau * (ratio - 1)) * (4 / tau), advantages), nowhere
    cap = math.inf if loss.ratio_cap is None else loss.ratio_cap
    if loss.surrogate in ("dppo_tv", "dppo_kl"):
        keep = _dppo_keeps(loss, tokens)
        weight = product(ratio.detach().clamp(max=cap), advantages)
        value = -product(product(weight, logp), keep.to(logp.dtype))
        dropped = ~keep
        return value, nowhere._replace(
            low=dropped & (advantages < 0), high=dropped & (advantages > 0)
        )
    low = -math.inf if loss.clip_low is None else 1 - loss.clip_low
    high = 1 + loss.clip_high
    if loss.surrogate == "cispo":
        value = -product(product(ratio.detach().clamp(low, high), advantages), logp)
        above = ratio > high
        return value, nowhere._replace(low=ratio < low, high=above, cispo=above & (advantages > 0))
    capped = ratio.clamp(max=cap)
    value = -torch.minimum(product(capped, advantages), product(ratio.clamp(low, high), advantages))
    dual = nowhere.dual
    if loss.dual_clip is not None:
        floor = -loss.dual_clip * advantages
        value = torch.where(advantages < 0, torch.minimum(value, floor), value)
        dual = (advantages < 0) & (capped > loss.dual_clip)
    return value, nowhere._replace(
        low=(capped < low) & (advantages < 0), high=(capped > high) & (advantages > 0), dual=dual
    )


def _choose(where: Tensor, a: float, b: float, like: Tensor) -> Tensor:
    """In the dtype of `like`: torch.where over two numbers would round them to fp32."""
    return torch.where(where, like.new_tensor(a), like.new_tensor(b))


def _dppo_keeps(loss: Any, tokens: _Tokens) -> Tensor:
    """Where this token's divergence from the old policy is within its bound."""
    logp, old, rises = tokens.logprobs.detach(), tokens.old_logprobs, tokens.advantages > 0
    p, q = logp.exp(), old.exp()
    if loss.surrogate == "dppo_tv":
        return torch.where(rises, p - q <= loss.clip_high, p - q >= -loss.clip_low)
    others = (1 - q) * torch.log((1 - q + DPPO_EPS) / (1 - p + DPPO_EPS))
    divergence = product(q, old - logp) + others
    return torch.where(
        rises,
        (divergence <= loss.clip_high) | (p <= q),
        (divergence <= loss.clip_low) | (p >= q),
    )


def _gmpo(loss: Any, d: Tensor, tokens: _Tokens, sequences: Sequences) -> tuple[Tensor, _Clipped]:
    """-mean(A) times the geometric mean of the clipped ratios, one loss per sequence."""
    advantages = tokens.advantages
    sign = advantages.sign()
    bounded = d.clamp(-loss.clip_low, loss.clip_high)
    clipped = sign * torch.minimum(product(sign, d), sign * bounded)
    count = sequences.total(tokens.token_weights).clamp(min=1)
    log_mean = sequences.total(product(tokens.token_weights, clipped)) / count
    value = -product(sequences.mean(advantages), exp(log_mean))
    low = (d < -loss.clip_low) & (advantages < 0)
    high = (d > loss.clip_high) & (advantages > 0)
    return value, _Clipped.none(advantages)._replace(low=low, high=high)


def _vespo_phi(
    loss: Any, d: Tensor, weight: Tensor, tokens: _Tokens, sequences: Sequences
) -> Tensor:
    """exp(lam + k ln w - lam w), w the product of the sequence's ratios and rollout weights."""
    log_weight = weight.log().clamp(VESPO_LOG_FLOOR, LOG_BOUND).where(tokens.mask, 0.0)
    total = sequences.total(d) + sequences.total(log_weight)
    log_w = sequences.spread(total.clamp(VESPO_LOG_FLOOR, LOG_BOUND))
    rises = tokens.advantages >= 0
    k = _choose(rises, loss.vespo_k_pos, loss.vespo_k_neg, d)
    lam = _choose(rises, loss.vespo_lambda_pos, loss.vespo_lambda_neg, d)
    phi = (lam + k * log_w - lam * log_w.exp()).exp()
    return phi.where(phi.isfinite(), 0.0)


def _entropy(
    loss: Any, tokens: _Tokens, given: Denominators, sequences: Sequences, divisor: Tensor
) -> Tensor:
    """The mean entropy that the bonus rewards."""
    assert tokens.entropy is not None
    chosen = tokens.entropy_mask
    entropy = tokens.entropy.where(chosen, 0.0)
    if loss.entropy_aggregation == "same":
        return (sequences.total(entropy) * token_weight(loss, sequences)).sum() / divisor
    if given.entropy_normalizer is not None:
        return entropy.sum() / given.entropy_normalizer
    return entropy.sum() / chosen.sum().clamp(min=1)


# ---- metrics ----------------------------------------------------------------------------------


def _mean_parts(x: Tensor, mask: Tensor, by: Sequences | None) -> tuple[Tensor, Tensor]:
    """Numerator and denominator of the mean of x over sequences, or over counting tokens."""
    if by is not None:
        return by.mean(x * mask).sum(), mask.new_tensor(by.count)
    return (x * mask).sum(), mask.sum()


def _ratio_metrics(
    loss: Any, d: Tensor, ratio: Tensor, clipped: _Clipped, mask: Tensor, sequences: Sequences
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    by = sequences if loss.ratio_level == "sequence" else None
    names = ("clip_low", "clip_high", "dual_clip", "cispo_clip")
    sums = {
        name: _mean_parts(where.to(mask.dtype), mask, by)[0]
        for name, where in zip(names, clipped, strict=True)
    }
    if by is None:
        counting, here = ratio.detach(), sequences.length > 0
        units, there = mask.sum(), mask > 0
    else:
        # A sequence without a token has the ratio exp(0), as in TRL.
        counting = sequences.mean(d.detach()).exp()
        here = there = torch.ones_like(sequences.length, dtype=torch.bool)
        units = mask.new_tensor(sequences.count)
    sums["ratio"], sums["ratio_units"] = counting.where(there, 0.0).sum(), units
    low, high = sequences.mean(clipped.low * mask), sequences.mean(clipped.high * mask)
    maxima = {
        "ratio_max": _largest(counting, there),
        "minus_ratio_min": _largest(-counting, there),
        "clip_low_max": _largest(low, here),
        "minus_clip_low_min": _largest(-low, here),
        "clip_high_max": _largest(high, here),
        "minus_clip_high_min": _largest(-high, here),
    }
    return sums, maxima


def _largest(x: Tensor, where: Tensor) -> Tensor:
    """The largest of those x, -inf if there are none."""
    none = x.new_full((1,), -math.inf)
    return torch.cat([x.where(where, -math.inf).flatten(), none]).amax()

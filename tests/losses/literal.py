"""formulas.md read literally: loops over sequences and counting tokens, one float64 scalar at a
time, differentiated by autograd. Written from that page alone; speed and extremes do not matter.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Result(NamedTuple):
    loss: float
    grad: Tensor  # [B, T]
    entropy_grad: Tensor  # [B, T]
    metrics: dict[str, float]
    terms: float  # the sum of the absolute values of what is added up in the loss


def const(x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def clamp(x: Tensor, low: float | None, high: float | None) -> Tensor:
    """Gradient 1 inside, bounds included, 0 outside."""
    if low is not None and x < low:
        return const(low)
    if high is not None and x > high:
        return const(high)
    return x


def number(x: Tensor) -> float:
    return float(x.detach())


def mean(values: list) -> float:
    return float(sum(values)) / len(values) if values else 0.0


class Sequence:
    """One sequence's counting tokens; every list below has one entry per such token."""

    def __init__(self, loss: Any, row: dict[str, Any]) -> None:
        self.loss = loss
        self.n = len(row["logprobs"])
        self.m = max(self.n, 1)
        self.logp = row["logprobs"]
        self.A = row["advantages"]
        self.old = row["old_logprobs"] or [x.detach() for x in self.logp]
        self.d = [x - o for x, o in zip(self.logp, self.old, strict=True)]
        bound = loss.log_ratio_clamp
        self.bounded = [clamp(d, bound and -bound, bound) for d in self.d]
        self.r = self.ratios()
        self.w = self.rollout_weights(row["rollout_logprobs"])
        self.u = row["token_weights"] or [const(1.0)] * self.n
        self.near = self.is_near(row["rollout_logprobs"])
        self.phi = [self.gamma_weight(A) for A in self.A] if loss.surrogate == "vespo" else []
        self.kl = self.kl_terms(row["ref_logprobs"])

    def ratios(self) -> list[Tensor]:
        level, total = self.loss.ratio_level, sum(self.d, const(0.0))
        if level == "sequence":
            self.sequence_ratio = (total / self.m).exp()
            return [self.sequence_ratio] * self.n
        if level == "sequence_sum":
            return [total.exp()] * self.n
        if level == "sequence_token":
            mean = (total / self.m).detach()
            return [clamp(x - x.detach() + mean, None, 10.0).exp() for x in self.logp]
        return [d.exp() for d in (self.d if self.loss.surrogate == "gmpo" else self.bounded)]

    def rollout_weights(self, rollout: list[Tensor] | None) -> list[float]:
        correction = self.loss.correction
        if correction is None:
            return [1.0] * self.n
        e = [number(o - q) for o, q in zip(self.old, rollout, strict=True)]
        e = [0.0 if math.isnan(x) else x for x in e]
        if correction.level == "sequence":
            e = [sum(e)] * self.n
        elif correction.level == "geometric":
            e = [sum(e) / self.m] * self.n
        low = -math.inf if correction.low is None else correction.low
        high = math.inf if correction.high is None else correction.high
        weights = [math.exp(min(max(x, -20.0), 20.0)) for x in e]
        if correction.mode == "truncate":
            return [min(max(w, low), high) for w in weights]
        return [w if low <= w <= high else 0.0 for w in weights]

    def is_near(self, rollout: list[Tensor] | None) -> bool:
        if self.loss.off_policy_threshold is None:
            return True
        behaviour = self.old if rollout is None else rollout
        drift = [number(b - x) for b, x in zip(behaviour, self.logp, strict=True)]
        drift = [0.0 if math.isnan(x) else x for x in drift]
        return sum(drift) / self.m <= self.loss.off_policy_threshold

    def keeps(self, t: int) -> bool:
        return bool(self.A[t] >= 0) or self.near

    # ---- surrogates ---------------------------------------------------------------------------

    def gamma_weight(self, A: Tensor) -> float:
        floor = math.log(1e-8)
        total = sum(number(d) for d in self.bounded)
        for w in self.w:
            total += min(max(math.log(w) if w > 0 else -math.inf, floor), 20.0)
        log_w = min(max(total, floor), 20.0)
        side = "pos" if A >= 0 else "neg"
        k, lam = getattr(self.loss, f"vespo_k_{side}"), getattr(self.loss, f"vespo_lambda_{side}")
        phi = math.exp(lam + k * log_w - lam * math.exp(log_w))
        return phi if math.isfinite(phi) else 0.0

    def term(self, t: int) -> Tensor:
        loss, r, A, logp = self.loss, self.r[t], self.A[t], self.logp[t]
        if loss.surrogate == "clip":
            plain = clamp(r, None, loss.ratio_cap) * A
            clipped = clamp(r, 1 - loss.clip_low, 1 + loss.clip_high) * A
            value = -(plain if plain <= clipped else clipped)
            if loss.dual_clip is not None and A < 0:
                bound = -loss.dual_clip * A
                value = value if value <= bound else bound
            return value
        if loss.surrogate == "cispo":
            low = None if loss.clip_low is None else 1 - loss.clip_low
            return -clamp(r, low, 1 + loss.clip_high).detach() * A * logp
        if loss.surrogate == "sapo":
            tau = loss.sapo_tau_pos if A > 0 else loss.sapo_tau_neg
            return -(4 / tau) * torch.sigmoid(tau * (r - 1)) * A
        if loss.surrogate == "vespo":
            return -self.phi[t] * A * logp
        if loss.surrogate in ("dppo_tv", "dppo_kl"):
            return -A * clamp(r, None, loss.ratio_cap).detach() * logp * self.dppo_keeps(t)
        assert loss.surrogate == "reinforce"
        return -A * logp

    def dppo_keeps(self, t: int) -> bool:
        loss, rises = self.loss, self.A[t] > 0
        logp, log_q = number(self.logp[t]), number(self.old[t])
        p, q = math.exp(logp), math.exp(log_q)
        if loss.surrogate == "dppo_tv":
            return p - q <= loss.clip_high if rises else p - q >= -loss.clip_low
        bkl = q * (log_q - logp) + (1 - q) * math.log((1 - q + 1e-8) / (1 - p + 1e-8))
        if rises:
            return bkl <= loss.clip_high or p <= q
        return bkl <= loss.clip_low or p >= q

    def gmpo(self) -> Tensor:
        loss, exponent, count = self.loss, const(0.0), 0.0
        for A, d, u in zip(self.A, self.d, self.u, strict=True):
            s = float(A.sign())
            plain, clipped = s * d, s * clamp(d, -loss.clip_low, loss.clip_high)
            exponent = exponent + u * s * (plain if plain <= clipped else clipped)
            count += float(u)
        A = sum(self.A, const(0.0)) / self.m
        value = -A * (exponent / max(count, 1.0)).exp()
        logs = [math.log(w) if w > 0 else -math.inf for w in self.w]
        kept = bool(A >= 0) or self.near
        return value * math.exp(sum(logs) / self.m) * kept

    def policy_terms(self) -> list[Tensor]:
        weights = [1.0] * self.n if self.loss.surrogate == "vespo" else self.w
        return [self.term(t) * self.keeps(t) * self.u[t] * weights[t] for t in range(self.n)]

    def kl_terms(self, ref: list[Tensor] | None) -> list[Tensor] | None:
        if ref is None:
            return None
        terms = []
        for t in range(self.n):
            k = kl_estimate(self.loss, ref[t], self.logp[t])
            terms.append(k * self.r[t] if self.loss.kl_ratio_weighted else k)
        return terms

    # ---- metrics ------------------------------------------------------------------------------

    def clipped(self, t: int) -> tuple[bool, bool, bool, bool]:
        """Below the range, above it, by dual clip, and TRL's cispo_clip_ratio."""
        loss, A = self.loss, float(self.A[t])
        r = number(self.r[t]) if loss.surrogate != "gmpo" else 0.0
        if loss.surrogate == "clip":
            r = r if loss.ratio_cap is None else min(r, loss.ratio_cap)
            dual = loss.dual_clip is not None and A < 0 and r > loss.dual_clip
            return r < 1 - loss.clip_low and A < 0, r > 1 + loss.clip_high and A > 0, dual, False
        if loss.surrogate == "cispo":
            below = loss.clip_low is not None and r < 1 - loss.clip_low
            above = r > 1 + loss.clip_high
            return below, above, False, above and A > 0
        if loss.surrogate == "gmpo":
            d = number(self.d[t])
            return d < -loss.clip_low and A < 0, d > loss.clip_high and A > 0, False, False
        if loss.surrogate.startswith("dppo"):
            dropped = not self.dppo_keeps(t)
            return dropped and A < 0, dropped and A > 0, False, False
        return False, False, False, False


def kl_estimate(loss: Any, ref: Tensor, logp: Tensor) -> Tensor:
    x = ref - logp
    straight = x**2 / 2
    kind = loss.kl_estimator.removesuffix("_st")
    clamped = loss.kl_clamp == "openrlhf" or (loss.kl_clamp == "verl" and kind == "k3")
    if clamped:
        x = clamp(x, -20.0, 20.0)
    value = {"k1": -x, "abs": x.abs(), "k2": x**2 / 2, "k3": torch.expm1(x) - x}[kind]
    if clamped:
        value = clamp(value, -10.0, 10.0)
    if loss.kl_estimator.endswith("_st"):
        return value.detach() + straight - straight.detach()
    return value


def aggregate(loss: Any, rows: list[list[Tensor]], normalizer, num_sequences) -> Tensor:
    zero = const(0.0)
    sums = [sum(row, zero) for row in rows]
    if loss.aggregation == "token_sum":
        return sum(sums, zero)
    if loss.aggregation == "token_mean":
        tokens = max(sum(len(row) for row in rows), 1)
        return sum(sums, zero) / (tokens if normalizer is None else normalizer)
    if num_sequences is None:
        counted = [row for row in rows if row] if loss.skip_empty else rows
        num_sequences = max(len(counted), 1)
    if loss.aggregation == "seq_mean_token_mean":
        sums = [s / max(len(row), 1) for s, row in zip(sums, rows, strict=True)]
    elif loss.aggregation == "seq_mean_token_sum_norm":
        sums = [s / normalizer for s in sums]
    return sum(sums, zero) / num_sequences


def literal(
    loss: Any,
    batch: dict[str, Tensor | None],
    normalizer: float | None = None,
    num_sequences: float | None = None,
    entropy_normalizer: float | None = None,
) -> Result:
    """Loss, gradients and metrics of a padded batch, named as PolicyLoss's call names them."""
    B, T = batch["logprobs"].shape
    mask = batch.get("mask")
    leaves = {name: {} for name in ("logprobs", "entropy")}
    spread = batch["advantages"].dim() == 1
    sequences, entropies, chosen = [], [], []
    for b in range(B):
        counting = [t for t in range(T) if mask is None or mask[b, t]]

        def values(name, b=b, counting=counting):
            x = batch.get(name)
            if x is None:
                return None
            if name in leaves:
                for t in counting:
                    leaves[name][b, t] = const(float(x[b, t])).requires_grad_()
                return [leaves[name][b, t] for t in counting]
            return [const(float(x[b] if x.dim() == 1 else x[b, t])) for t in counting]

        names = ("logprobs", "advantages", "old_logprobs", "ref_logprobs", "rollout_logprobs")
        row = {name: values(name) for name in (*names, "token_weights")}
        sequences.append(Sequence(loss, row))
        entropies.append(values("entropy"))
        e = batch.get("entropy_mask")
        chosen.append([e is None or bool(e[b, t]) for t in counting])

    if loss.surrogate == "gmpo":
        per_sequence = [s.gmpo() for s in sequences]
        # One value per sequence: as a row of equal tokens its mean is itself.
        rows = [[x] * s.n for x, s in zip(per_sequence, sequences, strict=True)]
    else:
        rows = [s.policy_terms() for s in sequences]
    policy = aggregate(loss, rows, normalizer, num_sequences)
    value, terms = policy, absolute(loss, rows, normalizer, num_sequences)
    if loss.kl_coef:
        kls = [s.kl for s in sequences]
        value = value + loss.kl_coef * aggregate(loss, kls, normalizer, num_sequences)
        terms += abs(loss.kl_coef) * absolute(loss, kls, normalizer, num_sequences)
    if loss.entropy_coef:
        picked = [
            [h if e else 0.0 * h for h, e in zip(hs, es, strict=True)]
            for hs, es in zip(entropies, chosen, strict=True)
        ]
        if loss.entropy_aggregation == "same":
            bonus = aggregate(loss, picked, normalizer, num_sequences)
        else:
            count = max(sum(map(sum, chosen)), 1)
            bonus = sum((h for hs in picked for h in hs), const(0.0))
            bonus = bonus / (count if entropy_normalizer is None else entropy_normalizer)
        value = value - loss.entropy_coef * bonus
        terms += abs(loss.entropy_coef * number(bonus))

    if value.requires_grad:
        value.backward()
    grads = {name: torch.zeros(B, T, dtype=torch.float64) for name in leaves}
    for name, tokens in leaves.items():
        for (b, t), leaf in tokens.items():
            grads[name][b, t] = 0.0 if leaf.grad is None else leaf.grad
    numbers = metrics(loss, sequences, entropies, spread) | {"policy_loss": number(policy)}
    return Result(number(value), grads["logprobs"], grads["entropy"], numbers, terms)


def absolute(loss: Any, rows: list[list[Tensor]], normalizer, num_sequences) -> float:
    rows = [[x.detach().abs() for x in row] for row in rows]
    return abs(float(aggregate(loss, rows, normalizer, num_sequences)))


def metrics(loss: Any, sequences: list[Sequence], entropies: list, spread: bool) -> dict:
    tokens = [(s, t) for s in sequences for t in range(s.n)]
    by_sequence = loss.ratio_level == "sequence"
    weights = [s.w[t] for s, t in tokens]
    d = [number(s.d[t]) for s, t in tokens]
    result = {
        "tokens": float(len(tokens)),
        "sequences": float(len(sequences)),
        "approx_kl": mean([math.expm1(x) - x for x in d]),
        "rollout_weight_mean": mean(weights),
        "kept_frac": mean([float(s.keeps(t)) for s, t in tokens]),
    }
    squared = mean([w * w for w in weights])
    result["rollout_ess"] = mean(weights) ** 2 / squared if squared else 0.0
    if sequences and all(s.kl is not None for s in sequences):
        result["kl"] = mean([number(s.kl[t]) for s, t in tokens])
    if sequences and all(h is not None for h in entropies):
        result["entropy"] = mean([number(h) for hs in entropies for h in hs])
    if loss.surrogate == "vespo":
        per_sequence = [s.phi[0] if s.n else 1.0 for s in sequences]  # no token: phi(1) = 1
        result["vespo_phi_mean"] = mean(per_sequence if spread else [s.phi[t] for s, t in tokens])

    shares = [[mean([s.clipped(t)[i] for t in range(s.n)]) for s in sequences] for i in range(4)]
    flat = [mean([s.clipped(t)[i] for s, t in tokens]) for i in range(4)]
    names = ("clip_frac_low", "clip_frac_high", "dual_clip_frac", "cispo_clip_ratio")
    for name, share, over_tokens in zip(names, shares, flat, strict=True):
        result[name] = mean(share) if by_sequence else over_tokens
    result["clip_frac"] = result["clip_frac_low"] + result["clip_frac_high"]
    for name, share in zip(names[:2], shares[:2], strict=True):
        # A sequence without a token has no share, but at level "sequence" a ratio: exp(0).
        share = [x for x, s in zip(share, sequences, strict=True) if s.n or by_sequence]
        result[f"{name}_min"] = min(share, default=math.nan)
        result[f"{name}_max"] = max(share, default=math.nan)

    ratios = [number(s.r[t]) for s, t in tokens]
    if by_sequence:
        ratios = [number(s.sequence_ratio) for s in sequences]
    result["ratio_mean"] = mean(ratios)
    result["ratio_min"] = min(ratios, default=math.nan)
    result["ratio_max"] = max(ratios, default=math.nan)
    return result

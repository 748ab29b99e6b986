"""How the losses' metrics are read from their sums and extrema."""

from __future__ import annotations

import math

from rlkern.metrics import (
    Entries,
    Entry,
    Layout,
    Reader,
    at_least,
    largest,
    mean,
    quotient,
    smallest,
)
from rlkern.reference import policy_loss as policy_definition
from rlkern.reference import value_loss as value_definition


def _clip_frac(of: Entries) -> Entry:
    return (of["clip_low"] + of["clip_high"]) / at_least(of["ratio_units"], 1)


def _effective_sample_size(of: Entries) -> Entry:
    """mean(w)^2 / mean(w^2), 0 where every weight is 0."""
    w, squared, n = of["rollout_weight"], of["rollout_weight_squared"], of["tokens"]
    return w * w / at_least(squared * n, math.ulp(0.0))


POLICY_READERS: dict[str, Reader] = {
    "policy_loss": mean("policy_loss", "policy_loss_units"),
    "kl": mean("kl"),
    "entropy": mean("entropy"),
    "approx_kl": mean("approx_kl"),
    "clip_frac": _clip_frac,
    "clip_frac_low": mean("clip_low", "ratio_units"),
    "clip_frac_high": mean("clip_high", "ratio_units"),
    "clip_frac_low_min": smallest("clip_low_min"),
    "clip_frac_low_max": largest("clip_low_max"),
    "clip_frac_high_min": smallest("clip_high_min"),
    "clip_frac_high_max": largest("clip_high_max"),
    "dual_clip_frac": mean("dual_clip", "ratio_units"),
    "cispo_clip_ratio": mean("cispo_clip", "ratio_units"),
    "ratio_mean": mean("ratio", "ratio_units"),
    "ratio_min": smallest("ratio_min", "ratio_units"),
    "ratio_max": largest("ratio_max", "ratio_units"),
    "rollout_weight_mean": mean("rollout_weight"),
    "rollout_ess": _effective_sample_size,
    "kept_frac": mean("kept"),
    "vespo_phi_mean": mean("vespo_phi", "vespo_units"),
    "tokens": lambda of: of["tokens"],
    "sequences": lambda of: of["sequences"],
}
POLICY_METRICS = Layout(policy_definition.SUMS, policy_definition.MAXIMA, POLICY_READERS)


def _explained_variance(of: Entries) -> Entry:
    """1 - var(R - v) / var(R); NaN where the returns do not vary."""
    n = at_least(of["tokens"], 1)

    def variance(name: str) -> Entry:
        mean_of = of[name] / n
        return at_least(of[name + "_squared"] / n - mean_of * mean_of, 0)

    return 1 - quotient(variance("residual"), variance("return"))


VALUE_METRICS = Layout(
    value_definition.SUMS,
    (),
    {
        "value_loss": mean("value_loss", "value_loss_units"),
        "value_clip_frac": mean("clipped"),
        "explained_variance": _explained_variance,
        "value_mean": mean("value"),
        "return_mean": mean("return"),
        "tokens": lambda of: of["tokens"],
        "sequences": lambda of: of["sequences"],
    },
)

"""PolicyLoss: a policy-gradient objective, term by term."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from rlkern.losses import exact_kl
from rlkern.losses.calls import LossOutput, check_denominators, check_skip_empty, missing, unused
from rlkern.losses.heads import PolicyHeads
from rlkern.losses.presets import PRESETS
from rlkern.losses.readers import POLICY_METRICS
from rlkern.metrics import Metrics
from rlkern.ops import _checks, _layout
from rlkern.ops.policy_loss import (
    CORRECTION_LEVELS,
    CORRECTION_MODES,
    RATIO_LEVELS,
    SURROGATES,
    numbers,
    policy_loss,
)
from rlkern.reference import kl_penalty as kl
from rlkern.reference import policy_loss as definition
from rlkern.reference.aggregation import AGGREGATIONS, Denominators

ENTROPY_AGGREGATIONS = ("token_mean", "same")

# Defaults that depend on the surrogate: what it does not list, it does not use.
_DEFAULTS: dict[str, dict[str, float | None]] = {
    "clip": {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None, "ratio_cap": None},
    "cispo": {"clip_low": None, "clip_high": 4.0},
    "sapo": {"sapo_tau_pos": 1.0, "sapo_tau_neg": 1.05},
    "gmpo": {"clip_low": 0.4, "clip_high": 0.4},
    "vespo": {
        "vespo_k_pos": 2.0,
        "vespo_lambda_pos": 3.0,
        "vespo_k_neg": 3.0,
        "vespo_lambda_neg": 2.0,
    },
    "dppo_tv": {"clip_low": 0.15, "clip_high": 0.15, "ratio_cap": 20.0},
    "dppo_kl": {"clip_low": 0.05, "clip_high": 0.05, "ratio_cap": 20.0},
    "reinforce": {},
}
_BY_SURROGATE = sorted({name for names in _DEFAULTS.values() for name in names})
_LOG_RATIO_CLAMP = 20.0


@dataclass(frozen=True, kw_only=True)
class RolloutCorrection:
    """Importance weights against the engine that sampled, from old - rollout log-probabilities.

    With e = old - rollout per token (0 where the rollout's is NaN), w = exp(clamp(x, -20, 20)),
    x by level: "token" e_t; "sequence" sum_t e_t; "geometric" sum_t e_t / |o|. Mode "truncate"
    clamps w to [low, high]; mode "mask" keeps w inside [low, high] and takes 0 outside. A bound
    that is None is left out.
    """

    level: str = "token"
    mode: str = "truncate"
    low: float | None = None
    high: float | None = 2.0

    def __post_init__(self) -> None:
        _checks.one_of(self.level, CORRECTION_LEVELS, "level")
        _checks.one_of(self.mode, CORRECTION_MODES, "mode")
        for name in ("low", "high"):
            if getattr(self, name) is not None:
                _checks.number(getattr(self, name), name, minimum=0.0)
        if self.low is None and self.high is None:
            raise ValueError("low, high: expected at least one bound, got None for both")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low: expected at most high ({self.high}), got {self.low}")


@dataclass(frozen=True, kw_only=True)
class PolicyLoss(PolicyHeads):
    """A policy-gradient objective: what is minimised, term by term.

    With d = logp - old, r the ratio, A the advantage, per token (docs/losses.md has every formula
    with its paper and its names in TRL, verl and OpenRLHF):

    - surrogate "clip": -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A); "cispo":
      -sg(clip(r)) A logp; "sapo": a sigmoid gate; "gmpo": geometric mean of the sequence's
      ratios; "vespo": a gamma weight of the sequence's ratio; "dppo_tv", "dppo_kl": tokens kept
      by their divergence; "reinforce": -A logp
    - ratio_level "token": r = exp(d); "sequence": exp(mean d); "sequence_token": its value with
      the token's gradient; "sequence_sum": exp(sum d)

    Then, in this order: the off-policy mask, token_weights, the rollout correction, + kl_coef *
    KL, the aggregation, - entropy_coef * the mean entropy.

    Clip ranges are offsets from 1. Options that depend on the surrogate are None until given, and
    then take that surrogate's default; one that the surrogate does not use is an error.

    Args:
        surrogate: one of SURROGATES.
        ratio_level: one of RATIO_LEVELS; gmpo, vespo, dppo and reinforce are token-level.
        clip_low, clip_high: the clip range (in log space for gmpo, of p - p_old for dppo_tv, of
            the binary KL for dppo_kl). cispo's clip_low None: no lower bound.
        dual_clip: with A < 0 the loss is at most -dual_clip * A; > 1 (clip).
        ratio_cap: upper bound of r in the unclipped branch (clip: TRL's delta; dppo).
        log_ratio_clamp: bound of |d| at level "token" and in vespo; None leaves it out.
        kl_coef, kl_estimator, kl_clamp: weight, estimator (see kl_penalty), bounds (None, "verl",
            "openrlhf") of the KL to the reference. kl_estimator "exact": KL(policy || reference)
            over the whole vocabulary (see kl_divergence), from from_logits and from_hidden alone,
            which then take the reference's logits or hidden states; without bounds.
        kl_ratio_weighted: the KL is multiplied by r, with gradient (TRL's bias correction); not
            the exact one.
        entropy_coef: weight of the entropy bonus.
        entropy_aggregation: "token_mean", or "same" as the policy term's.
        aggregation: one of AGGREGATIONS; seq_mean_token_sum_norm needs a normalizer in the call.
        skip_empty: sequences without a counting token do not count as sequences (verl).
        off_policy_threshold: drop tokens with A < 0 of sequences whose mean of behaviour - logp
            is above this.
        correction: a RolloutCorrection, or None.
        sapo_tau_pos, sapo_tau_neg: temperatures of sapo's gate for A > 0 and otherwise.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: shape and rate of vespo's
            weight for A >= 0 and A < 0.

    Raises:
        TypeError, ValueError: an unknown name, a number out of its range, an option that the
            others contradict.
    """

    surrogate: str = "clip"
    ratio_level: str = "token"
    clip_low: float | None = None
    clip_high: float | None = None
    dual_clip: float | None = None
    ratio_cap: float | None = None
    log_ratio_clamp: float | None = _LOG_RATIO_CLAMP
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    kl_clamp: str | None = None
    kl_ratio_weighted: bool = False
    entropy_coef: float = 0.0
    entropy_aggregation: str = "token_mean"
    aggregation: str = "token_mean"
    skip_empty: bool = False
    off_policy_threshold: float | None = None
    correction: RolloutCorrection | None = None
    sapo_tau_pos: float | None = None
    sapo_tau_neg: float | None = None
    vespo_k_pos: float | None = None
    vespo_lambda_pos: float | None = None
    vespo_k_neg: float | None = None
    vespo_lambda_neg: float | None = None

    def __post_init__(self) -> None:
        _checks.one_of(self.surrogate, SURROGATES, "surrogate")
        _checks.one_of(self.ratio_level, RATIO_LEVELS, "ratio_level")
        _checks.one_of(self.kl_estimator, (*kl.ESTIMATORS, exact_kl.EXACT), "kl_estimator")
        if self.kl_clamp is not None:
            _checks.one_of(self.kl_clamp, kl.CLAMPS, "kl_clamp")
        _checks.one_of(self.aggregation, AGGREGATIONS, "aggregation")
        _checks.one_of(self.entropy_aggregation, ENTROPY_AGGREGATIONS, "entropy_aggregation")
        for name in ("kl_ratio_weighted", "skip_empty"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected a bool, got {getattr(self, name)!r}")
        for name in ("kl_coef", "entropy_coef"):
            _checks.number(getattr(self, name), name)
        if self.off_policy_threshold is not None:
            _checks.number(self.off_policy_threshold, "off_policy_threshold")
        if self.log_ratio_clamp is not None:
            _checks.number(self.log_ratio_clamp, "log_ratio_clamp", above=0.0)
        if self.correction is not None and not isinstance(self.correction, RolloutCorrection):
            raise TypeError(
                f"correction: expected a RolloutCorrection or None, got {self.correction!r}"
            )
        self._take_defaults()
        self._check_ranges()
        self._check_contradictions()
        # Filled now, so that torch.compile finds plain attributes.
        _ = self._without_exact_kl, self._numbers, self._names

    def _take_defaults(self) -> None:
        defaults = _DEFAULTS[self.surrogate]
        for name in _BY_SURROGATE:
            if getattr(self, name) is None:
                object.__setattr__(self, name, defaults.get(name))
            elif name not in defaults:
                users = [surrogate for surrogate, names in _DEFAULTS.items() if name in names]
                raise ValueError(
                    f"{name}: expected None with surrogate {self.surrogate!r} (it is an option of "
                    f"{', '.join(users)}), got {getattr(self, name)}"
                )

    def _check_ranges(self) -> None:
        for name in _BY_SURROGATE:
            value = getattr(self, name)
            if value is None:
                continue
            if name in ("clip_low", "clip_high"):
                _checks.number(value, name, minimum=0.0)
            else:
                _checks.number(value, name, above=1.0 if name == "dual_clip" else 0.0)
        of_ratio = self.surrogate in ("clip", "cispo")
        if of_ratio and self.clip_low is not None and self.clip_low > 1:
            raise ValueError(
                "clip_low: expected an offset from 1 (0.2 bounds the ratio at 0.8) of at most 1, "
                f"got {self.clip_low}"
            )

    def _check_contradictions(self) -> None:
        if self.surrogate not in ("clip", "cispo", "sapo") and self.ratio_level != "token":
            raise ValueError(
                f"ratio_level: expected 'token' with surrogate {self.surrogate!r}, "
                f"got {self.ratio_level!r}"
            )
        if self.log_ratio_clamp not in (None, _LOG_RATIO_CLAMP) and (
            self.ratio_level != "token" or self.surrogate == "gmpo"
        ):
            raise ValueError(
                "log_ratio_clamp: expected its default or None, since neither the sequence levels "
                f"nor gmpo use it, got {self.log_ratio_clamp}"
            )
        if self.surrogate == "gmpo" and self.aggregation != "seq_mean_token_mean":
            raise ValueError(
                "aggregation: expected 'seq_mean_token_mean' with surrogate 'gmpo', which has one "
                f"loss per sequence, got {self.aggregation!r}"
            )
        check_skip_empty(self)
        exact_kl.check_options(self)
        if self.kl_clamp == "verl" and not self.kl_estimator.startswith("k3"):
            raise ValueError(
                "kl_clamp: expected None or 'openrlhf' with kl_estimator "
                f"{self.kl_estimator!r} (verl clamps k3 alone), got 'verl'"
            )
        if self.entropy_aggregation != "token_mean" and self.entropy_coef == 0:
            raise ValueError(
                "entropy_aggregation: expected its default with entropy_coef 0, "
                f"got {self.entropy_aggregation!r}"
            )
        if (
            self.surrogate == "vespo"
            and self.correction is not None
            and self.correction.level != "token"
        ):
            raise ValueError(
                "correction: expected level 'token' with surrogate 'vespo', "
                f"got {self.correction.level!r}"
            )

    # What every call needs again.
    @cached_property
    def _without_exact_kl(self) -> PolicyLoss:
        """What log-probabilities give of the loss: the exact KL is a term beside it."""
        if self.kl_estimator != exact_kl.EXACT:
            return self
        return replace(self, kl_coef=0.0, kl_estimator="k3")

    @cached_property
    def _numbers(self) -> tuple[float, ...]:
        """The fields as the operator takes them."""
        return numbers(self._without_exact_kl)

    @cached_property
    def _names(self) -> dict[tuple[bool, bool], tuple[str, ...]]:
        """The metrics' names, by whether the call has ref_logprobs, and entropy."""
        both = (False, True)
        return {
            (ref, entropy): self._metric_names(ref, entropy) for ref in both for entropy in both
        }

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> PolicyLoss:
        """A published objective by name, with any field overridden.

        Raises:
            ValueError: an unknown preset.
            TypeError: an override that is no field.
        """
        _checks.one_of(name, tuple(PRESETS), "preset")
        known = {field.name for field in fields(cls)}
        for override in overrides:
            if override not in known:
                raise TypeError(
                    f"{override}: expected a field of PolicyLoss ({', '.join(sorted(known))})"
                )
        return cls(**(PRESETS[name] | overrides))

    def replace(self, **changes: Any) -> PolicyLoss:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def __call__(
        self,
        logprobs: Tensor,
        advantages: Tensor,
        *,
        old_logprobs: Tensor | None = None,
        ref_logprobs: Tensor | None = None,
        rollout_logprobs: Tensor | None = None,
        entropy: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        token_weights: Tensor | None = None,
        entropy_mask: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        num_sequences: float | Tensor | None = None,
        entropy_normalizer: float | Tensor | None = None,
    ) -> LossOutput:
        """The loss from log-probabilities, its metrics from the same pass.

        Padded [B, T] with a mask, or packed [total] with cu_seqlens. What a masked position holds
        (NaN, inf) changes nothing. Gradients go to logprobs and, with entropy_coef, to entropy;
        first derivatives only.

        Args:
            logprobs: [B, T] or [total]; fp32, or a 16-bit type that is widened, or fp64 (which
                runs in eager PyTorch). The rest are widened to the same.
            advantages: [B], or one per token in the shape of logprobs.
            old_logprobs: of the policy before the update. None: logprobs without gradient, r = 1.
            ref_logprobs: of the reference; needed with kl_coef.
            rollout_logprobs: of the engine that sampled; NaN where it gave none. Needed with
                correction; with off_policy_threshold it is the behaviour, else old_logprobs is.
            entropy: per token; needed with entropy_coef.
            mask: bool or integer, true where a token counts. None: all do.
            cu_seqlens: [B + 1] int32 or int64, 0 = first <= ... <= last = total.
            token_weights: per token, multiply the policy term (an entropy-quantile mask, say).
            entropy_mask: bool or integer, where the entropy bonus applies. None: mask.
            normalizer: number or 0-dimensional tensor that divides instead of the token count
                (token_mean; a global count / processes), or multiplies the number of sequences
                (seq_mean_token_sum_norm; the generation limit).
            num_sequences: number or 0-dimensional tensor instead of B (seq_mean aggregations).
            entropy_normalizer: number or 0-dimensional tensor instead of the entropy mask's count.

        Returns:
            LossOutput(loss, metrics): a 0-dimensional fp32 (fp64) tensor, and Metrics.

        Raises:
            TypeError, ValueError: a wrong type, dtype, shape or device; an argument that the
                objective needs and that is missing, or that it does not use.
            RuntimeError: a backend was asked for that cannot serve the call.
        """
        exact_kl.refuse_call(self)
        layout = _layout.Layout("logprobs", logprobs, cu_seqlens)
        batch = definition.Batch(
            layout.values,
            layout.per_sequence_or_token(advantages, "advantages"),
            layout.flags(mask, "mask"),
            layout.constants(old_logprobs, "old_logprobs"),
            layout.constants(ref_logprobs, "ref_logprobs"),
            layout.constants(rollout_logprobs, "rollout_logprobs"),
            layout.tokens(entropy, "entropy"),
            layout.constants(token_weights, "token_weights"),
            layout.flags(entropy_mask, "entropy_mask"),
            layout.offsets,
        )
        given = Denominators(
            layout.denominator(normalizer, "normalizer"),
            layout.denominator(num_sequences, "num_sequences"),
            layout.denominator(entropy_normalizer, "entropy_normalizer"),
        )
        self._check_call(batch, given)
        loss, vector = policy_loss(self, batch, given)
        names = self._names[batch.ref_logprobs is not None, batch.entropy is not None]
        return LossOutput(loss, Metrics(vector, POLICY_METRICS, names))

    def _check_call(self, batch: definition.Batch, given: Denominators) -> None:
        if self.kl_coef and batch.ref_logprobs is None:
            missing("ref_logprobs", f"kl_coef is {self.kl_coef}")
        if self.entropy_coef and batch.entropy is None:
            missing("entropy", f"entropy_coef is {self.entropy_coef}")
        if self.correction is not None and batch.rollout_logprobs is None:
            missing("rollout_logprobs", "the loss has a rollout correction")
        uses_rollout = self.correction is not None or self.off_policy_threshold is not None
        if batch.rollout_logprobs is not None and not uses_rollout:
            unused("rollout_logprobs", "the loss has no correction and no off_policy_threshold")
        if not self.entropy_coef and batch.entropy_mask is not None:
            unused("entropy_mask", "entropy_coef is 0")
        by_tokens = self.entropy_coef and self.entropy_aggregation == "token_mean"
        if given.entropy_normalizer is not None and not by_tokens:
            unused("entropy_normalizer", "the loss divides no entropy by a count of tokens")
        check_denominators(self, given)

    def _metric_names(self, has_ref: bool, has_entropy: bool) -> tuple[str, ...]:
        names = ["policy_loss", "approx_kl", "ratio_mean", "ratio_min", "ratio_max", "tokens"]
        names.append("sequences")
        if has_ref:
            names.append("kl")
        if has_entropy:
            names.append("entropy")
        if self.surrogate in ("clip", "cispo", "gmpo", "dppo_tv", "dppo_kl"):
            names += ["clip_frac", "clip_frac_low", "clip_frac_high"]
            names += [
                f"clip_frac_{side}_{end}" for side in ("low", "high") for end in ("min", "max")
            ]
        if self.dual_clip is not None:
            names.append("dual_clip_frac")
        if self.surrogate == "cispo":
            names.append("cispo_clip_ratio")
        if self.surrogate == "vespo":
            names.append("vespo_phi_mean")
        if self.correction is not None:
            names += ["rollout_weight_mean", "rollout_ess"]
        if self.off_policy_threshold is not None:
            names.append("kept_frac")
        return tuple(names)

"""ValueLoss: the clipped regression of a critic."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlkern.losses.calls import LossOutput, check_denominators, check_skip_empty
from rlkern.losses.readers import VALUE_METRICS
from rlkern.metrics import Metrics
from rlkern.ops import _checks, _layout
from rlkern.ops.value_loss import value_loss
from rlkern.reference import value_loss as definition
from rlkern.reference.aggregation import AGGREGATIONS, Denominators


@dataclass(frozen=True, kw_only=True)
class ValueLoss:
    """The clipped value loss of PPO (Schulman et al., 2017, as in its reference code).

    0.5 * agg(max((v - R)^2, (clamp(v, v_old - clip, v_old + clip) - R)^2)), or without a clip
    0.5 * agg((v - R)^2).

    Args:
        clip: how far a value may move from its old one, above 0; None: not clipped.
        aggregation: one of AGGREGATIONS, as in PolicyLoss.
        skip_empty: sequences without a counting token do not count as sequences.

    Raises:
        TypeError, ValueError: an unknown name, a number out of its range, a contradiction.
    """

    clip: float | None = 0.2
    aggregation: str = "token_mean"
    skip_empty: bool = False

    def __post_init__(self) -> None:
        if self.clip is not None:
            _checks.number(self.clip, "clip", above=0.0)
        _checks.one_of(self.aggregation, AGGREGATIONS, "aggregation")
        if not isinstance(self.skip_empty, bool):
            raise TypeError(f"skip_empty: expected a bool, got {self.skip_empty!r}")
        check_skip_empty(self)

    def __call__(
        self,
        values: Tensor,
        returns: Tensor,
        *,
        old_values: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        num_sequences: float | Tensor | None = None,
    ) -> LossOutput:
        """The loss from values, its metrics from the same pass.

        Padded [B, T] with a mask, or packed [total] with cu_seqlens. What a masked position holds
        changes nothing. Gradients go to values; first derivatives only.

        Args:
            values: [B, T] or [total]; fp32, or a 16-bit type that is widened, or fp64 (which runs
                in eager PyTorch). The rest are widened to the same.
            returns: the regression target R, in the same shape.
            old_values: of the critic before the update; needed with clip.
            mask, cu_seqlens, normalizer, num_sequences: as in PolicyLoss.

        Returns:
            LossOutput(loss, metrics), metrics value_loss, value_clip_frac (the share of tokens
            whose clipped square is the larger), explained_variance = 1 - var(R - v) / var(R),
            value_mean, return_mean, tokens, sequences.

        Raises:
            TypeError, ValueError: a wrong type, dtype, shape or device; an argument that the
                objective needs and that is missing, or that it does not use.
            RuntimeError: a backend was asked for that cannot serve the call.
        """
        layout = _layout.Layout("values", values, cu_seqlens)
        old = layout.constants(old_values, "old_values")
        targets = layout.constants(returns, "returns")
        if targets is None:
            raise TypeError("returns: expected a torch.Tensor, got None")
        batch = definition.ValueBatch(
            layout.values, targets, layout.flags(mask, "mask"), old, layout.offsets
        )
        given = Denominators(
            layout.denominator(normalizer, "normalizer"),
            layout.denominator(num_sequences, "num_sequences"),
        )
        if self.clip is not None and old is None:
            raise ValueError(f"old_values: expected a tensor, since clip is {self.clip}, got None")
        if self.clip is None and old is not None:
            raise ValueError("old_values: expected None, since clip is None")
        check_denominators(self, given)
        loss, vector = value_loss(self, batch, given)
        return LossOutput(loss, Metrics(vector, VALUE_METRICS, tuple(VALUE_METRICS.readers)))

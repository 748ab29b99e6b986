"""What a call of a loss returns, and the arguments that it needs or does not use."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from rlkern.metrics import Metrics
from rlkern.reference.aggregation import Denominators


class LossOutput(NamedTuple):
    """What a loss returns."""

    loss: Tensor
    metrics: Metrics


def missing(name: str, because: str) -> None:
    raise ValueError(f"{name}: expected a tensor, since {because}, got None")


def unused(name: str, because: str) -> None:
    raise ValueError(f"{name}: expected None, since {because}")


def check_skip_empty(loss: Any) -> None:
    if loss.skip_empty and not loss.aggregation.startswith("seq_mean"):
        raise ValueError(
            f"skip_empty: expected False with aggregation {loss.aggregation!r}, which does "
            "not count sequences, got True"
        )


def check_denominators(loss: Any, given: Denominators) -> None:
    normed = loss.aggregation == "seq_mean_token_sum_norm"
    if normed and given.normalizer is None:
        missing("normalizer", "aggregation 'seq_mean_token_sum_norm' divides by it")
    if given.normalizer is not None and not (normed or loss.aggregation == "token_mean"):
        unused("normalizer", f"aggregation {loss.aggregation!r} does not divide by it")
    if given.num_sequences is not None:
        if not loss.aggregation.startswith("seq_mean"):
            unused("num_sequences", f"aggregation {loss.aggregation!r} counts no sequences")
        if loss.skip_empty:
            unused("num_sequences", "skip_empty counts the sequences")

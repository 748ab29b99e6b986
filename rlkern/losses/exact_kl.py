"""kl_estimator="exact": its options, and the reference that from_logits and from_hidden take."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlkern.losses.calls import missing, unused
from rlkern.ops._exact_kl import ReferenceHead, ReferenceLogits
from rlkern.ops.kl_divergence import checked_reference
from rlkern.ops.linear_kl_divergence import checked_reference_head
from rlkern.ops.policy_rows import kl_scale
from rlkern.reference.aggregation import Denominators
from rlkern.reference.kl_penalty import ESTIMATORS
from rlkern.reference.policy_loss import Batch

EXACT = "exact"


def check_options(loss: Any) -> None:
    """Refuses what only an estimate needs."""
    if loss.kl_estimator != EXACT:
        return
    for name, expected in (("kl_clamp", None), ("kl_ratio_weighted", False)):
        if getattr(loss, name) != expected:
            raise ValueError(
                f"{name}: expected {expected} with kl_estimator 'exact', an expectation over the "
                f"vocabulary, got {getattr(loss, name)!r}"
            )


def refuse_call(loss: Any) -> None:
    """Log-probabilities of one token do not give an expectation over all."""
    if loss.kl_estimator == EXACT:
        raise ValueError(
            f"kl_estimator: expected one of {', '.join(ESTIMATORS)} in a call on log-probabilities,"
            " got 'exact', which needs all logits: call from_logits or from_hidden"
        )


def _wanted(loss: Any, name: str, value: object, batch: Batch) -> bool:
    """Whether the call has the reference that it needs, and nothing that it does not use."""
    if loss.kl_estimator != EXACT:
        if value is not None:
            unused(name, f"kl_estimator is {loss.kl_estimator!r}, not 'exact'")
        return False
    if batch.ref_logprobs is not None:
        unused("ref_logprobs", f"kl_estimator 'exact' takes {name}")
    if value is None and loss.kl_coef:
        missing(name, f"kl_coef is {loss.kl_coef} and kl_estimator 'exact'")
    return value is not None


def _scale(loss: Any, batch: Batch, given: Denominators) -> Tensor | None:
    if not loss.kl_coef:
        return None
    return kl_scale(loss.kl_coef, loss, batch, given)


def reference_logits(
    loss: Any, logits: Tensor, ref_logits: object, batch: Batch, given: Denominators
) -> ReferenceLogits | None:
    """Of from_logits, checked; None where the loss takes none."""
    if not _wanted(loss, "ref_logits", ref_logits, batch):
        return None
    ref = checked_reference(logits, ref_logits)
    return ReferenceLogits(ref, _scale(loss, batch, given))


def reference_head(
    loss: Any,
    hidden: Tensor,
    weight: Tensor,
    of_reference: tuple[object, object, object],
    batch: Batch,
    given: Denominators,
) -> ReferenceHead | None:
    """Of from_hidden, checked: ref_hidden, ref_weight and ref_bias."""
    ref_hidden, ref_weight, ref_bias = of_reference
    if not _wanted(loss, "ref_hidden", ref_hidden, batch):
        for name, value in (("ref_weight", ref_weight), ("ref_bias", ref_bias)):
            if value is not None:
                unused(name, "there is no ref_hidden")
        return None
    if ref_weight is None:
        missing("ref_weight", "ref_hidden is given")
    factors = checked_reference_head(hidden, weight, ref_hidden, ref_weight, ref_bias)
    return ReferenceHead(*factors, _scale(loss, batch, given))

"""PolicyLoss from logits and from hidden states: its other two entry points."""

from __future__ import annotations

import difflib
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rlkern.losses import exact_kl
from rlkern.losses.calls import LossOutput
from rlkern.losses.readers import POLICY_METRICS
from rlkern.metrics import Metrics
from rlkern.ops import _checks
from rlkern.ops._head import Head, checked_cut, checked_products
from rlkern.ops._layout import Layout
from rlkern.ops.policy_hidden import policy_loss_hidden
from rlkern.ops.policy_logits import policy_loss_logits
from rlkern.ops.policy_loss import numbers
from rlkern.ops.policy_rows import RowArguments
from rlkern.reference import linear_token_logprobs as reference
from rlkern.reference.aggregation import Denominators
from rlkern.reference.policy_loss import Batch

# Arguments of a call that every entry point takes alike.
_GIVEN = (
    "old_logprobs",
    "ref_logprobs",
    "rollout_logprobs",
    "token_weights",
    "entropy_mask",
    "normalizer",
    "num_sequences",
    "entropy_normalizer",
)


class PolicyHeads:
    """What PolicyLoss inherits. The same arguments give the same loss, gradient and metrics on
    each entry point."""

    @cached_property
    def _token_sum_numbers(self: Any) -> tuple[float, ...]:
        """Of this loss as a plain sum over tokens."""
        return numbers(
            replace(
                self,
                aggregation="token_sum",
                skip_empty=False,
                entropy_aggregation="same" if self.entropy_coef else "token_mean",
            )
        )

    def from_logits(
        self: Any,
        logits: Tensor,
        token_ids: Tensor,
        advantages: Tensor,
        *,
        temperature: float | Tensor = 1.0,
        softcap: float | None = None,
        entropy: bool = False,
        inplace: bool = False,
        ref_logits: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        **given: Any,
    ) -> LossOutput:
        """The loss from logits: what token_logprobs and a call of this loss give, in one.

        A loss that is separable by token (ratio_level "token", no gmpo, vespo or
        off_policy_threshold, a rollout correction of level "token") forms the gradient with
        respect to the logits in the forward pass: each row is read from memory once and its
        gradient written once. Other losses take a pass of their own for the log-probabilities.

        Args:
            logits: [B, T, V], or [total, V] with cu_seqlens; dtypes as in token_logprobs.
            token_ids: [B, T] or [total], int64 or int32, in [0, V) where the mask is true.
            advantages: [B], or one per token.
            temperature, softcap: as in token_logprobs.
            entropy: measure the entropy although the loss has no bonus (with entropy_coef it is
                measured anyway).
            inplace: write the gradient over the logits, which then must not be read any more:
                autograd is told, so that in eager another saved use of them, or a second backward,
                raises. Inside torch.compile the out-of-place form runs. For next-token logits pass
                the whole [B, T + 1, V] with one masked column.
            ref_logits: of the reference, in the shape and dtype of logits, without gradient; needed
                with kl_estimator "exact" and a kl_coef. Temperature and softcap are theirs too.
            mask, cu_seqlens: as in a call of this loss.
            **given: old_logprobs, ref_logprobs, rollout_logprobs, token_weights, entropy_mask,
                normalizer, num_sequences and entropy_normalizer, as in a call of this loss.

        Returns, Raises:
            As a call of this loss, and what token_logprobs raises.
        """
        tensor = _checks.require_logits(logits)
        layout = Layout.of_rows("logits", tensor, cu_seqlens)
        rows = _row_arguments(
            "logits", tensor, token_ids, layout.flags(mask, "mask"), temperature, softcap
        )
        _checks.check_token_values(*rows[:3], tensor.shape[-1])
        measured = _wants_entropy(self, entropy)
        batch, denominators = _collected(layout, advantages, rows.mask, given)
        ref = exact_kl.reference_logits(self, tensor, ref_logits, batch, denominators)
        base = self._without_exact_kl
        base._check_call(_with_entropy(batch, measured), denominators)
        loss, vector = policy_loss_logits(
            base, tensor, rows, batch, denominators, measured, _flag(inplace, "inplace"), ref
        )
        return _output(
            self, loss, vector, batch.ref_logprobs is not None or ref is not None, measured
        )

    def from_hidden(
        self: Any,
        hidden: Tensor,
        weight: Tensor,
        token_ids: Tensor,
        advantages: Tensor,
        *,
        bias: Tensor | None = None,
        temperature: float | Tensor = 1.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        entropy: bool = False,
        metrics: bool = True,
        logits_dtype: torch.dtype | None = None,
        memory_budget: int | None = None,
        batch_invariant: bool = False,
        compact: bool | None = None,
        ref_hidden: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        **given: Any,
    ) -> LossOutput:
        """The loss from hidden states and the lm_head, the logits never whole in memory.

        The gradients are taken in the forward pass: per chunk of tokens one product for the logits,
        one for hidden's gradient and one for the weight's, the latter two only where they are
        needed. Only where a loss couples the tokens of a sequence (see from_logits), and one is
        longer than a chunk, are its logits made twice. kl_estimator "exact" makes the reference's
        logits of the same chunk besides, and counts them in memory_budget.

        Args:
            hidden: [B, T, D], or [total, D] with cu_seqlens.
            weight, bias, logit_scale, logits_dtype, memory_budget, batch_invariant: as in
                linear_token_logprobs.
            token_ids, advantages, temperature, softcap, entropy, mask, cu_seqlens, **given: as in
                from_logits.
            metrics: False leaves metrics out, and so the products of tokens that only they need.
            compact: leave tokens out of the products that they cannot influence: masked ones, and
                those of zero advantage where neither a KL nor an entropy bonus asks for them (of
                the gradient's products; with metrics=False of all), and those whose gradient came
                out as 0 (of the gradient's products; not with batch_invariant). On a GPU that
                makes the host wait for a count once a chunk. None: on a CPU only.
            ref_hidden, ref_weight, ref_bias: of the reference: [B, T, D'] or [total, D'], whose
                hidden size may be another, [V, D'] and [V], without gradient; needed with
                kl_estimator "exact" and a kl_coef. logit_scale, softcap and temperature are theirs
                too.

        Returns, Raises:
            As a call of this loss, and what linear_token_logprobs raises. With metrics=False the
            metrics are None.
        """
        h, w, b = checked_products(hidden, weight, bias)
        layout = Layout.of_rows("hidden", h, cu_seqlens)
        rows = _row_arguments(
            "hidden", h, token_ids, layout.flags(mask, "mask"), temperature, softcap
        )
        _checks.check_token_values(*rows[:3], w.shape[0])
        scale = _checks.positive_number(logit_scale, "logit_scale")
        number, per_token, cap = reference.without_scale(
            scale, rows.temperature, rows.token_temperature, rows.softcap
        )
        rows = RowArguments(rows.token_ids, rows.mask, per_token, number, cap)
        models = 1 if ref_hidden is None else 2
        cut = checked_cut(h, w, memory_budget, batch_invariant, logits_dtype, models)
        head = Head(h, w, b, cut)
        if compact is None:
            compact = h.device.type == "cpu"
        measured = _wants_entropy(self, entropy)
        batch, denominators = _collected(layout, advantages, rows.mask, given)
        ref = exact_kl.reference_head(
            self, h, w, (ref_hidden, ref_weight, ref_bias), batch, denominators
        )
        has_ref = batch.ref_logprobs is not None or ref is not None
        if ref is not None and ref.scale is None and not metrics:
            ref = None  # it would be measured for nobody
        base = self._without_exact_kl
        base._check_call(_with_entropy(batch, measured), denominators)
        loss, vector = policy_loss_hidden(
            base,
            head,
            rows,
            batch,
            denominators,
            measured,
            _flag(metrics, "metrics"),
            _flag(compact, "compact"),
            ref,
        )
        if not metrics:
            return LossOutput(loss, None)  # type: ignore[arg-type]
        return _output(self, loss, vector, has_ref, measured)


def _flag(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {value!r}")
    return value


def _wants_entropy(loss: Any, entropy: object) -> bool:
    return _flag(entropy, "entropy") or loss.entropy_coef != 0


def _row_arguments(
    of: str,
    tensor: Tensor,
    token_ids: object,
    mask: Tensor | None,
    temperature: object,
    softcap: object,
) -> RowArguments:
    _checks.refuse_tangent(tensor, of)
    ids = _checks.require_ids(token_ids, "token_ids", tensor, of)
    number, per_token = _checks.token_temperature(temperature, tensor, of)
    cap = None if softcap is None else _checks.positive_number(softcap, "softcap")
    return RowArguments(ids, mask, per_token, number, cap)


def _collected(
    layout: Layout, advantages: Tensor, mask: Tensor | None, given: dict[str, Any]
) -> tuple[Batch, Denominators]:
    """What a call of the loss takes, checked; in the place of the log-probabilities stands a tensor
    of their shape that takes no memory."""
    for name in sorted(given.keys() - set(_GIVEN)):
        near = difflib.get_close_matches(name, _GIVEN, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TypeError(f"unexpected keyword argument {name!r}{hint}")
    batch = Batch(
        torch.empty((), dtype=layout.dtype, device=layout.device).expand(layout.shape),
        layout.per_sequence_or_token(advantages, "advantages"),
        mask,
        layout.constants(given.get("old_logprobs"), "old_logprobs"),
        layout.constants(given.get("ref_logprobs"), "ref_logprobs"),
        layout.constants(given.get("rollout_logprobs"), "rollout_logprobs"),
        None,
        layout.constants(given.get("token_weights"), "token_weights"),
        layout.flags(given.get("entropy_mask"), "entropy_mask"),
        layout.offsets,
    )
    denominators = Denominators(
        layout.denominator(given.get("normalizer"), "normalizer"),
        layout.denominator(given.get("num_sequences"), "num_sequences"),
        layout.denominator(given.get("entropy_normalizer"), "entropy_normalizer"),
    )
    return batch, denominators


def _output(
    loss: Any, value: Tensor, vector: Tensor, has_ref: bool, has_entropy: bool
) -> LossOutput:
    names = loss._names[has_ref, has_entropy]
    return LossOutput(value, Metrics(vector, POLICY_METRICS, names))


def _with_entropy(batch: Batch, measured: bool) -> Batch:
    """For the checks of a call: the entropy is there, where it will be."""
    return batch._replace(entropy=batch.logprobs) if measured else batch

"""policy_rows: a policy loss that is separable by token, its gradient written in the row pass.

The operator for an upstream gradient of 1: from a row of logits its log-probability, from that and
the token's inputs the gradient of the loss, and with it the row's gradient. Natively the row stays
in the cache meanwhile, or in the shared memory of a GPU; in Triton the same is composed of three
operators.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlkern.ops import _register
from rlkern.reference import policy_loss as definition
from rlkern.reference.aggregation import Denominators, Sequences, denominator, token_weight


class RowArguments(NamedTuple):
    """What token_logprobs takes beside the logits, checked."""

    token_ids: Tensor
    mask: Tensor | None
    token_temperature: Tensor | None
    temperature: float
    softcap: float | None

    def keywords(self) -> dict[str, Any]:
        """As token_logprobs takes what stands beside token_ids."""
        per_token = self.token_temperature
        temperature = self.temperature if per_token is None else per_token
        return {"mask": self.mask, "temperature": temperature, "softcap": self.softcap}

    def flat(self) -> RowArguments:
        mask, per_token = self.mask, self.token_temperature
        return RowArguments(
            self.token_ids.reshape(-1),
            None if mask is None else mask.reshape(-1),
            None if per_token is None else per_token.reshape(-1),
            self.temperature,
            self.softcap,
        )


class TokenArguments(NamedTuple):
    """A separable loss by token: contiguous, one value each, scales [..., 2]."""

    advantages: Tensor
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    rollout_logprobs: Tensor | None
    token_weights: Tensor | None
    entropy_mask: Tensor | None
    scales: Tensor
    options: list[float]

    def flat(self) -> TokenArguments:
        return self._changed(lambda x: x.flatten(0, self.advantages.dim() - 1))

    def rows(self, rows: slice | Tensor) -> TokenArguments:
        """Of some tokens, from flat ones."""
        return self._changed(lambda x: x[rows])

    def _changed(self, change: Callable[[Tensor], Tensor]) -> TokenArguments:
        *tensors, options = self
        changed: Any = [x if x is None else change(x) for x in tensors]
        return TokenArguments(*changed, options)  # type: ignore[call-arg]


def is_separable(loss: Any) -> bool:
    """Whether a token's gradient needs nothing of its sequence but its length."""
    return (
        loss.ratio_level == "token"
        and loss.surrogate not in ("gmpo", "vespo")
        and loss.off_policy_threshold is None
        and (loss.correction is None or loss.correction.level == "token")
    )


def _whole(
    loss: Any, batch: definition.Batch, given: Denominators
) -> tuple[Sequences, Tensor, Tensor]:
    """The sequences, what divides the policy term, and what divides the entropy bonus, in float64
    and of the whole batch."""
    mask = torch.ones(batch.logprobs.shape, dtype=torch.float64, device=batch.advantages.device)
    if batch.mask is not None:
        mask = batch.mask.to(torch.float64)
    sequences = Sequences(mask, batch.offsets)
    own, _ = denominator(loss, given, sequences)
    bonus = own
    if loss.entropy_coef and loss.entropy_aggregation != "same":
        chosen = mask if batch.entropy_mask is None else mask * batch.entropy_mask
        count = given.entropy_normalizer
        bonus = chosen.sum().clamp(min=1) if count is None else own * 0 + count
    return sequences, own, bonus


def whole_denominators(loss: Any, batch: definition.Batch, given: Denominators) -> Tensor:
    """normalizer, num_sequences and entropy_normalizer, [3], so that parts of the batch add up."""
    _, own, bonus = _whole(loss, batch, given)
    normalizer = num_sequences = own * math.nan
    if loss.aggregation == "token_mean":
        normalizer = own
    elif loss.aggregation.startswith("seq_mean"):
        num_sequences = own
        if loss.aggregation == "seq_mean_token_sum_norm":
            assert given.normalizer is not None
            normalizer = own * 0 + given.normalizer
            num_sequences = own / normalizer
    return torch.stack([normalizer, num_sequences, bonus])


def token_arguments(loss: Any, batch: definition.Batch, given: Denominators) -> TokenArguments:
    """The loss as a plain sum over tokens, and what the aggregation multiplies each token by."""
    sequences, own, bonus_divisor = _whole(loss, batch, given)
    advantages = batch.advantages
    if batch.advantage_per_sequence:
        advantages = sequences.spread(advantages)
    policy = sequences.spread(token_weight(loss, sequences) / own)
    bonus = policy
    if loss.entropy_coef and loss.entropy_aggregation != "same":
        bonus = torch.ones_like(policy) / bonus_divisor

    def flat(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.contiguous()

    return TokenArguments(
        # A clone, because a tensor without elements is contiguous under any strides.
        advantages.clone(memory_format=torch.contiguous_format),
        flat(batch.old_logprobs),
        flat(batch.ref_logprobs),
        flat(batch.rollout_logprobs),
        flat(batch.token_weights),
        flat(batch.entropy_mask),
        torch.stack([policy, bonus], -1).to(batch.advantages.dtype),
        [*loss._token_sum_numbers, *[math.nan] * 3],
    )


def kl_scale(coefficient: float, loss: Any, batch: definition.Batch, given: Denominators) -> Tensor:
    """What the aggregation and the KL's coefficient multiply each token's KL by."""
    sequences, own, _ = _whole(loss, batch, given)
    scale = coefficient * sequences.spread(token_weight(loss, sequences) / own)
    return scale.to(batch.advantages.dtype)


def run(
    backend: str,
    logits: Tensor,
    grad: Tensor,
    rows: RowArguments,
    tokens: TokenArguments,
    return_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs, entropy (or [0]) and the gradients of both, [..., 2]."""
    return _register.overload("policy_rows", backend)(logits, grad, *rows, *tokens, return_entropy)


def _composed(logits, grad, *args):
    rows, tokens = RowArguments(*args[:5]), TokenArguments(*args[5:-1])
    return_entropy = args[-1]
    logprobs, entropy, state = _register.overload("token_logprobs", "triton")(
        logits, *rows, return_entropy
    )

    def line(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.reshape(1, -1)

    entropy_grad = tokens.options[11] != 0  # entropy_coef
    _, _, g, h, scale = _register.overload("policy_loss", "triton")(
        line(logprobs),
        line(tokens.advantages),
        line(rows.mask),
        line(tokens.old_logprobs),
        line(tokens.ref_logprobs),
        line(tokens.rollout_logprobs),
        line(entropy) if return_entropy else None,
        line(tokens.token_weights),
        line(tokens.entropy_mask),
        *[None] * 4,
        tokens.options,
        True,
        entropy_grad,
    )
    upstream = torch.zeros_like(tokens.scales)
    upstream[..., 0] = g.view(logprobs.shape) * scale[0] * tokens.scales[..., 0]
    if entropy_grad:
        upstream[..., 1] = h.view(logprobs.shape) * scale[1] * tokens.scales[..., 1]
    if grad.data_ptr() != logits.data_ptr():
        grad.copy_(logits)
    _register.overload("token_logprobs_bwd_", "triton")(
        upstream[..., 0].contiguous(),
        upstream[..., 1].contiguous() if entropy_grad else None,
        grad,
        *rows,
        logprobs,
        entropy,
        state,
    )
    return logprobs, entropy, upstream


def _fake(logits, grad, token_ids, *rest):
    tokens = logits.shape[:-1]
    return (
        logits.new_empty(tokens, dtype=torch.float32),
        logits.new_empty(tokens if rest[-1] else (0,), dtype=torch.float32),
        logits.new_empty((*tokens, 2), dtype=torch.float32),
    )


_register.register_fake("policy_rows", _fake)
_register.register_python("policy_rows", "triton", _composed)

"""The exact KL as a term of a policy loss: what its entry points share.

The aggregation is linear, so the term is a sum over tokens of a scale and the token's KL; its
gradient with respect to the logits is known as soon as both rows are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlkern.ops import _register
from rlkern.ops._head import Chunk, Cut, Head, Logits
from rlkern.ops.kl_divergence import DivergenceArguments
from rlkern.ops.policy_rows import RowArguments
from rlkern.reference.policy_loss import SUMS

_PLACE = SUMS.index("kl")


class ReferenceLogits(NamedTuple):
    """The reference of from_logits; scale as policy_rows.kl_scale, None where only measured."""

    logits: Tensor
    scale: Tensor | None


class ReferenceHead(NamedTuple):
    """The reference of from_hidden."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None


def divergence_arguments(rows: RowArguments) -> DivergenceArguments:
    return DivergenceArguments(*rows[1:])


def with_kl(
    value: Tensor, vector: Tensor, kl: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Loss and metrics' vector, which lack the KL, with it. kl [...], 0 at masked tokens."""
    if scale is not None:
        term = (scale.reshape(kl.shape).double() * kl.double()).sum()
        value = (value.double() + term).to(value.dtype)
    total = kl.detach().sum(dtype=vector.dtype)
    return value, torch.cat([vector[:_PLACE], total[None], vector[_PLACE + 1 :]])


class ChunkedKl:
    """The exact KL of the tokens of a call from hidden states, filled chunk by chunk.

    Everything is flat; without a reference it does nothing.
    """

    def __init__(self, head: ReferenceHead, rows: RowArguments, cut: Cut, backend: str) -> None:
        hidden = head.hidden.reshape(-1, head.hidden.shape[-1])
        self.backend = backend
        self.scale = None if head.scale is None else head.scale.reshape(-1)
        self.arguments = divergence_arguments(rows)
        self.logits = Logits(Head(hidden, head.weight, head.bias, cut))
        self.value = hidden.new_zeros(hidden.shape[0], dtype=torch.float32)

    def look(self, chunk: Chunk, z: Tensor) -> tuple[Tensor, Tensor]:
        """Measures the chunk of policy logits z; returns the reference's, and the pass's state."""
        r = self.logits.of(chunk)[1][: chunk.count]
        self.value[chunk.rows], state = _register.overload("vocab_divergence", self.backend)(
            z[: chunk.count], r, *self.arguments.changed(chunk.of)
        )
        return r, state

    def gradient(self, chunk: Chunk, z: Tensor) -> Tensor | None:
        """Measures, and gives the gradient with respect to z, in the place of the reference's
        logits, until the next call."""
        r, state = self.look(chunk, z)
        if self.scale is None:
            return None
        _register.overload("vocab_divergence_bwd_", self.backend)(
            self.scale[chunk.rows], r, z[: chunk.count], r, *self.arguments.changed(chunk.of), state
        )
        return r

"""A policy loss from hidden states: three products per chunk of tokens, nothing recomputed.

Where the loss is separable by token, a chunk's gradient is known as soon as its logits are: logits,
hidden gradient and weight gradient, the last two only where they are needed. Losses that couple the
tokens of a sequence are linear_token_logprobs and policy_loss one after the other, four products.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlkern import _backend
from rlkern.ops import _register, policy_rows
from rlkern.ops._head import Chunk, GradientSum, chunks, products
from rlkern.ops.linear_token_logprobs import head_logprobs
from rlkern.ops.policy_logits import WholeArguments, loss_and_metrics, whole_arguments
from rlkern.ops.policy_loss import METRICS, policy_loss
from rlkern.ops.policy_rows import RowArguments, TokenArguments
from rlkern.reference import linear_token_logprobs as reference
from rlkern.reference import policy_loss as definition
from rlkern.reference.aggregation import Denominators


class Head(NamedTuple):
    """The lm_head's factors and how its products are cut."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    rows: int
    invariant: bool


def policy_loss_hidden(
    loss: Any,
    head: Head,
    rows: RowArguments,
    batch: definition.Batch,
    given: Denominators,
    return_entropy: bool,
    metrics: bool,
    compact: bool,
) -> tuple[Tensor, Tensor]:
    """The loss and the metrics' vector. `batch` has a stand-in of the right shape for logprobs."""
    hidden, weight, bias = head[:3]
    backend = _backend.choose("policy_loss", hidden.device.type, hidden.dtype)
    factors = [factor for factor in (hidden, weight, bias) if factor is not None]
    needs_grad = torch.is_grad_enabled() and any(factor.requires_grad for factor in factors)
    if backend == "eager" or not needs_grad or not policy_rows.is_separable(loss):
        logprobs, entropy = head_logprobs(*head, rows, return_entropy)
        return policy_loss(loss, batch._replace(logprobs=logprobs, entropy=entropy), given)
    tokens = policy_rows.token_arguments(loss, batch, given)
    active = None
    if compact and not loss.kl_coef and not loss.entropy_coef:
        active = tokens.advantages != 0
    value, vector, *_ = torch.ops.rlkern.policy_loss_hidden(
        hidden,
        weight,
        bias,
        *rows,
        *tokens,
        *whole_arguments(loss, batch, given),
        return_entropy,
        active,
        metrics,
        head.rows,
        head.invariant,
        backend,
        [factor is not None and factor.requires_grad for factor in (hidden, weight, bias)],
    )
    return value, vector


# ---- the operator ------------------------------------------------------------------------------


class _Pass:
    """One call's results, filled chunk by chunk; all that has one value per token is flat."""

    def __init__(
        self,
        head: Head,
        rows: RowArguments,
        tokens: TokenArguments,
        return_entropy: bool,
        backend: str,
        needs: list[bool],
    ) -> None:
        self.head, self.backend, self.return_entropy = head, backend, return_entropy
        self.rows = rows
        self.tokens = tokens
        hidden, total = head.hidden, head.hidden.shape[0]
        self.logprobs = hidden.new_zeros(total, dtype=torch.float32)
        self.entropy = hidden.new_zeros(total if return_entropy else 0, dtype=torch.float32)
        self.grad_hidden = torch.zeros_like(hidden) if needs[0] else None
        self.of_weight = GradientSum(head.weight) if needs[1] else None
        self.of_bias = GradientSum(head.bias) if needs[2] and head.bias is not None else None

    def logits(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        h = products(self.head.hidden, chunk, self.head.rows, self.head.invariant)
        return h, reference.logits(h, self.head.weight, self.head.bias)

    def look(self, chunk: Chunk) -> None:
        """Log-probabilities alone: the gradient is 0."""
        _, z = self.logits(chunk)
        logprobs, entropy, _ = _register.overload("token_logprobs", self.backend)(
            z[: chunk.count], *self._of_rows(chunk), self.return_entropy
        )
        self._keep(chunk, logprobs, entropy)

    def learn(self, chunk: Chunk) -> None:
        """Log-probabilities and every gradient."""
        h, z = self.logits(chunk)
        grads = z[: chunk.count]
        tokens = self.tokens.changed(lambda x: x[chunk.rows])
        logprobs, entropy, upstream = policy_rows.run(
            self.backend, grads, grads, self._of_rows(chunk), tokens, self.return_entropy
        )
        self._keep(chunk, logprobs, entropy)
        z[chunk.count :] = 0
        if self.grad_hidden is not None:
            self.grad_hidden[chunk.rows] = torch.mm(z, self.head.weight)[: chunk.count]
        if self.of_weight is not None:
            self.of_weight.add_product(grads, h[: chunk.count])
        if self.of_bias is not None:
            self.of_bias.add(grads)

    def _of_rows(self, chunk: Chunk) -> RowArguments:
        ids, mask, temperature = (chunk.of(x) for x in self.rows[:3])
        assert ids is not None
        return RowArguments(ids, mask, temperature, *self.rows[3:])

    def _keep(self, chunk: Chunk, logprobs: Tensor, entropy: Tensor) -> None:
        self.logprobs[chunk.rows] = logprobs
        if self.return_entropy:
            self.entropy[chunk.rows] = entropy

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        like = self.head.hidden
        return (
            like.new_empty(0) if self.grad_hidden is None else self.grad_hidden,
            like.new_empty(0) if self.of_weight is None else self.of_weight.result(),
            like.new_empty(0) if self.of_bias is None else self.of_bias.result(),
        )


def _forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Any:
    rows, tokens = RowArguments(*args[:5]), TokenArguments(*args[5:13])
    whole = WholeArguments(*args[13:18])
    return_entropy, active, metrics, count, invariant, backend, needs = args[18:]
    shape = hidden.shape[:-1]
    head = Head(hidden.reshape(-1, hidden.shape[-1]), weight, bias, count, invariant)
    flat_tokens = tokens.changed(lambda x: x.flatten(0, len(shape) - 1))
    done = _Pass(head, rows.flat(), flat_tokens, return_entropy, backend, needs)
    mask = done.rows.mask
    learns = mask
    if active is not None:
        active = active.reshape(-1)
        learns = active if mask is None else active & mask
        if metrics:
            for chunk in chunks(head.hidden, ~active if mask is None else mask & ~active, count):
                done.look(chunk)
    for chunk in chunks(head.hidden, learns, count):
        done.learn(chunk)
    entropy = done.entropy.view(shape) if return_entropy else None
    value, vector = loss_and_metrics(
        backend, done.logprobs.view(shape), entropy, rows.mask, tokens, whole
    )
    grad_hidden, grad_weight, grad_bias = done.gradients()
    return value, vector, grad_hidden.view(hidden.shape if needs[0] else 0), grad_weight, grad_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *constants = output
    ctx.mark_non_differentiable(*constants)
    ctx.save_for_backward(*constants[1:])
    ctx.arguments, ctx.backend, ctx.needs = len(inputs), inputs[-2], inputs[-1]


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> Any:
    _register.refuse_create_graph("policy_loss_hidden")
    final = _register.is_final(ctx.backend, grad_loss)
    grads = [
        (grad if final else grad * grad_loss) if needs else None
        for grad, needs in zip(ctx.saved_tensors, ctx.needs, strict=True)
    ]
    return *grads, *[None] * (ctx.arguments - 3)


def _fake(hidden, weight, bias, *rest):
    needs = rest[-1]
    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty((METRICS,), dtype=torch.float64),
        *(
            like.new_empty(like.shape) if needed else hidden.new_empty(0)
            for like, needed in zip((hidden, weight, bias), needs, strict=True)
        ),
    )


_register.register_composite("policy_loss_hidden", _forward, _fake)
torch.library.register_autograd(
    "rlkern::policy_loss_hidden", _backward, setup_context=_setup_context, lib=_register.LIBRARY
)

"""value_loss: the clipped value loss with its gradient and metrics from one pass.

The public front is rlkern.ValueLoss. As in ops/policy_loss.py, the kernels return the gradient
for an upstream of 1 and what it is still to be multiplied by.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlkern import _backend
from rlkern.ops import _register
from rlkern.reference import value_loss as reference
from rlkern.reference.aggregation import AGGREGATIONS, Denominators


def value_loss(
    loss: Any, batch: reference.ValueBatch, given: Denominators
) -> tuple[Tensor, Tensor]:
    """The loss and the metrics' vector, float64 and without gradient.

    Args:
        loss: a ValueLoss.
        batch: checked tensors of one dtype, consecutive along a sequence.
        given: the denominators that the caller gave.
    """
    values = batch.values
    backend = _backend.choose("value_loss", values.device.type, values.dtype)
    if backend == "eager":
        return reference.value_loss(loss, batch, given)
    numbers = [
        math.nan if value is None or isinstance(value, Tensor) else float(value)
        for value in given[:2]
    ]
    options = [
        math.inf if loss.clip is None else loss.clip,
        float(AGGREGATIONS.index(loss.aggregation)),
        float(loss.skip_empty),
        *numbers,
    ]
    tensors = [value if isinstance(value, Tensor) else None for value in given[:2]]
    grad = torch.is_grad_enabled() and values.requires_grad
    value, vector = _call(backend, (*batch, *tensors, options, grad), grad)
    return value, vector


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[2:])


def _backward(ctx: Any, backend: str, grad_loss: Tensor, *_: Any) -> tuple[Tensor]:
    _register.refuse_create_graph("value_loss")
    grad_values, scale = ctx.saved_tensors
    if _register.is_final(backend, grad_loss):
        return (grad_values,)
    return (_register.overload("value_loss_bwd", backend)(grad_loss, grad_values, scale),)


def _fake(values, *rest):
    return (
        values.new_empty(()),
        values.new_empty((len(reference.SUMS),), dtype=torch.float64),
        values.new_empty(values.shape if rest[-1] else (0,)),
        values.new_empty((1,)),
    )


_backend.register("value_loss")
_register.register_fake("value_loss", _fake)
_register.register_fake("value_loss_bwd", lambda grad_loss, grad, scale: torch.empty_like(grad))
_call = _register.differentiable("value_loss", (0,), 2, _setup_context, _backward)
_register.forbid_second_derivative("value_loss_bwd")

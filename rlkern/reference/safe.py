"""Products and exponentials in which 0 * inf is 0, forward and backward.

A branch of a loss that is not taken has gradient 0 whatever it holds; by IEEE rules its derivative
would be 0 * inf = NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _product(a: Tensor, b: Tensor) -> Tensor:
    return torch.where((a == 0) | (b == 0), 0.0, a * b)


def _refuse_create_graph() -> None:
    # These backwards carry no graph: a penalty on a gradient would be left out in silence.
    if torch.is_grad_enabled():
        raise RuntimeError(
            "expected a backward without create_graph: rlkern's operators have first derivatives "
            "only"
        )


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return _product(a, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        _refuse_create_graph()
        a, b = ctx.saved_tensors
        return (
            _product(grad, b) if ctx.needs_input_grad[0] else None,
            _product(grad, a) if ctx.needs_input_grad[1] else None,
        )


class _Exp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        e = x.exp()
        ctx.save_for_backward(e)
        return e

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        _refuse_create_graph()
        return _product(grad, ctx.saved_tensors[0])


def product(a: Tensor, b: Tensor) -> Tensor:
    """a * b elementwise, 0 where either is 0."""
    a, b = torch.broadcast_tensors(a, b)
    return _Product.apply(a, b)


def exp(x: Tensor) -> Tensor:
    """exp(x), whose gradient is 0 where nothing is upstream."""
    return _Exp.apply(x)


class _WithSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, slope: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor]:
        _refuse_create_graph()
        return None, None, _product(grad, ctx.saved_tensors[0])


def with_slope(value: Tensor, slope: Tensor, x: Tensor) -> Tensor:
    """`value`, whose derivative with respect to x is `slope`, elementwise."""
    return _WithSlope.apply(value.detach(), slope.detach(), x)

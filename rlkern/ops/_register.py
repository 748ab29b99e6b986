"""Registration that every operator shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rlkern._schema import LIBRARY, SCHEMAS, backends, operator_name


def overload(op: str, backend: str) -> Callable[..., Any]:
    """``torch.ops.rlkern.<op of that backend>``."""
    return getattr(torch.ops.rlkern, operator_name(op, backend)).default


# Filled once, as in _backend.
_overloads = {(op, backend): overload(op, backend) for op in SCHEMAS for backend in backends(op)}


def constant(op: str, backend: str, *args: Any) -> Any:
    """Calls an operator of which the inputs need no gradient, as the caller has checked.

    Past the autograd layer, which is Python and takes longer than a small kernel.
    """
    function = _overloads[op, backend]
    if torch.compiler.is_compiling():
        return function(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return function(*args)


def register_python(op: str, backend: str, function: Callable[..., Any]) -> None:
    """Implements an operator in Python on every device."""
    LIBRARY.impl(operator_name(op, backend), function, "CompositeExplicitAutograd")


def register_fake(op: str, function: Callable[..., Any]) -> None:
    """The shapes and dtypes of an operator's outputs, the same for all its backends."""
    for backend in backends(op):
        name = f"rlkern::{operator_name(op, backend)}"
        torch.library.register_fake(name, function, lib=LIBRARY)


def refuse_create_graph(op: str) -> None:
    """For a backward whose gradient was formed in the forward pass, and so carries no graph: a
    penalty on it would be left out in silence."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"rlkern::{op}: expected a backward without create_graph: rlkern's operators have "
            "first derivatives only. For a gradient penalty compute this part in eager PyTorch."
        )


def _forbid(op: str, message: str) -> None:
    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(message)

    for backend in backends(op):
        name = f"rlkern::{operator_name(op, backend)}"
        torch.library.register_autograd(name, backward, lib=LIBRARY)


def forbid_second_derivative(op: str) -> None:
    """Makes the derivative of a backward operator an error instead of a wrong number."""
    _forbid(
        op,
        f"rlkern::{op} cannot be differentiated: rlkern's operators have first derivatives "
        "only. For a gradient penalty compute this part in eager PyTorch.",
    )


def forbid_derivative(op: str) -> None:
    """The same of an operator whose results are constants of the objective."""
    _forbid(op, f"rlkern::{op} cannot be differentiated: its results are constants of the loss.")

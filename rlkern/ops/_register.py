"""Registration that every operator shares."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from rlkern._schema import COMPOSITES, LIBRARY, SCHEMAS, backends, operator_name

# torch's own, which other releases may name otherwise: without them everything works, slower.
_below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)
try:
    _graph_is_kept = torch._C._autograd._get_current_graph_task_keep_graph
    _transforms_are_active = torch._C._are_functorch_transforms_active
    _is_batched = torch._C._functorch.is_legacy_batchedtensor
    _dispatch_modes = torch._C._len_torch_dispatch_stack
except AttributeError:  # then nobody knows whether a call is traced, or its graph kept

    def _transforms_are_active() -> bool:
        return True


_overloads = {
    (op, backend): getattr(torch.ops.rlkern, operator_name(op, backend)).default
    for op in SCHEMAS
    for backend in backends(op)
}


def overload(op: str, backend: str) -> Callable[..., Any]:
    """``torch.ops.rlkern.<op of that backend>``."""
    return _overloads[op, backend]


def constant(op: str, backend: str, *args: Any) -> Any:
    """Calls an operator of which the inputs need no gradient, as the caller has checked.

    Past the autograd layer, which is Python and takes longer than a small kernel.
    """
    function = _overloads[op, backend]
    with nullcontext() if torch.compiler.is_compiling() else _below_autograd():
        return function(*args)


def register_python(op: str, backend: str, function: Callable[..., Any]) -> None:
    """Implements an operator in Python on every device."""
    LIBRARY.impl(operator_name(op, backend), function, "CompositeExplicitAutograd")


def register_triton(op: str, module: str, function: str) -> None:
    """Implements an operator by a function of rlkern.triton, imported at its first call."""

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(f"rlkern.triton.{module}"), function)(*args)

    register_python(op, "triton", call)


def register_fake(op: str, function: Callable[..., Any]) -> None:
    """The shapes and dtypes of an operator's outputs, the same for all its backends."""
    for backend in backends(op):
        name = f"rlkern::{operator_name(op, backend)}"
        torch.library.register_fake(name, function, lib=LIBRARY)


def register_composite(op: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """An operator of COMPOSITES, and the shapes and dtypes of its outputs."""
    LIBRARY.impl(op, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rlkern::{op}", fake, lib=LIBRARY)


def differentiable(
    op: str,
    inputs: tuple[int, ...],
    outputs: int,
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., tuple[Tensor | None, ...]],
    differentiable_outputs: int = 1,
) -> Callable[[str, tuple[Any, ...], bool], tuple[Tensor, ...]]:
    """Registers the derivative of an operator, the same for all its backends.

    Args:
        op: the operator.
        inputs: the places of the arguments that have a gradient.
        outputs: how many of the results callers see.
        setup_context: (ctx, arguments, results), as for torch.library.register_autograd, but that
            the other results are marked as not differentiable.
        backward: (ctx, backend, *upstream gradients) -> a gradient for each of `inputs`.
        differentiable_outputs: how many of the results, from the first on, have a derivative.

    Returns:
        (backend, arguments, whether a graph is wanted) -> those results. In eager mode its way
        through autograd is a short one: torch.library's own takes twice as long as a kernel does
        on a small batch.
    """
    for name in backends(op):

        def whole(ctx: Any, *grads: Any, backend: str = name) -> tuple[Tensor | None, ...]:
            result: list[Tensor | None] = [None] * ctx.arguments
            for place, grad in zip(inputs, backward(ctx, backend, *grads), strict=True):
                result[place] = grad
            return tuple(result)

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.arguments = len(inputs)
            if isinstance(output, tuple):
                ctx.mark_non_differentiable(*output[differentiable_outputs:])
            setup_context(ctx, inputs, output)

        torch.library.register_autograd(
            f"rlkern::{operator_name(op, name)}", whole, setup_context=setup, lib=LIBRARY
        )

    def run(backend: str, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        output = overload(op, backend)(*args)
        return output if isinstance(output, tuple) else (output,)

    def forward(ctx: Any, backend: str, args: tuple[Any, ...], *_: Tensor | None) -> Any:
        with _below_autograd():
            output = run(backend, args)
        ctx.backend = backend
        ctx.mark_non_differentiable(*output[differentiable_outputs:outputs])
        setup_context(ctx, args, output)
        return output[:outputs]

    def short_backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return None, None, *backward(ctx, ctx.backend, *grads)

    # Named after the operator, as the node of a graph is seen.
    function: Any = type(
        op,
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(short_backward)},
    )

    def call(backend: str, args: tuple[Any, ...], graph: bool) -> tuple[Tensor, ...]:
        if torch.compiler.is_compiling():
            return run(backend, args)[:outputs]
        if graph:
            # The arguments as one: autograd looks at each that it is given.
            return function.apply(backend, args, *[args[place] for place in inputs])
        with _below_autograd():
            return run(backend, args)[:outputs]

    return call


def may_give_away(grad_loss: Tensor) -> bool:
    """Whether a backward may hand out, or write over, what the forward saved for it alone.

    A graph that is kept goes on holding it: what the caller then gets must be a tensor of its own,
    as it must where somebody traces, transforms or records the backward (create_graph).
    """
    return (
        is_plain_eager(grad_loss)
        and not torch.is_grad_enabled()
        and not _graph_is_kept()
        and not _is_batched(grad_loss)
    )


def is_plain_eager(*tensors: Tensor) -> bool:
    """Whether a call is of eager mode alone, where nobody traces or transforms it."""
    return (
        not torch.compiler.is_compiling()
        and all(type(x) in (Tensor, torch.nn.Parameter) for x in tensors)
        and not _transforms_are_active()
        and _dispatch_modes() == 0
    )


def is_final(backend: str, grad_loss: Tensor) -> bool:
    """Whether the gradient that a loss's forward saved is the one to return, and may be given away.

    The CPU's kernels write it for an upstream gradient of 1, which is looked at only where that
    takes no wait.
    """
    return (
        backend == "native"
        and grad_loss.device.type == "cpu"
        and may_give_away(grad_loss)
        and grad_loss.item() == 1.0
    )


def scaled(backend: str, grad: Tensor, grad_loss: Tensor) -> Tensor:
    """The gradient that a loss's forward saved for an upstream gradient of 1, to be handed out."""
    if is_final(backend, grad_loss):
        return grad
    if grad.is_cuda and may_give_away(grad_loss):
        # Looks at the upstream gradient there: one of 1 leaves all as it is.
        torch.ops.rlkern.scale_(grad, grad_loss)
        return grad
    return grad * grad_loss


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

    names = [op] if op in COMPOSITES else [operator_name(op, b) for b in backends(op)]
    for name in names:
        torch.library.register_autograd(f"rlkern::{name}", backward, lib=LIBRARY)


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

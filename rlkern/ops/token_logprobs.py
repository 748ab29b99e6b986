"""token_logprobs: log-probability and entropy of chosen tokens, from logits."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from rlkern import _backend
from rlkern.ops import _checks, _register, _vocab_parallel
from rlkern.reference import token_logprobs as reference
from rlkern.reference.token_logprobs import per_row, wide_dtype


class TokenLogprobs(NamedTuple):
    """What token_logprobs returns with ``return_entropy=True``."""

    logprobs: Tensor
    entropy: Tensor


@overload
def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    mask: Tensor | None = ...,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    return_entropy: Literal[False] = ...,
    inplace_backward: bool = ...,
    vocab_group: Any = ...,
) -> Tensor: ...
@overload
def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    mask: Tensor | None = ...,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    return_entropy: Literal[True],
    inplace_backward: bool = ...,
    vocab_group: Any = ...,
) -> TokenLogprobs: ...
def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    inplace_backward: bool = False,
    vocab_group: Any = None,
) -> Tensor | TokenLogprobs:
    """Log-probability of chosen tokens, in one pass over the logits, no softmax in memory.

    With z = softcap(logits) / temperature, softcap(x) = c tanh(x / c):

    - logp = z_y - log sum_j exp(z_j), exact also where token y carries nearly all the mass
    - entropy H = -sum_j p_j log p_j (nats)
    - d logp / d z_j = [j = y] - p_j and d H / d z_j = -p_j (log p_j + H); first derivatives, in
      reverse mode, only

    Shapes are padded ([B, T, V] with [B, T]) or packed ([total, V] with [total]); any leading
    shape serves. A slice such as ``logits[:, :-1]`` is read where it lies, but the gradient of a
    slice allocates: to save that, pass the whole [B, T + 1, V] with one masked column.

    A masked position is not read: its results and its gradient are 0. A token with logit -inf has
    logp -inf and no gradient. A NaN, or without softcap a +inf, in a row that counts makes the
    row's logp, entropy and gradient NaN.

    Args:
        logits: [..., V], float32, bfloat16, float16, or float64 (which runs in eager PyTorch).
            The arithmetic is fp32 (fp64 for float64).
        token_ids: [...], int64 or int32, in [0, V) where the mask is true.
        mask: [...], bool or integer, true where a token counts. None: all do.
        temperature: a positive number (1e-37 to 1e37), or a tensor that broadcasts to [...], one
            per token, for which no gradient is computed.
        softcap: the bound c of Gemma's final logit softcapping (1e-37 to 1e37), or None.
        return_entropy: also return the entropy, from the same pass, with its gradient.
        inplace_backward: let the backward write the gradient over ``logits`` instead of
            allocating [..., V] anew. After the backward the logits hold their gradient; autograd
            is told, so that in eager another use of them that was saved, or a second backward,
            raises. Inside torch.compile the out-of-place form runs.
        vocab_group: a torch.distributed process group over whose ranks the vocabulary is spread:
            each holds the logits of the same rows, V consecutive columns of them, in the order of
            the ranks (V may differ), and the same of everything else; token_ids then count over
            all columns. Every rank gets the same results, by one all-gather of V, one all-reduce
            of maxima and one of sums, which every rank must enter, and the gradient of its own
            columns. The number of columns is known to the host, which waits for it. Not inside
            torch.compile.

    Returns:
        logprobs [...], float32 (float64 for float64 logits); with return_entropy a
        TokenLogprobs (logprobs, entropy).

    Raises:
        TypeError: an argument of the wrong type or dtype, or a DTensor.
        ValueError: a wrong shape or device; a token id outside the vocabulary or a temperature
            that is not positive (checked on the CPU always, on a GPU with RLKERN_DEBUG=1; else
            the row's logprob and gradient are NaN, and with such a temperature its entropy too);
            an in-place backward over a leaf, a view of a leaf, a tensor whose elements share
            memory, or one whose rows must be copied to be read.
        RuntimeError: a backend was asked for that cannot serve the call; logits or a temperature
            with a forward-mode tangent; inside torch.compile, a token id outside the vocabulary
            on the CPU, or a vocab_group.
    """
    logits = _checks.require_logits(logits)
    _checks.refuse_tangent(logits, "logits")
    ids = _checks.require_ids(token_ids, "token_ids", logits)
    mask = _checks.optional_mask(mask, logits)
    number, per_token = _checks.token_temperature(temperature, logits)
    if softcap is not None:
        softcap = _checks.positive_number(softcap, "softcap")
    columns = None
    if vocab_group is not None:
        columns = _vocab_parallel.Columns.of(logits.shape[-1], vocab_group, logits.device)
    vocab = logits.shape[-1] if columns is None else columns.total
    _checks.check_token_values(ids, mask, per_token, vocab)
    needs_grad = torch.is_grad_enabled() and logits.requires_grad
    inplace = inplace_backward and needs_grad
    if inplace:
        require_writable(logits, "inplace_backward=True")

    backend = _backend.choose("token_logprobs", logits.device.type, logits.dtype)
    rows = logits.flatten(0, -3) if logits.dim() > 3 else logits
    if rows.stride(-1) != 1:
        # A clone, because a tensor without rows is contiguous under any strides.
        rows = rows.clone(memory_format=torch.contiguous_format)
    inplace = inplace and not torch.compiler.is_compiling()
    if inplace and rows.data_ptr() != logits.data_ptr():
        raise ValueError(
            "inplace_backward=True: expected logits whose memory may hold their gradient, got a "
            f"tensor whose rows must be copied to be read (strides {logits.stride()})"
        )
    shape = ids.shape
    if logits.dim() > 3:
        tokens = rows.shape[:-1]
        ids = ids.reshape(tokens)
        mask = None if mask is None else mask.reshape(tokens)
        per_token = None if per_token is None else per_token.reshape(tokens)
    args = (rows, ids, mask, per_token, number, softcap, return_entropy)
    if columns is not None:
        logprobs, entropy = _Parallel.apply(columns, inplace, backend, *args)
    elif inplace:
        logprobs, entropy = _InplaceBackward.apply(backend, *args)
    else:
        logprobs, entropy, _ = _register.overload("token_logprobs", backend)(*args)
    if not return_entropy:
        return logprobs.view(shape)
    return TokenLogprobs(logprobs.view(shape), entropy.view(shape))


def require_writable(logits: Tensor, option: str) -> None:
    """Refuses logits whose memory cannot hold their gradient."""
    wanted = f"{option}: expected logits whose memory may hold their gradient, got "
    base = logits._base
    if logits.is_leaf:
        raise ValueError(
            wanted + "a leaf tensor: the backward would overwrite a parameter or an input"
        )
    if base is not None and base.is_leaf and base.requires_grad:
        raise ValueError(wanted + "a view of a leaf tensor: the backward would overwrite it")
    if _elements_share_memory(logits):
        raise ValueError(
            wanted + f"an expanded or overlapping tensor (shape {list(logits.shape)}, strides "
            f"{logits.stride()}): its elements share memory"
        )


def require_consecutive(logits: Tensor, option: str) -> None:
    """Refuses logits whose rows would be copied, and the gradient written over the copy."""
    if logits.stride(-1) != 1:
        raise ValueError(
            f"{option}: expected rows that are consecutive in memory, got logits with strides "
            f"{logits.stride()}"
        )


def _elements_share_memory(tensor: Tensor) -> bool:
    """Whether some dimension steps back into what the dimensions of smaller stride span."""
    # Traced code runs the out-of-place backward, and sizes may be symbols there.
    if torch.compiler.is_compiling() or tensor.numel() == 0:
        return False
    span = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= span:
                return True
            span += stride * (size - 1)
    return False


# ---- autograd -------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, ids, mask, per_token, ctx.temperature, ctx.softcap, _ = inputs
    logprobs, entropy, state = output
    ctx.mark_non_differentiable(state)
    ctx.save_for_backward(logits, ids, mask, per_token, logprobs, entropy, state)


def _backward_args(ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    logits, ids, mask, per_token, logprobs, entropy, state = ctx.saved_tensors
    g, h = grads[:2]
    if entropy.numel() == 0:
        h = None  # the entropy was not asked for: what autograd hands in is its empty gradient
    return (
        g, h, logits, ids, mask, per_token, ctx.temperature, ctx.softcap, logprobs, entropy, state
    )  # fmt: skip


class _InplaceBackward(torch.autograd.Function):
    """Forward as the operator; backward writes over the logits.

    A function of eager mode: an operator that mutates what a forward saved cannot be traced.
    """

    @staticmethod
    def forward(ctx: Any, backend: str, *args: Any) -> tuple[Tensor, Tensor]:
        output = _register.overload("token_logprobs", backend)(*args)
        ctx.backend = backend
        _setup_context(ctx, args, output)
        return output[0], output[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # Raised at once: what is written over the logits carries no graph, and a penalty on it
        # would be left out in silence.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "inplace_backward=True: expected a backward without create_graph: rlkern's "
                "operators have first derivatives only"
            )
        return None, _written_over(ctx, grads), *[None] * 6


def _written_over(ctx: Any, grads: tuple[Tensor | None, ...]) -> Tensor:
    """The gradient, in the logits' memory."""
    args = _backward_args(ctx, grads)
    logits = args[2].detach()  # shares memory and version counter
    _register.overload("token_logprobs_bwd_", ctx.backend)(*args[:2], logits, *args[3:])
    torch.autograd.graph.increment_version(logits)
    return logits


class _Parallel(torch.autograd.Function):
    """Of logits whose columns are spread over processes; of eager mode, for its collectives."""

    @staticmethod
    def forward(ctx: Any, columns: Any, inplace: bool, backend: str, *args: Any) -> Any:
        logits, ids, mask, per_token, number, softcap, return_entropy = args
        here = columns.own_ids(ids)
        own = _register.overload("token_logprobs", backend)(
            logits, here, mask, per_token, number, softcap, return_entropy
        )
        inverse = 1.0 / number if per_token is None else 1.0 / per_token.double()
        output = columns.merged(*own, here, mask, inverse)
        ctx.backend, ctx.inplace = backend, inplace
        _setup_context(ctx, (logits, here, *args[2:]), output)
        return output[0], output[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _register.refuse_create_graph("token_logprobs")
        if ctx.inplace:
            grad = _written_over(ctx, grads)
        else:
            bwd = _register.overload("token_logprobs_bwd", ctx.backend)
            grad = bwd(*_backward_args(ctx, grads))
        return None, None, None, grad, *[None] * 6


def _register_autograd() -> None:
    for backend in _register.backends("token_logprobs"):

        def backward(ctx: Any, *grads: Tensor | None, backend: str = backend) -> Any:
            bwd = _register.overload("token_logprobs_bwd", backend)
            return (bwd(*_backward_args(ctx, grads)),) + (None,) * 6

        torch.library.register_autograd(
            f"rlkern::{_register.operator_name('token_logprobs', backend)}",
            backward,
            setup_context=_setup_context,
            lib=_register.LIBRARY,
        )
    _register.forbid_second_derivative("token_logprobs_bwd")


# ---- shapes without values --------------------------------------------------------------------


def _fake(logits, token_ids, mask, token_temperature, temperature, softcap, return_entropy):
    dtype = wide_dtype(logits)
    shape = logits.shape[:-1]
    return (
        logits.new_empty(shape, dtype=dtype),
        logits.new_empty(shape if return_entropy else (0,), dtype=dtype),
        logits.new_empty((*shape, 2), dtype=dtype),
    )


# ---- backends in Python -----------------------------------------------------------------------


def _reference_forward(
    logits, token_ids, mask, token_temperature, temperature, softcap, return_entropy
):
    _checks.check_token_values(
        token_ids, mask, token_temperature, logits.shape[-1], or_elsewhere=True
    )
    shape = logits.shape[:-1]
    logprobs, entropy, state = reference.forward(
        logits.reshape(-1, logits.shape[-1]),
        token_ids.reshape(-1),
        per_row(logits, mask, True),
        per_row(logits, token_temperature, temperature),
        softcap,
    )
    entropy = entropy.view(shape) if return_entropy else entropy.new_empty(0)
    return logprobs.view(shape), entropy, state.view(*shape, 2)


def _reference_backward(
    grad_logprobs, grad_entropy, logits, token_ids, mask, token_temperature, temperature, softcap,
    logprobs, entropy, state,
):  # fmt: skip
    grad = reference.backward(
        per_row(logits, grad_logprobs, 0.0),
        per_row(logits, grad_entropy, 0.0),
        logits.reshape(-1, logits.shape[-1]),
        token_ids.reshape(-1),
        per_row(logits, mask, True),
        per_row(logits, token_temperature, temperature),
        softcap,
        logprobs.reshape(-1),
        per_row(logits, entropy if entropy.numel() else None, 0.0),
        state.reshape(-1, 2),
    )
    return grad.view(logits.shape)


def _reference_backward_inplace(*args: Any) -> None:
    args[2].copy_(_reference_backward(*args))


def _reference_outputs(*args: Any) -> tuple[Tensor, ...]:
    found = _reference_forward(*args)
    return *found, _outputs(found[2], *args)


def _composed_outputs(backend: str) -> Any:
    def token_logprobs_outputs(*args):
        found = _register.overload("token_logprobs", backend)(*args)
        return *found, _outputs(found[2], *args)

    return token_logprobs_outputs


# Of logits in fp32, of which the formulas hold several copies.
_OUTPUTS_BYTES = 32 << 20


def _outputs(state, logits, token_ids, mask, token_temperature, temperature, softcap, _):
    vocab = logits.shape[-1]
    given = (
        logits.reshape(-1, vocab),
        token_ids.reshape(-1),
        per_row(logits, mask, True),
        per_row(logits, token_temperature, temperature),
        state.reshape(-1, 2),
    )
    parts = zip(*(x.split(max(_OUTPUTS_BYTES // (4 * vocab), 1)) for x in given), strict=True)
    found = [
        reference.outputs(z, ids, counts, heat, softcap, its_state)
        for z, ids, counts, heat, its_state in parts
    ]
    return torch.cat(found).view(*logits.shape[:-1], 3)


def _fake_outputs(logits, *rest):
    logprobs, entropy, state = _fake(logits, *rest)
    return logprobs, entropy, state, state.new_empty((*logits.shape[:-1], 3))


_backend.register("token_logprobs")
_register.register_fake("token_logprobs", _fake)
_register.register_fake(
    "token_logprobs_bwd", lambda g, h, logits, *rest: logits.new_empty(logits.shape)
)
_register.register_fake("token_logprobs_bwd_", lambda g, h, logits, *rest: None)
_register.register_fake("token_logprobs_outputs", _fake_outputs)
_register.register_python("token_logprobs", "eager", _reference_forward)
_register.register_python("token_logprobs_outputs", "eager", _reference_outputs)
_register.register_python("token_logprobs_outputs", "triton", _composed_outputs("triton"))
# On a GPU with compiled kernels, too; the CPU's own is in C++.
_register.LIBRARY.impl("token_logprobs_outputs", _composed_outputs("native"), "CUDA")
_register.register_python("token_logprobs_bwd", "eager", _reference_backward)
_register.register_python("token_logprobs_bwd_", "eager", _reference_backward_inplace)
_register.register_triton("token_logprobs", "token_logprobs", "forward")
_register.register_triton("token_logprobs_bwd", "token_logprobs", "backward")
_register.register_triton("token_logprobs_bwd_", "token_logprobs", "backward_inplace")
_register_autograd()

"""token_logprobs in Triton: one read of the logits forward, one read and one write backward.

A row is cut into segments of a fixed number of columns, a program each, so that few rows occupy
a GPU too. The cut depends on the vocabulary only, never on the number of rows: a row's result
does not depend on the batch around it. A row of several segments is merged by a second, tiny
kernel, in a fixed order.

The state of a set of values y is (m, s, w): their maximum, the sum of e = exp((y - m) / T), and
the sum of (y - m) e. Differences are taken before the product with 1 / T, so they are exact for
large logits. The target stays out of the state until the end, so that its log-probability is
-log1p(s) where it is the maximum, exact also where it carries nearly all the mass.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkern.triton._math import (
    INF,
    LOG2E,
    LOWEST,
    expm1,
    folded,
    log1p,
    softcap_derivative,
    softcapped,
)
from rlkern.triton._tokens import OPTIONS

# Columns of a row that one program handles: 64 KiB of bf16, enough to hide a program's start.
_SEGMENT = 32768
# Each lane keeps a state of its own, so that the loop has no reduction over threads in it: 1024
# lanes are 16 bytes of bf16 for each thread of 4 warps. With 4 values per lane in a step, moving
# the lane's state makes it 5/4 of an exponential per element; with 8 it would be 9/8, but rows
# that are not aligned then take 255 registers.
_LANES = 1024
_STEPS = 4
_BACKWARD_BLOCK = 4096
# With a softcap arithmetic is the bound, and half as many values at a time keep it in registers.
_STEPS_CAPPED = 2
# In fp32 the same number of values as more steps of fewer lanes, still 16 bytes a thread: fewer
# lane states to keep, without which Triton 3.8 puts some on the stack for sm_100.
_TILE_CAPPED_FP32 = (512, 4)
_BACKWARD_BLOCK_CAPPED = 2048


def _tile(fp32, capped):
    """Lanes and steps of the forward pass."""
    if not capped:
        return _LANES, _STEPS
    return _TILE_CAPPED_FP32 if fp32 else (_LANES, _STEPS_CAPPED)


@triton.jit
def _offset(row, inner, outer_stride, inner_stride):
    """Of a row in a tensor with tokens [outer, inner]; 64 bits, as `row` and the strides are."""
    row = row.to(tl.int64)
    return row // inner * outer_stride + row % inner * inner_stride


@triton.jit
def _counts(mask, row, inner, mask_outer, mask_inner):
    if mask is None:
        return True
    else:
        return tl.load(mask + _offset(row, inner, mask_outer, mask_inner)) != 0


@triton.jit
def _inverse_temperature(
    token_temperature, inv_temperature, row, inner, temperature_outer, temperature_inner
):
    """1 / T; NaN for what is no temperature, as the whole row then is."""
    if token_temperature is None:
        return inv_temperature
    else:
        t = tl.load(token_temperature + _offset(row, inner, temperature_outer, temperature_inner))
        return tl.where((t > 0) & (t < INF), tl.div_rn(1.0, t), float("nan"))


@triton.jit
def _least_difference(inv):
    """A difference y - m below which exp((y - m) / T) is exactly 0.

    Products with the exponential take the difference no lower: 0 * -inf would be NaN.
    """
    return tl.maximum(-160.0 / LOG2E / inv, LOWEST)


@triton.jit
def _merged(m, s, w, inv):
    """The state of all lanes (or segments) of a vector of states."""
    top = tl.max(m, 0)
    shift = m - top
    factor = tl.exp2(shift * (inv * LOG2E))
    shift = tl.maximum(shift, _least_difference(inv))
    w = tl.fma(shift, s, w) * factor
    s = s * factor
    return top, tl.sum(folded(s, 1), 0), tl.sum(folded(w, 1), 0)


@triton.jit
def _finish(
    m, s, w, y, inside, inv,
    row, logprobs, entropy, state, ENTROPY: tl.constexpr,
):  # fmt: skip
    """Stores a row's results from the state of all values but the target's, and the target y."""
    top = tl.maximum(m, y)
    shift = m - top
    factor = tl.exp2(shift * (inv * LOG2E))
    shift = tl.maximum(shift, _least_difference(inv))
    others = s * factor
    target = (y - top) * inv
    e = tl.exp2((y - top) * (inv * LOG2E))
    mass = others + e
    # The maximum contributes 1 to the mass. Taking it off is exact where it matters.
    rest = tl.where(target == 0, others, mass - 1.0)
    log_sum = log1p(rest)
    # Nothing but -inf. A NaN in the row has made the sum NaN.
    dead = (s == 0) & (y == -INF)
    log_sum = tl.where(dead, 0.0, log_sum)
    logprob = tl.where(dead, -INF, target - log_sum)
    tl.store(logprobs + row, tl.where(inside, logprob, float("nan")))
    tl.store(state + 2 * row, tl.where(dead, -INF, top))
    tl.store(state + 2 * row + 1, log_sum)
    if ENTROPY:
        weighted = tl.fma(shift, s, w) * factor * inv + tl.where(target == -INF, 0.0, target * e)
        tl.store(entropy + row, tl.where(dead, 0.0, log_sum - weighted / mass))


@triton.jit
def _target_value(row_logits, target, V, softcap):
    """The target's (capped) logit; -inf, a value without mass, for an id outside the row."""
    inside = (target >= 0) & (target < V)
    y = tl.load(row_logits + target, mask=inside, other=0.0).to(tl.float32)
    if softcap is not None:
        y = softcapped(y, softcap)
    return tl.where(inside, y, -INF), inside


@triton.jit
def _store_masked(row, logprobs, entropy, state, ENTROPY: tl.constexpr):
    tl.store(logprobs + row, 0.0)
    tl.store(state + 2 * row, 0.0)
    tl.store(state + 2 * row + 1, 0.0)
    if ENTROPY:
        tl.store(entropy + row, 0.0)


@triton.jit
def _segment_kernel(
    logits, ids, mask, token_temperature, inv_temperature, softcap,
    logprobs, entropy, state, partial,
    V, segments, inner,
    logits_outer, logits_inner, ids_outer, ids_inner,
    mask_outer, mask_inner, temperature_outer, temperature_inner,
    ENTROPY: tl.constexpr, SEGMENT: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The state of one segment of one row; the row's results if that is the whole row."""
    pid = tl.program_id(0)
    row = (pid // segments).to(tl.int64)
    segment = (pid % segments).to(tl.int64)
    if _counts(mask, row, inner, mask_outer, mask_inner):
        inv = _inverse_temperature(
            token_temperature, inv_temperature, row, inner, temperature_outer, temperature_inner
        )
        k = inv * LOG2E
        least = _least_difference(inv)
        target = tl.load(ids + _offset(row, inner, ids_outer, ids_inner))
        row_logits = logits + _offset(row, inner, logits_outer, logits_inner)
        begin = segment * SEGMENT
        x_segment = row_logits + begin
        # Within the segment 32 bits are enough.
        size = tl.minimum(V - begin, SEGMENT).to(tl.int32)
        here = (target >= begin) & (target < begin + SEGMENT)
        own_target = tl.where(here, target - begin, -1).to(tl.int32)

        tile = tl.arange(0, STEPS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
        m = tl.full([LANES], LOWEST, tl.float32)
        s = tl.zeros([LANES], tl.float32)
        w = tl.zeros([LANES], tl.float32)
        for start in range(0, size, STEPS * LANES):
            columns = start + tile
            y = tl.load(x_segment + columns, mask=columns < size, other=0.0).to(tl.float32)
            if softcap is not None:
                y = softcapped(y, softcap)
            # One comparison per block instead of two per element.
            if (start + STEPS * LANES > size) | (
                (own_target >= start) & (own_target < start + STEPS * LANES)
            ):
                y = tl.where((columns == own_target) | (columns >= size), -INF, y)
            top = tl.maximum(m, tl.max(y, 0))
            shift = m - top
            factor = tl.exp2(shift * k)
            d = y - top[None, :]
            e = tl.exp2(d * k)
            if ENTROPY:
                moved = tl.fma(tl.maximum(shift, least), s, w)
                weighted = tl.reshape(tl.maximum(d, least) * e, (STEPS * LANES,))
                w = tl.fma(moved, factor, folded(weighted, LANES))
            s = tl.fma(s, factor, folded(tl.reshape(e, (STEPS * LANES,)), LANES))
            m = top

        m, s, w = _merged(m, s, w, inv)
        if partial is None:
            y, inside = _target_value(row_logits, target, V, softcap)
            _finish(m, s, w, y, inside, inv, row, logprobs, entropy, state, ENTROPY)
        else:
            out = partial + 3 * (row * segments + segment)
            tl.store(out, m)
            tl.store(out + 1, s)
            tl.store(out + 2, w)
    elif partial is None:
        _store_masked(row, logprobs, entropy, state, ENTROPY)


@triton.jit
def _merge_kernel(
    logits, ids, mask, token_temperature, inv_temperature, softcap,
    logprobs, entropy, state, partial,
    V, segments, inner,
    logits_outer, logits_inner, ids_outer, ids_inner,
    mask_outer, mask_inner, temperature_outer, temperature_inner,
    ENTROPY: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """A row's results from its segments' states. SEGMENTS is the power of two that holds them."""
    row = tl.program_id(0).to(tl.int64)
    if _counts(mask, row, inner, mask_outer, mask_inner):
        inv = _inverse_temperature(
            token_temperature, inv_temperature, row, inner, temperature_outer, temperature_inner
        )
        segment = tl.arange(0, SEGMENTS)
        states = partial + 3 * (row * segments + segment)
        m = tl.load(states, mask=segment < segments, other=LOWEST)
        s = tl.load(states + 1, mask=segment < segments, other=0.0)
        w = tl.load(states + 2, mask=segment < segments, other=0.0)
        m, s, w = _merged(m, s, w, inv)
        target = tl.load(ids + _offset(row, inner, ids_outer, ids_inner))
        row_logits = logits + _offset(row, inner, logits_outer, logits_inner)
        y, inside = _target_value(row_logits, target, V, softcap)
        _finish(m, s, w, y, inside, inv, row, logprobs, entropy, state, ENTROPY)
    else:
        _store_masked(row, logprobs, entropy, state, ENTROPY)


@triton.jit
def _backward_kernel(
    grad_logprobs, grad_entropy,
    logits, ids, mask, token_temperature, inv_temperature, softcap,
    logprobs, entropy, state, grad,
    V, segments, inner,
    logits_outer, logits_inner, ids_outer, ids_inner,
    mask_outer, mask_inner, temperature_outer, temperature_inner,
    g_outer, g_inner, h_outer, h_inner, grad_outer, grad_inner,
    SEGMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of one segment of one row, over the logits where `grad` is `logits`.

    p_j (constant + slope (y_j - m)) with p_j = exp((y_j - m) / T - log_sum); the target's, whose
    1 - p_y must not be formed by subtraction, from its log-probability.
    """
    pid = tl.program_id(0)
    row = (pid // segments).to(tl.int64)
    begin = (pid % segments).to(tl.int64) * SEGMENT
    size = tl.minimum(V - begin, SEGMENT).to(tl.int32)
    out = grad + _offset(row, inner, grad_outer, grad_inner) + begin
    block = tl.arange(0, BLOCK)

    # What a row that is not read is filled with.
    fill = 0.0
    reads = _counts(mask, row, inner, mask_outer, mask_inner)
    g = 0.0
    h = 0.0
    top = 0.0
    log_sum = 0.0
    logprob = 0.0
    if reads:
        top = tl.load(state + 2 * row)
        log_sum = tl.load(state + 2 * row + 1)
        logprob = tl.load(logprobs + row)
        if grad_logprobs is not None:
            g = tl.load(grad_logprobs + _offset(row, inner, g_outer, g_inner))
        if grad_entropy is not None:
            h = tl.load(grad_entropy + _offset(row, inner, h_outer, h_inner))
        # A token that cannot be drawn has no gradient, whatever is upstream.
        g = tl.where(logprob == -INF, 0.0, g)
        broken = (log_sum != log_sum) | (logprob != logprob)
        fill = tl.where(broken, float("nan"), 0.0)
        reads = ((g != 0) | (h != 0)) & (top != -INF) & (fill == 0)

    if reads:
        inv = _inverse_temperature(
            token_temperature, inv_temperature, row, inner, temperature_outer, temperature_inner
        )
        k = inv * LOG2E
        # As a shift of y the logarithm of the sum would drown in a large maximum.
        inv_sum = tl.exp(-log_sum)
        constant = -g
        slope = 0.0
        whole = tl.where(g == 0, 0.0, g * -expm1(logprob))
        if grad_entropy is not None:
            mean = tl.where(h == 0, 0.0, log_sum - tl.load(entropy + row))  # E[z] - max
            constant = tl.fma(h, mean, constant)
            slope = -h * inv * inv * inv_sum
            # The target's z_y - max is logprob + log_sum; of -inf nothing may be taken.
            drawn = (h != 0) & (logprob != -INF)
            from_entropy = h * tl.exp(logprob) * (mean - (logprob + log_sum))
            whole += tl.where(drawn, from_entropy, 0.0)
        constant = constant * inv * inv_sum
        whole = whole * inv
        least = _least_difference(inv)

        target = tl.load(ids + _offset(row, inner, ids_outer, ids_inner))
        here = (target >= begin) & (target < begin + SEGMENT)
        own_target = tl.where(here, target - begin, -1).to(tl.int32)
        x_segment = logits + _offset(row, inner, logits_outer, logits_inner) + begin
        for start in range(0, size, BLOCK):
            columns = start + block
            x = tl.load(x_segment + columns, mask=columns < size, other=0.0).to(tl.float32)
            y = x
            if softcap is not None:
                y = softcapped(x, softcap)
            d = y - top
            e = tl.exp2(d * k)
            if grad_entropy is not None:
                dx = e * tl.fma(tl.maximum(d, least), slope, constant)
            else:
                dx = e * constant
            if (own_target >= start) & (own_target < start + BLOCK):
                dx = tl.where(columns == own_target, whole, dx)
            if softcap is not None:
                dx *= softcap_derivative(x, softcap)
            tl.store(out + columns, dx.to(grad.dtype.element_ty), mask=columns < size)
    else:
        filled = tl.zeros([BLOCK], tl.float32) + fill
        for start in range(0, size, BLOCK):
            columns = start + block
            tl.store(out + columns, filled.to(grad.dtype.element_ty), mask=columns < size)


# ---- launchers --------------------------------------------------------------------------------


def _token_strides(tensor: Tensor | None, dims: int) -> tuple[int, int]:
    """Strides of the token dimensions as [outer, inner]: the first `dims` of a tensor."""
    if tensor is None or dims == 0:
        return 0, 0
    if dims == 1:
        return 0, tensor.stride(0)
    return tensor.stride(0), tensor.stride(1)


def _require(logits: Tensor) -> None:
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"logits: expected float32, bfloat16 or float16, got {logits.dtype}")
    if not 1 <= logits.dim() <= 3:
        raise ValueError(
            f"logits: expected at most 2 dimensions of tokens, got shape {list(logits.shape)}"
        )
    if logits.shape[-1] < 1 or (logits.shape[-1] > 1 and logits.stride(-1) != 1):
        raise ValueError(
            "logits: expected rows of one or more consecutive values, got shape "
            f"{list(logits.shape)} with strides {logits.stride()}"
        )


class _Rows:
    """What the launches share: how many programs there are, and each tensor's strides."""

    def __init__(
        self, logits: Tensor, ids: Tensor, mask: Tensor | None, token_temperature: Tensor | None
    ) -> None:
        _require(logits)
        dims = logits.dim() - 1
        self.dims = dims
        self.rows = logits.shape[:-1].numel()
        self.vocab = logits.shape[-1]
        self.segments = triton.cdiv(self.vocab, _SEGMENT)
        self.inner = logits.shape[-2] if dims else 1
        self.strides = tuple(
            stride
            for tensor in (logits, ids, mask, token_temperature)
            for stride in _token_strides(tensor, dims)
        )


def forward(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None,
    token_temperature: Tensor | None,
    temperature: float,
    softcap: float | None,
    return_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``rlkern::token_logprobs_triton``; the schema is in _schema.py."""
    rows = _Rows(logits, token_ids, mask, token_temperature)
    shape = logits.shape[:-1]
    logprobs = logits.new_empty(shape, dtype=torch.float32)
    entropy = logits.new_empty(shape if return_entropy else (0,), dtype=torch.float32)
    state = logits.new_empty((*shape, 2), dtype=torch.float32)
    if rows.rows == 0:
        return logprobs, entropy, state
    partial = None
    if rows.segments > 1:
        partial = logits.new_empty((rows.rows, rows.segments, 3), dtype=torch.float32)
    args = (
        logits, token_ids, mask, token_temperature, 1.0 / temperature, softcap,
        logprobs, entropy, state, partial,
        rows.vocab, rows.segments, rows.inner, *rows.strides, return_entropy,
    )  # fmt: skip
    with torch.cuda.device_of(logits):
        lanes, steps = _tile(logits.dtype == torch.float32, softcap is not None)
        _segment_kernel[(rows.rows * rows.segments,)](
            *args, SEGMENT=_SEGMENT, LANES=lanes, STEPS=steps, num_warps=4, **OPTIONS
        )
        if partial is not None:
            power = triton.next_power_of_2(rows.segments)
            _merge_kernel[(rows.rows,)](*args, SEGMENTS=power, num_warps=1, **OPTIONS)
    return logprobs, entropy, state


def _launch_backward(
    grad: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None,
    token_temperature: Tensor | None,
    temperature: float,
    softcap: float | None,
    logprobs: Tensor,
    entropy: Tensor,
    state: Tensor,
) -> None:
    rows = _Rows(logits, token_ids, mask, token_temperature)
    if rows.rows == 0:
        return
    upstream = (
        stride
        for tensor in (grad_logprobs, grad_entropy, grad)
        for stride in _token_strides(tensor, rows.dims)
    )
    block = _BACKWARD_BLOCK if softcap is None else _BACKWARD_BLOCK_CAPPED
    with torch.cuda.device_of(logits):
        _backward_kernel[(rows.rows * rows.segments,)](
            grad_logprobs, grad_entropy,
            logits, token_ids, mask, token_temperature, 1.0 / temperature, softcap,
            logprobs.contiguous(), entropy.contiguous(), state.contiguous(), grad,
            rows.vocab, rows.segments, rows.inner, *rows.strides, *upstream,
            SEGMENT=_SEGMENT, BLOCK=block, num_warps=4, **OPTIONS,
        )  # fmt: skip


def backward(
    grad_logprobs: Tensor | None, grad_entropy: Tensor | None, logits: Tensor, *rest: Any
) -> Tensor:
    """``rlkern::token_logprobs_bwd_triton``."""
    grad = logits.new_empty(logits.shape)
    _launch_backward(grad, grad_logprobs, grad_entropy, logits, *rest)
    return grad


def backward_inplace(
    grad_logprobs: Tensor | None, grad_entropy: Tensor | None, logits: Tensor, *rest: Any
) -> None:
    """``rlkern::token_logprobs_bwd_triton_``: the gradient written over the logits."""
    _launch_backward(logits, grad_logprobs, grad_entropy, logits, *rest)

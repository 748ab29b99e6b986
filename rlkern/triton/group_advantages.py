"""group_advantages in Triton: a program per group and reward, statistics in float64.

A program reads its group three times: for its smallest reward, for the sums of what rises above it,
and to write the advantages. Equal groups lie side by side. By ids, the places are sorted first, and
there is a program per place, of which those at a group's first do all the work: how many groups
there are is known on the GPU alone, and nothing waits for it. What is taken over the whole batch is
PyTorch's, in float64. Nothing is added by atomics: a call repeated has the same bits.

The formulas are csrc/common/group_advantages.h's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkern.triton._math import INF
from rlkern.triton._tokens import OPTIONS, two_floats

_BLOCK = 128
_WARPS = 1
# For groups that are known to be large.
_LARGE_BLOCK = 1024
_LARGE_WARPS = 8

# As csrc/common/group_advantages.h numbers them.
_MEAN = tl.constexpr(0)
_LEAVE_ONE_OUT = tl.constexpr(1)
_LENGTH_WEIGHTED = tl.constexpr(2)
_PASS_AT_K = tl.constexpr(3)
_BATCH_MEAN = tl.constexpr(4)
_GIVEN = tl.constexpr(5)
_NO_BASELINE = tl.constexpr(6)
_STD = tl.constexpr(0)
_BATCH_STD = tl.constexpr(1)
_OF_MEAN = tl.constexpr(2)
_NO_SCALE = tl.constexpr(3)


@triton.jit
def _members(order, place, inside):
    """The rows of the places in their group's order."""
    if order is None:
        return place
    else:
        return tl.load(order + place, mask=inside, other=0)


@triton.jit
def _rewards(rewards, row, inside, columns, column):
    """In float64, and which of them count."""
    s = tl.load(rewards + row * columns + column, mask=inside, other=0.0)
    scored = inside & (s == s)
    return tl.where(scored, s, 0.0).to(tl.float64), scored


_POINTERS = ["rewards", "order", "ids", "ends", "lengths", "given", "batch", "out"]
_INTEGERS = ["group_size", "columns"]


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_POINTERS)
def _group_kernel(
    rewards, order, ids, ends, lengths, given, batch, out, group_size, columns, eps, eps_rest,
    BASELINE: tl.constexpr, SCALE: tl.constexpr, UNBIASED: tl.constexpr, RAW: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """ids, in their sorted order, and ends, where each place's group ends, are none for equal
    groups; batch [4, K] is _moments'."""
    program = tl.program_id(0).to(tl.int64)
    column = program % columns
    begin = program // columns
    if ids is None:
        begin *= group_size
        end = begin + group_size
    else:
        end = tl.load(ends + begin)
        earlier = tl.load(ids + tl.maximum(begin - 1, 0))
        is_first = (begin == 0) | (earlier != tl.load(ids + begin))
        end = tl.where(is_first, end, begin)
    lane = tl.arange(0, BLOCK)
    zero = tl.full((), 0.0, tl.float64)
    IN_GROUP: tl.constexpr = BASELINE <= _PASS_AT_K or SCALE == _STD or SCALE == _OF_MEAN
    IN_BATCH: tl.constexpr = BASELINE == _BATCH_MEAN or SCALE == _BATCH_STD

    size = zero
    shift = zero + INF
    best = zero - INF
    second = best
    winner = begin - 1
    if IN_GROUP:
        for start in range(begin, end, BLOCK):
            inside = lane < tl.minimum(end - start, BLOCK).to(tl.int32)
            row = _members(order, start + lane, inside)
            s, scored = _rewards(rewards, row, inside, columns, column)
            size += tl.sum(tl.where(scored, 1.0, zero), 0)
            least = tl.min(tl.where(scored, s, INF), 0)
            shift = tl.where(least < shift, least, shift)
            if BASELINE == _PASS_AT_K:
                largest = tl.max(tl.where(scored, s, -INF), 0)
                first = tl.min(tl.where(scored & (s == largest), lane, BLOCK), 0)
                rest = tl.max(tl.where(scored & (lane != first), s, -INF), 0)
                wins = (first < BLOCK) & ((winner < begin) | (largest > best))
                # The larger one of those that do not win.
                loser = tl.where(wins, tl.where(rest > best, rest, best), largest)
                second = tl.where(loser > second, loser, second)
                best = tl.where(wins, largest, best)
                winner = tl.where(wins, start + first, winner)

    t_rise = zero
    t_squared = zero
    t_length = zero
    t_length_rise = zero
    if IN_GROUP:
        for start in range(begin, end, BLOCK):
            inside = lane < tl.minimum(end - start, BLOCK).to(tl.int32)
            row = _members(order, start + lane, inside)
            s, scored = _rewards(rewards, row, inside, columns, column)
            rise = tl.where(scored, s - shift, 0.0)
            t_rise += tl.sum(rise, 0)
            t_squared += tl.sum(rise * rise, 0)
            if BASELINE == _LENGTH_WEIGHTED:
                length = tl.load(lengths + row, mask=scored, other=0.0).to(tl.float64)
                t_length += tl.sum(length, 0)
                t_length_rise += tl.sum(length * rise, 0)
    is_single = size == 1
    mean_rise = t_rise / tl.where(size > 1, size, 1.0)
    squares = t_squared - t_rise * mean_rise
    degrees = size
    if UNBIASED:
        degrees = size - 1
    deviation = tl.sqrt(tl.where(squares < 0, 0.0, squares) / tl.where(degrees > 1, degrees, 1.0))
    mean = shift + mean_rise
    if IN_BATCH:
        batch_size = tl.load(batch + column)
        batch_shift = tl.load(batch + columns + column)
        batch_mean_rise = tl.load(batch + 2 * columns + column)
        batch_single = batch_size == 1

    for start in range(begin, end, BLOCK):
        inside = lane < tl.minimum(end - start, BLOCK).to(tl.int32)
        row = _members(order, start + lane, inside)
        s, scored = _rewards(rewards, row, inside, columns, column)
        difference = s
        if BASELINE == _MEAN:
            difference = tl.where(is_single, s, s - shift - mean_rise)
        elif BASELINE == _LEAVE_ONE_OUT:
            others = tl.where(size > 1, size - 1, 1.0)
            difference = tl.where(is_single, s, (s - shift - mean_rise) * (size / others))
        elif BASELINE == _LENGTH_WEIGHTED:
            weighted = t_length_rise / tl.where(t_length > 0, t_length, 1.0)
            weighted = tl.where(t_length > 0, weighted, mean_rise)
            difference = tl.where(is_single, s, s - shift - weighted)
        elif BASELINE == _PASS_AT_K:
            lead = tl.where(start + lane == winner, s - second, 0.0)
            difference = tl.where(is_single, s, lead)
        elif BASELINE == _BATCH_MEAN:
            difference = tl.where(batch_single, s, s - batch_shift - batch_mean_rise)
        elif BASELINE == _GIVEN:
            at = row * columns + column
            difference = s - tl.load(given + at, mask=inside, other=0.0).to(tl.float64)

        advantage = difference
        if SCALE == _OF_MEAN:
            scale = tl.where(is_single, 1.0, mean)
            advantage = tl.where(scale > 0, difference / (scale + eps + eps_rest), 0.0)
        elif SCALE != _NO_SCALE:
            if SCALE == _STD:
                scale = tl.where(is_single, 1.0, deviation)
            else:
                scale = tl.where(batch_single, 1.0, tl.load(batch + 3 * columns + column))
            advantage = difference / (scale + eps + eps_rest)
            if BASELINE != _NO_BASELINE:
                # Equal rewards have no direction, whatever they are compared with.
                advantage = tl.where(scale == 0, 0.0, advantage)
        if not RAW:
            if IN_GROUP:
                advantage = tl.where(is_single, 0.0, advantage)
            if IN_BATCH:
                advantage = tl.where(batch_single, 0.0, advantage)
        # An infinite reward lets no sum of rises be finite, whichever reward they rise from.
        if IN_GROUP:
            advantage = tl.where(mean_rise - mean_rise == 0, advantage, float("nan"))
        if IN_BATCH:
            advantage = tl.where(batch_mean_rise - batch_mean_rise == 0, advantage, float("nan"))
        tl.store(out + row * columns + column, tl.where(scored, advantage, 0.0), mask=inside)


class _Moments(NamedTuple):
    """Of each column's values that are not NaN, [K] in float64: those of GroupSummary."""

    size: Tensor
    shift: Tensor
    mean_rise: Tensor
    deviation: Tensor


def _moments(x: Tensor, unbiased: bool) -> _Moments:
    """Of [N, K] in float64; N is at least 1."""
    scored = ~x.isnan()
    size = scored.sum(0, dtype=torch.float64)
    shift = x.where(scored, torch.inf).amin(0)
    rise = (x - shift).where(scored, 0.0)
    mean_rise = rise.sum(0) / size.clamp(min=1)
    squares = (rise - mean_rise).where(scored, 0.0).square().sum(0)
    degrees = size - 1 if unbiased else size
    return _Moments(size, shift, mean_rise, (squares / degrees.clamp(min=1)).sqrt())


def _normalized(x: Tensor, unbiased: bool, eps: float) -> Tensor:
    """[N, 1] over its N; NaN is left out and gets 0, as where nothing can be normalised."""
    size, shift, mean_rise, deviation = _moments(x, unbiased)
    z = (x - shift - mean_rise) / (deviation + eps)
    z = z.where((size != 1) & (deviation != 0), 0.0)
    # As in the kernel: a sum that is infinite spoils the batch.
    return z.where(mean_rise.isfinite(), torch.nan).where(~x.isnan(), 0.0)


def _require(name: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """What would otherwise be read as something else, or beyond its end."""
    if tensor is not None and (
        tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous()
    ):
        raise ValueError(
            f"{name}: expected {list(shape)} {str(dtype).removeprefix('torch.')}, contiguous, got "
            f"{tensor.dtype} {list(tensor.shape)}"
        )


def forward(
    rewards: Tensor,
    group_size: int,
    group_ids: Tensor | None,
    lengths: Tensor | None,
    given: Tensor | None,
    weights: Tensor | None,
    options: list[float],
) -> Tensor:
    """``rlkern::group_advantages_triton``; the schema is in _schema.py."""
    if len(options) != 7:
        raise ValueError(f"options: expected 7 numbers, got {len(options)}")
    if rewards.dtype != torch.float32 or rewards.dim() != 2 or not rewards.is_contiguous():
        raise ValueError(
            f"rewards: expected contiguous float32 [N, K], got {rewards.dtype} "
            f"{list(rewards.shape)} with strides {rewards.stride()}"
        )
    baseline, scale, unbiased, eps, raw, joined, normalized = options
    rows, columns = rewards.shape
    _require("group_ids", group_ids, torch.int64, (rows,))
    _require("lengths", lengths, torch.float32, (rows,))
    _require("given", given, torch.float32, (rows, columns))
    _require("weights", weights, torch.float32, (columns,))
    if rows == 0:
        return rewards.new_empty((0,))
    if group_ids is None:
        if group_size < 1 or rows % group_size:
            raise ValueError(f"group_size: expected a divisor of {rows}, got {group_size}")
        groups, ids, order, ends = rows // group_size, None, None, None
    else:
        ids, order = torch.sort(group_ids, stable=True)
        ends = torch.searchsorted(ids, ids, right=True)
        groups = rows
    batch = None
    if int(baseline) == _BATCH_MEAN.value or int(scale) == _BATCH_STD.value:
        batch = torch.stack(_moments(rewards.double(), bool(unbiased)))
    out = rewards.new_empty((rows, columns), dtype=torch.float64 if joined else torch.float32)
    is_large = group_size > _BLOCK
    with torch.cuda.device_of(rewards):
        _group_kernel[(groups * columns,)](
            rewards, order, ids, ends, lengths, given, batch, out, group_size, columns,
            *two_floats(eps), BASELINE=int(baseline), SCALE=int(scale), UNBIASED=bool(unbiased),
            RAW=bool(raw), BLOCK=_LARGE_BLOCK if is_large else _BLOCK,
            num_warps=_LARGE_WARPS if is_large else _WARPS, **OPTIONS,
        )  # fmt: skip
    if not joined:
        return out[:, 0]
    total = (out if weights is None else out * weights.double()).sum(1, keepdim=True)
    if normalized:
        left_out = rewards.isnan().all(1, keepdim=True)
        # NaN says that the row is left out; a sum that is NaN counts, and spoils the batch.
        total = total.where(~total.isnan(), torch.inf).where(~left_out, torch.nan)
        total = _normalized(total, bool(unbiased), eps)
    return total[:, 0].to(rewards.dtype)

"""return_scan in Triton: gae, discounted_returns and vtrace in one launch, their gradient in one.

A program per sequence walks over it in blocks, forward from the last token to the first, backward
the other way, and scans each block in parallel: lane 0 is the block's first in the order of the
walk. What a token adds to the state is x -> a + k x. The other half of the state, V_{t+1}, needs no
arithmetic: it is the value of the next token, past those that do not count.

All in float64, as csrc/common/return_scan.h says why, and rounded once. Blocks are of one size
however long a sequence is, and accesses are not specialised by alignment: a sequence's bits depend
on its own values alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkern.triton._tokens import (
    OPTIONS,
    counting,
    flags,
    floats,
    require_tokens,
    row_stride,
    two_floats,
)

_BLOCK = 1024
# V-trace and the backward pass need the state before each token as well, and with 1024 lanes so
# many registers that a program would have a multiprocessor to itself.
_STATES_BLOCK = 512
_WARPS = 8
# Two programs on a multiprocessor. Left to itself ptxas may spill a little to make it three.
_MAX_REGISTERS = 128


@triton.jit
def _scaled(factor, x):
    """Selected, not multiplied, where the factor is 0: past the end of an episode nothing enters,
    and a NaN there is none here."""
    return tl.where(factor == 0.0, 0.0, factor * x)


@triton.jit
def _then(a, k, a_then, k_then):
    """What x -> a + k x does and then x -> a_then + k_then x."""
    return a_then + _scaled(k_then, a), _scaled(k_then, k)


@triton.jit
def _larger(x, y):
    return tl.maximum(x, y)


@triton.jit
def _at_lane(x, lane, place):
    return tl.sum(tl.where(lane == place, x, 0.0), 0)


@triton.jit
def _before(x, lane, carried):
    """The lane before's, and what came before the block at lane 0."""
    return tl.where(lane == 0, carried, tl.gather(x, tl.where(lane == 0, 0, lane - 1), 0))


@triton.jit
def _sequence(offsets, sequence, length, total):
    """Where a sequence begins in its row, and its size, inside the tensors whatever the offsets."""
    if offsets is None:
        begin = sequence * 0
        size = begin + length
    else:
        begin = tl.load(offsets + sequence)
        begin = tl.minimum(tl.maximum(begin, 0), total)
        end = tl.load(offsets + sequence + 1)
        size = tl.maximum(tl.minimum(end, total), begin) - begin
    return begin, size


@triton.jit
def _poison(out, offsets, sequence, total, BLOCK: tl.constexpr):
    """NaN where no sequence lies: before the first one's offset and behind the last one's, if these
    are not 0 and the total."""
    if offsets is not None:
        lane = tl.arange(0, BLOCK)
        if sequence == 0:
            end = tl.minimum(tl.load(offsets), total)
            for start in range(0, end, BLOCK):
                tl.store(out + start + lane, float("nan"), mask=start + lane < end)
        if sequence == tl.num_programs(0) - 1:
            begin = tl.maximum(tl.load(offsets + sequence + 1), 0)
            for start in range(begin, total, BLOCK):
                tl.store(out + start + lane, float("nan"), mask=start + lane < total)


@triton.jit
def _number(tensor, sequence, number, rest):
    """Per sequence where there is a tensor; numbers come in two floats."""
    if tensor is None:
        return tl.full((), 0.0, tl.float64) + number + rest
    else:
        return tl.load(tensor + sequence).to(tl.float64)


_POINTERS = [
    "rewards", "values", "log_ratios", "grad_first", "grad_second", "mask", "dones",
    "bootstrap_value", "lam", "offsets", "first", "second", "grad_rewards", "grad_values",
    "grad_bootstrap",
]  # fmt: skip
_INTEGERS = [
    "length", "total", "rewards_row", "values_row", "log_ratios_row", "first_row", "second_row",
    "mask_row", "dones_row", "out_row",
]  # fmt: skip


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_POINTERS)
def _forward_kernel(
    rewards, values, log_ratios, mask, dones, bootstrap_value, lam, offsets, first, second,
    length, total, rewards_row, values_row, log_ratios_row, mask_row, dones_row, out_row,
    gamma, gamma_rest, lam_number, lam_rest, rho_bar, rho_bar_rest, c_bar, c_bar_rest,
    rho_pg_bar, rho_pg_bar_rest,
    BREAKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    begin, size = _sequence(offsets, sequence, length, total)
    lane = tl.arange(0, BLOCK)
    zero = tl.full((), 0.0, tl.float64)
    discount = zero + gamma + gamma_rest
    trace = _number(lam, sequence, lam_number, lam_rest)
    _poison(first, offsets, sequence, total, BLOCK)
    if values is not None:
        _poison(second, offsets, sequence, total, BLOCK)
    after_last = zero
    if bootstrap_value is not None:
        after_last += tl.load(bootstrap_value + sequence)
    # The state after the block: x, and V (where masked tokens hand it on).
    x = zero
    v = after_last
    begun = tl.full((), 0, tl.int32)
    for start in range(0, size, BLOCK):
        # The time of lane 0; lanes go back from there.
        top = begin + size - 1 - start
        inside = lane < tl.minimum(size - start, BLOCK).to(tl.int32)
        has_next = inside & ((lane > 0) | (start > 0))
        counts = counting(mask, sequence * mask_row + top, -lane, inside)
        next_counts = counting(mask, sequence * mask_row + top + 1, -lane, has_next)
        reward = floats(rewards, sequence * rewards_row + top, -lane, inside, counts)
        value = tl.zeros([BLOCK], tl.float32)
        if values is not None:
            value = floats(values, sequence * values_row + top, -lane, inside, counts)
        reward = reward.to(tl.float64)
        value = value.to(tl.float64)

        if mask is None or BREAKS:
            # The first lane of the last counting token: those before it do not enter.
            first_lane = tl.where(begun > 0, -1, tl.min(tl.where(counts, lane, BLOCK), 0))
            begun = tl.where(first_lane < BLOCK, 1, 0)
            enters = inside & (lane >= first_lane)
            next_value = tl.zeros([BLOCK], tl.float32)
            if values is not None:
                next_value = floats(
                    values, sequence * values_row + top + 1, -lane, has_next, next_counts
                )
            next_value = tl.where(lane > first_lane, next_value.to(tl.float64), after_last)
        else:
            enters = counts
            # The lane of the next counting token; -1: in none of this block.
            nearest = tl.associative_scan(tl.where(next_counts, lane - 1, -1), 0, _larger)
            found = nearest >= 0
            next_value = tl.zeros([BLOCK], tl.float32)
            if values is not None:
                next_value = floats(
                    values, sequence * values_row + top, -nearest, inside & found, found
                )
            next_value = tl.where(found, next_value.to(tl.float64), v)
            v = _at_lane(tl.where(counts, value, next_value), lane, BLOCK - 1)

        gammas = tl.zeros([BLOCK], tl.float64) + discount
        if dones is not None:
            ends = flags(dones, sequence * dones_row + top, -lane, counts)
            gammas = tl.where(ends, 0.0, gammas)
        target = reward + _scaled(gammas, next_value) - value
        a = target
        k = gammas * trace
        if log_ratios is not None:
            log_ratio = floats(log_ratios, sequence * log_ratios_row + top, -lane, inside, counts)
            ratio = tl.exp(log_ratio.to(tl.float64))
            rho = zero + rho_bar + rho_bar_rest
            c = zero + c_bar + c_bar_rest
            a = tl.where(ratio > rho, rho, ratio) * target
            k = _scaled(k, tl.where(ratio > c, c, ratio))
        a = tl.where(enters, a, 0.0)
        k = tl.where(enters, k, 1.0)
        a, k = tl.associative_scan((a, k), 0, _then)
        here = a + _scaled(k, x)

        out = sequence * out_row + top
        if log_ratios is not None:
            rho_pg = zero + rho_pg_bar + rho_pg_bar_rest
            advantage = target + _scaled(gammas, trace * _before(here, lane, x))
            advantage *= tl.where(ratio > rho_pg, rho_pg, ratio)
            tl.store(second + out - lane, tl.where(counts, advantage, 0.0), mask=inside)
            tl.store(first + out - lane, tl.where(counts, here + value, 0.0), mask=inside)
        else:
            tl.store(first + out - lane, tl.where(counts, here, 0.0), mask=inside)
            if values is not None:
                tl.store(second + out - lane, tl.where(counts, here + value, 0.0), mask=inside)
        x = _at_lane(here, lane, BLOCK - 1)


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_POINTERS)
def _backward_kernel(
    grad_first, grad_second, mask, dones, lam, offsets, grad_rewards, grad_values, grad_bootstrap,
    length, total, first_row, second_row, mask_row, dones_row, out_row,
    gamma, gamma_rest, lam_number, lam_rest,
    BREAKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With G_t the gradient of A_t from outside and w_t = gamma L_t the state after a token,
    L_t = G_t + lam w_{t-1} is the gradient of delta_t and of r_t."""
    sequence = tl.program_id(0).to(tl.int64)
    begin, size = _sequence(offsets, sequence, length, total)
    lane = tl.arange(0, BLOCK)
    zero = tl.full((), 0.0, tl.float64)
    discount = zero + gamma + gamma_rest
    trace = _number(lam, sequence, lam_number, lam_rest)
    _poison(grad_rewards, offsets, sequence, total, BLOCK)
    if grad_second is not None:
        _poison(grad_values, offsets, sequence, total, BLOCK)
    # Masked tokens up to the last counting one enter.
    entering = size
    if mask is not None and BREAKS:
        last = tl.full([BLOCK], -1, tl.int64)
        for start in range(0, size, BLOCK):
            inside = lane < tl.minimum(size - start, BLOCK).to(tl.int32)
            counts = flags(mask, sequence * mask_row + begin + start, lane, inside)
            last = tl.where(counts, start + lane, last)
        entering = tl.max(last, 0) + 1
    w = zero
    for start in range(0, size, BLOCK):
        at = begin + start
        inside = lane < tl.minimum(size - start, BLOCK).to(tl.int32)
        counts = counting(mask, sequence * mask_row + at, lane, inside)
        grad = floats(grad_first, sequence * first_row + at, lane, inside, counts).to(tl.float64)
        if grad_second is not None:
            grad_sum = floats(grad_second, sequence * second_row + at, lane, inside, counts)
            grad_sum = grad_sum.to(tl.float64)
            grad += grad_sum
        gammas = tl.zeros([BLOCK], tl.float64) + discount
        if dones is not None:
            ends = flags(dones, sequence * dones_row + at, lane, counts)
            gammas = tl.where(ends, 0.0, gammas)
        if mask is None or BREAKS:
            enters = lane < tl.minimum(tl.maximum(entering - start, 0), BLOCK).to(tl.int32)
        else:
            enters = counts
        a = tl.where(enters, _scaled(gammas, grad), 0.0)
        k = tl.where(enters, gammas * trace, 1.0)
        a, k = tl.associative_scan((a, k), 0, _then)
        after = a + _scaled(k, w)
        before = _before(after, lane, w)
        through = grad + trace * before
        out = sequence * out_row + at
        tl.store(grad_rewards + out + lane, tl.where(counts, through, 0.0), mask=inside)
        if grad_second is not None:
            of_value = grad_sum - through + before
            tl.store(grad_values + out + lane, tl.where(counts, of_value, 0.0), mask=inside)
        w = _at_lane(after, lane, BLOCK - 1)
    tl.store(grad_bootstrap + sequence, w.to(tl.float32))


def _numbers(options: list[float]) -> tuple[list[tuple[float, float]], bool]:
    """gamma, lam and the bars in two floats each, and whether masked tokens break."""
    if len(options) != 6:
        raise ValueError(f"options: expected 6 numbers, got {len(options)}")
    gamma, lam, breaks, *bars = options
    return [two_floats(x) for x in (gamma, lam, *bars)], bool(breaks)


def _extent(tokens: Tensor, offsets: Tensor | None) -> tuple[int, int, int]:
    """Sequences, and the length of a padded one or the total of packed ones."""
    if offsets is None:
        return tokens.shape[0], tokens.shape[1], 0
    sequences, total = offsets.shape[0] - 1, tokens.shape[0]
    if sequences == 0 and total > 0:
        raise ValueError(f"offsets: expected values that rise from 0 to {total}, got one value")
    return sequences, 0, total


def _require_per_sequence(sequences: int, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and (
            tensor.shape != (sequences,)
            or tensor.dtype != torch.float32
            or not tensor.is_contiguous()
        ):
            raise ValueError(
                f"{name}: expected {sequences} float32, one per sequence, contiguous, got "
                f"{tensor.dtype} {list(tensor.shape)}"
            )


def forward(
    rewards: Tensor,
    values: Tensor | None,
    log_ratios: Tensor | None,
    mask: Tensor | None,
    dones: Tensor | None,
    bootstrap_value: Tensor | None,
    lam: Tensor | None,
    offsets: Tensor | None,
    options: list[float],
) -> tuple[Tensor, Tensor]:
    """``rlkern::return_scan_triton``; the schema is in _schema.py."""
    per_token = rewards, values, log_ratios, mask, dones
    require_tokens(rewards, "rewards", per_token)
    numbers, breaks = _numbers(options)
    if values is None and log_ratios is not None:
        raise ValueError("values: expected with log_ratios, got None")
    sequences, length, total = _extent(rewards, offsets)
    _require_per_sequence(sequences, bootstrap_value=bootstrap_value, lam=lam)
    first = rewards.new_empty(rewards.shape)
    second = rewards.new_empty((0,) if values is None else rewards.shape)
    if sequences > 0 and rewards.numel() > 0:
        with torch.cuda.device_of(rewards):
            _forward_kernel[(sequences,)](
                *per_token, bootstrap_value, lam, offsets, first, second,
                length, total, *map(row_stride, per_token), length,
                *(x for number in numbers for x in number),
                BREAKS=breaks, BLOCK=_BLOCK if log_ratios is None else _STATES_BLOCK,
                num_warps=_WARPS, maxnreg=_MAX_REGISTERS, **OPTIONS,
            )  # fmt: skip
    return first, second


def backward(
    grad_first: Tensor,
    grad_second: Tensor | None,
    mask: Tensor | None,
    dones: Tensor | None,
    lam: Tensor | None,
    offsets: Tensor | None,
    options: list[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """``rlkern::return_scan_bwd_triton``: the gradients of rewards, values and bootstrap_value."""
    per_token = grad_first, grad_second, mask, dones
    require_tokens(grad_first, "grad_first", per_token)
    numbers, breaks = _numbers(options)
    sequences, length, total = _extent(grad_first, offsets)
    _require_per_sequence(sequences, lam=lam)
    grad_rewards = grad_first.new_empty(grad_first.shape)
    grad_values = grad_first.new_empty((0,) if grad_second is None else grad_first.shape)
    grad_bootstrap = grad_first.new_empty((sequences,))
    if sequences > 0:
        with torch.cuda.device_of(grad_first):
            _backward_kernel[(sequences,)](
                *per_token, lam, offsets, grad_rewards, grad_values, grad_bootstrap,
                length, total, *map(row_stride, per_token), length,
                *(x for number in numbers[:2] for x in number),
                BREAKS=breaks, BLOCK=_STATES_BLOCK, num_warps=_WARPS,
                maxnreg=_MAX_REGISTERS, **OPTIONS,
            )  # fmt: skip
    return grad_rewards, grad_values, grad_bootstrap

"""policy_loss in Triton: loss, gradient and every metric in two launches.

The first has a program per sequence. It walks over the sequence's tokens at most three times, as
the native kernel does: sums that the terms need, the terms with gradient and metrics, and, where
the tokens share a ratio, its gradient. The second is one program that adds the sequences' totals,
in the order in which they lie, and divides. Nothing waits for the host, nothing is added by
atomics: a call repeated has the same bits.

Sums run in fp32 over the lanes of a few blocks, then in float64. The blocks' size depends on
nothing, and accesses are not specialised by alignment, so the order of a sequence's sums depends
on its length alone: not on the other sequences, nor on where it lies in memory.

Here is how the kernels are called; _policy_sequence.py and _policy_totals.py hold them.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkern.triton._policy_math import CLIP, SEQ_MEAN_TOKEN_MEAN
from rlkern.triton._policy_sequence import sequence_kernel
from rlkern.triton._policy_totals import COLUMNS, METRICS, finish_kernel
from rlkern.triton._tokens import (
    OPTIONS,
    fp32,
    require_tokens,
    row_stride,
    two_floats,
)

# 512 threads with 2 tokens each: the sums' lanes are what takes registers. Left to itself ptxas
# spills a little where that lets two programs share a multiprocessor.
_BLOCK = 1024
_WARPS = 16
_MAX_REGISTERS = 128
# Blocks whose terms a lane adds in fp32 before float64 takes over.
_CHAIN = 16
# Totals that the second launch adds at a time.
_ROWS = 128
_FINISH_WARPS = 8
_SCALE_BLOCK = 1024


@triton.jit(do_not_specialize=["size"])
def _scale_kernel(
    grad_loss, scale, grad_logprobs, out_logprobs, grad_entropy, out_entropy, size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    upstream = tl.load(grad_loss)
    if grad_logprobs is not None:
        factor = upstream * tl.load(scale)
        grad = tl.load(grad_logprobs + at, mask=inside, other=0.0)
        tl.store(out_logprobs + at, grad * factor, mask=inside)
    if grad_entropy is not None:
        factor = upstream * tl.load(scale + 1)
        grad = tl.load(grad_entropy + at, mask=inside, other=0.0)
        tl.store(out_entropy + at, grad * factor, mask=inside)


def _exp(x: float) -> float:
    return math.exp(x) if x < 88.8 else math.inf


@lru_cache(maxsize=64)
def _arguments(options: tuple[float, ...]) -> tuple[tuple[float, ...], dict[str, Any]]:
    """What the sequence kernel takes from the options of ops/policy_loss.py, without the
    denominators: numbers, and what it is compiled for."""
    (
        surrogate, level, clip_low, clip_high, dual_clip, ratio_cap, log_ratio_clamp, kl_coef,
        estimator, kl_clamp, kl_ratio_weighted, entropy_coef, entropy_same, aggregation, _,
        off_policy_threshold, correction, correction_masks, correction_low, correction_high,
        *shapes,
    ) = options  # fmt: skip
    numbers = (
        clip_low, clip_high, 1.0 - clip_low, 1.0 + clip_high, dual_clip, ratio_cap,
        log_ratio_clamp, _exp(-log_ratio_clamp), _exp(log_ratio_clamp), kl_coef, entropy_coef,
        off_policy_threshold, correction_low, correction_high, *shapes,
    )  # fmt: skip
    k3 = int(estimator) in (3, 6)
    shared = int(aggregation) == SEQ_MEAN_TOKEN_MEAN.value
    compiled_for = {
        "SURROGATE": int(surrogate),
        "LEVEL": int(level),
        "DUAL": int(surrogate) == CLIP.value and dual_clip < math.inf,
        "KL": kl_coef != 0,
        "ESTIMATOR": int(estimator),
        "KL_BOUNDED": kl_clamp == 2 or (kl_clamp == 1 and k3),
        "KL_WEIGHTED": bool(kl_ratio_weighted),
        "BONUS": entropy_coef != 0,
        "BONUS_SHARED": shared and bool(entropy_same),
        "SHARED": shared,
        "OFF_POLICY": off_policy_threshold < math.inf,
        "CORRECTION": int(correction),
        "CORRECTION_MASKS": bool(correction_masks),
    }
    return tuple(fp32(x) for x in numbers), compiled_for


def forward(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    entropy: Tensor | None,
    token_weights: Tensor | None,
    entropy_mask: Tensor | None,
    offsets: Tensor | None,
    normalizer: Tensor | None,
    num_sequences: Tensor | None,
    entropy_normalizer: Tensor | None,
    options: list[float],
    grad_logprobs: bool,
    grad_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``rlkern::policy_loss_triton``; the schema is in _schema.py."""
    sequences = logprobs.shape[0] if offsets is None else offsets.shape[0] - 1
    one_advantage = advantages.dim() == 1 and advantages.shape[0] == sequences
    per_token = (
        logprobs, None if one_advantage else advantages, mask, old_logprobs, ref_logprobs,
        rollout_logprobs, entropy, token_weights, entropy_mask,
    )  # fmt: skip
    require_tokens(logprobs, "logprobs", per_token)
    if len(options) != 29:
        raise ValueError(f"options: expected 29 numbers, got {len(options)}")
    loss = logprobs.new_empty(())
    metrics = logprobs.new_empty((METRICS,), dtype=torch.float64)
    logprobs_out = logprobs.new_empty(logprobs.shape if grad_logprobs else (0,))
    entropy_out = logprobs.new_empty(logprobs.shape if grad_entropy else (0,))
    scale = logprobs.new_empty((2,))
    totals = logprobs.new_empty((sequences, COLUMNS.value), dtype=torch.float64)
    numbers, compiled_for = _arguments(tuple(options[:-3]))
    length = 0 if logprobs.dim() == 1 else logprobs.shape[1]
    with torch.cuda.device_of(logprobs):
        if sequences > 0:
            sequence_kernel[(sequences,)](
                logprobs, advantages, *per_token[2:], offsets,
                logprobs_out if grad_logprobs else None, entropy_out if grad_entropy else None,
                totals, length, *map(row_stride, per_token), length, *numbers,
                ONE_ADVANTAGE=one_advantage, BLOCK=_BLOCK, CHAIN=_CHAIN, num_warps=_WARPS,
                maxnreg=_MAX_REGISTERS, **compiled_for, **OPTIONS,
            )  # fmt: skip
        finish_kernel[(1,)](
            totals, sequences,
            normalizer, *two_floats(options[-3]),
            num_sequences, *two_floats(options[-2]),
            entropy_normalizer, *two_floats(options[-1]),
            fp32(options[7]), fp32(options[11]), loss, metrics, scale,
            AGGREGATION=int(options[13]), SKIP_EMPTY=bool(options[14]), KL=compiled_for["KL"],
            BONUS=compiled_for["BONUS"], BONUS_SAME=bool(options[12]), ROWS=_ROWS,
            num_warps=_FINISH_WARPS, **OPTIONS,
        )  # fmt: skip
    return loss, metrics, logprobs_out, entropy_out, scale


def backward(
    grad_loss: Tensor, grad_logprobs: Tensor, grad_entropy: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """``rlkern::policy_loss_bwd_triton``: the gradients times upstream and denominators."""
    grads = grad_logprobs.contiguous(), grad_entropy.contiguous()
    outs = tuple(grad.new_empty(grad.shape) for grad in grads)
    size = max(grad.numel() for grad in grads)
    if size > 0:
        pairs = (
            pair if pair[0].numel() else (None, None) for pair in zip(grads, outs, strict=True)
        )
        with torch.cuda.device_of(grad_loss):
            _scale_kernel[(triton.cdiv(size, _SCALE_BLOCK),)](
                grad_loss, scale, *(tensor for pair in pairs for tensor in pair), size,
                BLOCK=_SCALE_BLOCK, num_warps=4, **OPTIONS,
            )  # fmt: skip
    return outs[0], outs[1]

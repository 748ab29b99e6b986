"""Optimizer steps: the learning rate's course, micro-batches that add up, a guard against NaN."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import rlkern
from rlkern import Metrics, PolicyLoss, ValueLoss
from rlkern_loops.errors import RunError


class NonFiniteLoss(RunError):
    """A loss or gradient that is not a number, or is infinite; no weight was changed by it."""


def adamw(config: Any, *groups: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    """AdamW over groups of parameters, each with a learning rate of its own in every step."""
    return torch.optim.AdamW(
        [{"params": list(group)} for group in groups],
        lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=config.weight_decay,
    )  # fmt: skip


def set_learning_rates(
    optimizer: torch.optim.Optimizer, peaks: Sequence[float], step: int, config: Any
) -> float:
    """Sets the groups' rates for a step, from 1: up from 0 while Adam's moments fill, then
    linearly down. Returns the first."""
    rise = step / config.warmup_steps if config.warmup_steps else 1.0
    share = min(rise, 1.0, max(config.final_learning_rate, 1 - step / config.steps))
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["lr"] = peak * share
    return peaks[0] * share


def operators(config: Any) -> contextlib.AbstractContextManager:
    """Eager PyTorch in rlkern's place where the options ask for it."""
    if config.operators == "eager":
        return rlkern.use_backend("eager")
    return contextlib.nullcontext()


def denominators(
    loss: PolicyLoss | ValueLoss, mask: Tensor, max_new_tokens: int
) -> dict[str, Tensor | float]:
    """What a mini-batch's losses are divided by, so that its micro-batches add up to it.

    Args:
        loss: whose aggregation says what is counted.
        mask: [B, T] of the whole mini-batch.
        max_new_tokens: Dr. GRPO's constant length.
    """
    tokens = mask.sum().clamp(min=1)
    given: dict[str, Tensor | float] = {}
    if loss.aggregation == "token_mean":
        given["normalizer"] = tokens
    elif loss.aggregation.startswith("seq_mean"):
        given["num_sequences"] = float(len(mask))
        if loss.aggregation == "seq_mean_token_sum_norm":
            given["normalizer"] = float(max_new_tokens)
    if isinstance(loss, PolicyLoss) and loss.entropy_coef:
        given["entropy_normalizer"] = tokens
    return given


def accumulate(
    rows: Tensor, micro_batch_size: int, losses: Callable[[Tensor], tuple[Tensor, list[Metrics]]]
) -> tuple[float, list[Metrics]]:
    """Backward through a mini-batch, a micro-batch at a time.

    Args:
        rows: [B] int64, the completions of the mini-batch.
        micro_batch_size: how many at a time; 0: all.
        losses: the loss of some rows, already divided by the mini-batch's counts, and metrics.

    Returns:
        The loss of the mini-batch, and its metrics, in the order of `losses`.
    """
    total, found = 0.0, []
    for part in rows.split(micro_batch_size or len(rows)):
        loss, metrics = losses(part)
        loss.backward()
        total += loss.item()
        found.append(metrics)
    return total, [sum(column) for column in zip(*found, strict=True)]


def step(optimizer: torch.optim.Optimizer, loss: float, max_grad_norm: float) -> list[float]:
    """One optimizer step from the gradients there are, which it clears.

    Returns:
        The norm of each group's gradient, which was clipped to max_grad_norm on its own.

    Raises:
        NonFiniteLoss: the loss or a gradient is no finite number; the weights are kept.
    """
    norms = [
        torch.nn.utils.clip_grad_norm_(group["params"], max_grad_norm).item()
        for group in optimizer.param_groups
    ]
    if not all(map(math.isfinite, (loss, *norms))):
        optimizer.zero_grad()
        # A sum beyond fp32 is no rounding error: more digits would not help.
        cause = (
            "A reward, or a coefficient such as kl_coef, may be too large"
            if any(map(math.isinf, (loss, *norms)))
            else "A smaller learning_rate, reward or coefficient may help, or fp32 instead of bf16"
        )
        raise NonFiniteLoss(
            f"the loss is {loss} and its gradient's norm {', '.join(map(str, norms))}: the weights "
            f"are as they were before this mini-batch. {cause}"
        )
    optimizer.step()
    optimizer.zero_grad()
    return norms

"""group_advantages: rewards normalised within the group of completions of one prompt."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlkern import _backend
from rlkern.ops import _checks, _register
from rlkern.ops.whiten import whiten
from rlkern.reference import group_advantages as reference
from rlkern.reference.group_advantages import (
    BASELINES,
    SCALES,
    SINGLETONS,
    GroupBatch,
    GroupOptions,
)

BATCHES = ("sequences", "tokens")
_EPS = 1e-4


def group_advantages(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    baseline: str = "mean",
    scale: str = "std",
    unbiased: bool = True,
    eps: float = _EPS,
    singleton: str = "zero",
    lengths: Tensor | None = None,
    baseline_rewards: Tensor | None = None,
    reward_weights: Tensor | Sequence[float] | None = None,
    batch: str = "sequences",
    mask: Tensor | None = None,
) -> Tensor:
    """Advantages A = (s - mu) / (sigma + eps) of N completions from their rewards s.

    baseline, mu, by group unless it says otherwise:

    - "mean": GRPO (Shao et al., 2024, https://arxiv.org/abs/2402.03300)
    - "leave_one_out": (sum - s) / (n - 1), RLOO (https://arxiv.org/abs/2402.14740)
    - "length_weighted": sum(length * s) / sum(length), OPO (https://arxiv.org/abs/2505.23585); the
      mean where all lengths are 0
    - "pass_at_k": the best completion alone gets (best - second best) / (sigma + eps), the first
      one of several (https://arxiv.org/abs/2503.19595); all others get 0
    - "batch_mean": of all rewards
    - "given": baseline_rewards, as in ReMax, where it is the greedy answer's reward
    - "none": 0

    scale, sigma: "std" of the group; "batch_std" of all rewards; "mean", the group's mean (MaxRL),
    where one of at most 0 gives A = 0; "none": A = s - mu.

    Equal rewards in what sigma is taken of give exactly 0, with any baseline but "none". A NaN
    reward is left out of all statistics, and its advantage is 0. An infinite one makes all
    advantages NaN that a statistic with it enters: its group's where mu or sigma is the group's,
    the batch's where one of them is the batch's or several rewards are normalised over it, also
    where it is a single reward. With statistics of groups alone other groups do not feel it; where
    no statistic enters, s - mu is infinite.

    Statistics are taken in float64, about one of the group's rewards: 1e6 + {0, 1} gives +-0.707.
    The kernels give the same call twice the same bits; eager PyTorch, where float64 runs, need not.

    Several rewards per completion, [N, K] (GDPO): each column is normalised as above; then their
    weighted sum, to which a NaN cell adds 0, is normalised over the batch.

    Args:
        rewards: [N] or [N, K]; float32, a 16-bit type that is widened, or float64 (which runs in
            eager PyTorch). No gradient is computed.
        group_size: consecutive rewards that form a group; divides N. Either this or group_ids.
        group_ids: [N] int32 or int64, which group a reward belongs to: any numbers, in any order,
            groups of any sizes.
        baseline, scale: names above.
        unbiased: standard deviations divide by n - 1, else by n.
        eps: added to sigma, at least 0.
        singleton: what a statistic over a single reward does. "zero": A = 0. "raw": it has mean 0
            and standard deviation 1, so that the reward is kept (verl). Not with baseline "given"
            or "none" and scale "none", which take no statistic.
        lengths: [N], tokens of each completion, for baseline "length_weighted".
        baseline_rewards: in the shape of rewards, for baseline "given"; finite where the reward is
            not NaN.
        reward_weights: [K], finite, for several rewards. None: 1 each.
        batch: over what the sum of several rewards is normalised. "sequences": (x - mean) /
            (std + eps), the completions that have a reward (TRL). "tokens": x is spread over the
            completion's tokens and whitened with :func:`whiten` (verl); with [N, K] alone.
        mask: [N, T], bool or integer, for batch "tokens".

    Returns:
        [N], or [N, T] with batch "tokens"; float32 (float64 for float64 rewards).

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device, name or range; an argument that
            is missing, or that would have no effect. Values of tensors are looked at on the CPU
            always, on a GPU with RLKERN_DEBUG=1.
        RuntimeError: a backend was asked for that cannot serve the call.
    """
    tensor = _checked_rewards(rewards)
    size, ids = _checked_groups(tensor, group_size, group_ids)
    several = tensor.dim() == 2
    options, numbers = _options(baseline, scale, unbiased, eps, singleton, batch, several)
    if tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.float()
    if lengths is not None or baseline == "length_weighted":
        lengths = _checked_lengths(lengths, baseline, tensor)
    if baseline_rewards is not None or baseline == "given":
        baseline_rewards = _checked_baseline_rewards(baseline_rewards, baseline, tensor)
    if reward_weights is not None:
        reward_weights = _checked_weights(reward_weights, tensor)
    tokens = several and batch == "tokens"
    if tokens or mask is not None:
        mask = _checked_mask(mask, tokens, tensor)
    columns = tensor if several else tensor.unsqueeze(1)
    if not columns.is_contiguous():
        columns = columns.contiguous()
    given = (columns, size, ids, lengths, baseline_rewards, reward_weights)

    backend = _backend.choose("group_advantages", columns.device.type, columns.dtype)
    if backend == "eager":
        advantages = reference.group_advantages(GroupBatch(*given), options)
    else:
        advantages = _register.constant("group_advantages", backend, *given, list(numbers))
    if not tokens:
        return advantages
    assert mask is not None
    # A completion without any reward is left out of the whitening, too.
    counts = mask & ~tensor.isnan().all(1, keepdim=True)
    return whiten(advantages[:, None].expand(mask.shape), counts, unbiased=unbiased)


def _checked_rewards(value: Any) -> Tensor:
    plain = _checks.is_plain(value)
    tensor = value if plain else _checks.require_tensor(value, "rewards")
    if tensor.dtype not in _checks.LOGIT_DTYPES:
        raise TypeError(
            f"rewards: expected float32, bfloat16, float16 or float64, got {tensor.dtype}"
        )
    if tensor.dim() not in (1, 2) or (tensor.dim() == 2 and tensor.shape[1] == 0):
        raise ValueError(f"rewards: expected shape [N] or [N, K], got {list(tensor.shape)}")
    return tensor if plain else _checks.without_gradient(tensor, "rewards")


def _checked_groups(
    rewards: Tensor, group_size: object, group_ids: Any
) -> tuple[int, Tensor | None]:
    if (group_size is None) == (group_ids is None):
        raise ValueError(
            "group_size, group_ids: expected one of them, got "
            f"{'neither' if group_ids is None else 'both'}"
        )
    count = rewards.shape[0]
    if group_size is not None:
        if isinstance(group_size, bool) or not isinstance(group_size, int):
            raise TypeError(f"group_size: expected an int, got {type(group_size).__name__}")
        if group_size < 1 or count % group_size:
            raise ValueError(
                f"group_size: expected a number of at least 1 that divides the {count} rewards, "
                f"got {group_size}"
            )
        return group_size, None
    ids = (
        group_ids if _checks.is_plain(group_ids) else _checks.require_tensor(group_ids, "group_ids")
    )
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"group_ids: expected int32 or int64, got {ids.dtype}")
    if ids.shape != (count,):
        raise ValueError(f"group_ids: expected shape [{count}] (rewards'), got {list(ids.shape)}")
    _require_device(ids, "group_ids", rewards)
    if ids.dtype != torch.int64:
        ids = ids.long()
    return 0, ids if ids.is_contiguous() else ids.contiguous()


def _checked_options(
    baseline: str,
    scale: str,
    unbiased: bool,
    eps: float,
    singleton: str,
    batch: str,
    several: bool,
) -> tuple[GroupOptions, tuple[float, ...]]:
    _checks.one_of(baseline, BASELINES, "baseline")
    _checks.one_of(scale, SCALES, "scale")
    _checks.one_of(singleton, SINGLETONS, "singleton")
    _checks.one_of(batch, BATCHES, "batch")
    if not isinstance(unbiased, bool):
        raise TypeError(f"unbiased: expected a bool, got {unbiased!r}")
    eps = _checks.number(eps, "eps", minimum=0.0)
    tokens = several and batch == "tokens"
    # What would have no effect is refused.
    if batch == "tokens" and not several:
        raise ValueError(
            "batch: expected its default with rewards [N], whose advantages are not normalised "
            "over the batch, got 'tokens'"
        )
    # The sum of several rewards is divided by a standard deviation whatever the columns are.
    if not unbiased and scale not in ("std", "batch_std") and not several:
        raise ValueError(
            f"unbiased: expected its default with scale {scale!r}, which is no standard deviation, "
            "got False"
        )
    if eps != _EPS and scale == "none" and (not several or tokens):
        raise ValueError(f"eps: expected its default with scale 'none', got {eps}")
    normalized = several and not tokens
    options = GroupOptions(baseline, scale, unbiased, eps, singleton, several, normalized)
    if singleton == "raw" and not (options.uses_group() or options.uses_batch()):
        raise ValueError(
            f"singleton: expected its default with baseline {baseline!r} and scale 'none', which "
            "take no statistic, got 'raw'"
        )
    return options, tuple(options.numbers())


# By type too: 1 is equal to True, and refused for it.
_remembered_options = functools.lru_cache(maxsize=64, typed=True)(_checked_options)


def _options(*named: Any) -> tuple[GroupOptions, tuple[float, ...]]:
    """The checked options, remembered: looking at all of them again costs as much as a kernel."""
    if torch.compiler.is_compiling():
        return _checked_options(*named)
    try:
        return _remembered_options(*named)
    except TypeError:  # of a wrong type, or one that cannot be remembered
        pass
    return _checked_options(*named)


def _checked_lengths(value: object, baseline: str, rewards: Tensor) -> Tensor | None:
    if (value is None) != (baseline != "length_weighted"):
        wanted = "None" if value is not None else "a tensor"
        raise ValueError(f"lengths: expected {wanted}, since baseline is {baseline!r}")
    if value is None:
        return None
    lengths = _checks.require_tensor(value, "lengths")
    if lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths: expected integers or floats, got {lengths.dtype}")
    if lengths.shape != rewards.shape[:1]:
        raise ValueError(f"lengths: expected shape [{rewards.shape[0]}], got {list(lengths.shape)}")
    _require_device(lengths, "lengths", rewards)
    lengths = _checks.without_gradient(lengths, "lengths")
    if _checks.values_are_checked(lengths):
        where = _checks.first_offence(~((lengths >= 0) & (lengths < math.inf)), None)
        if where is not None:
            raise ValueError(
                f"lengths: expected finite values of at least 0, got {float(lengths[where])} at "
                f"[{where[0]}]"
            )
    return lengths.to(rewards.dtype).contiguous()


def _checked_baseline_rewards(value: object, baseline: str, rewards: Tensor) -> Tensor | None:
    if (value is None) != (baseline != "given"):
        wanted = "None" if value is not None else "a tensor"
        raise ValueError(f"baseline_rewards: expected {wanted}, since baseline is {baseline!r}")
    if value is None:
        return None
    given = _checks.require_tensor(value, "baseline_rewards")
    if given.dtype not in _checks.LOGIT_DTYPES:
        raise TypeError(
            f"baseline_rewards: expected float32, bfloat16, float16 or float64, got {given.dtype}"
        )
    if given.shape != rewards.shape:
        raise ValueError(
            f"baseline_rewards: expected shape {list(rewards.shape)} (rewards'), "
            f"got {list(given.shape)}"
        )
    _require_device(given, "baseline_rewards", rewards)
    given = _checks.without_gradient(given, "baseline_rewards").to(rewards.dtype)
    _checks.require_finite(given, "baseline_rewards", ~rewards.isnan())
    return (given if given.dim() == 2 else given[:, None]).contiguous()


def _checked_weights(value: object, rewards: Tensor) -> Tensor:
    name = "reward_weights"
    if rewards.dim() == 1:
        raise ValueError(f"{name}: expected None, since rewards are [N], one per completion")
    count = rewards.shape[1]
    if not isinstance(value, Tensor):
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise TypeError(f"{name}: expected a tensor or a sequence, got {type(value).__name__}")
        numbers = [_checks.number(weight, name) for weight in value]
        value = torch.tensor(numbers, dtype=rewards.dtype, device=rewards.device)
    weights = _checks.require_tensor(value, name)
    if weights.shape != (count,):
        raise ValueError(f"{name}: expected shape [{count}], got {list(weights.shape)}")
    if not weights.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {weights.dtype}")
    _require_device(weights, name, rewards)
    weights = _checks.without_gradient(weights, name).to(rewards.dtype).contiguous()
    _checks.require_finite(weights, name)
    return weights


def _checked_mask(value: object, used: bool, rewards: Tensor) -> Tensor:
    if not used:
        raise ValueError(
            "mask: expected None, since only batch 'tokens' with rewards [N, K] uses it"
        )
    if value is None:
        raise ValueError("mask: expected a tensor, since batch is 'tokens', got None")
    mask = _checks.require_tensor(value, "mask")
    if mask.dim() != 2 or mask.shape[0] != rewards.shape[0]:
        raise ValueError(f"mask: expected shape [{rewards.shape[0]}, T], got {list(mask.shape)}")
    flags = _checks.as_flags(mask, "mask")
    _require_device(flags, "mask", rewards)
    return flags


def _require_device(tensor: Tensor, name: str, rewards: Tensor) -> None:
    if tensor.device != rewards.device:
        raise ValueError(
            f"{name}: expected device {rewards.device} (rewards'), got {tensor.device}"
        )


# ---- the operator ------------------------------------------------------------------------------


_backend.register("group_advantages")
_register.register_fake(
    "group_advantages", lambda rewards, *rest: rewards.new_empty((rewards.shape[0],))
)
_register.register_triton("group_advantages", "group_advantages", "forward")
_register.forbid_derivative("group_advantages")

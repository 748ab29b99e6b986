"""Calls the CUDA kernels of return_scan, group_advantages, masked_moments and whiten, built for the
CPU, on torch tensors: arguments and results as in rlkern/_schema.py."""

from __future__ import annotations

from types import ModuleType

import torch
from emulated_kernels import build, poisoned
from emulated_policy import rows


def arguments(**tensors: torch.Tensor | None) -> dict[str, tuple[int, int]]:
    """A tensor without elements has no address, as on a GPU."""
    return {n: rows(x) for n, x in tensors.items() if x is not None and x.numel()}


class EmulatedAdvantages:
    """The operators with the block sizes and the limit of a grid's blocks as attributes."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.scan_threads = 0  # the launcher's choice
        self.group_threads = 32
        self.finish_threads = 32
        self.max_blocks = 2**31 - 1

    def return_scan(
        self, rewards, values, log_ratios, mask, dones, bootstrap_value, lam, offsets, options
    ):
        sequences = len(rewards) if offsets is None else len(offsets) - 1
        first = poisoned(*rewards.shape)
        second = poisoned(*((0,) if values is None else rewards.shape))
        given = arguments(
            rewards=rewards, values=values, log_ratios=log_ratios, mask=mask, dones=dones,
            bootstrap_value=bootstrap_value, lam=lam, offsets=offsets, first=first, second=second,
        )  # fmt: skip
        self.module.scan(
            given, sequences, rewards.shape[-1], options, self.scan_threads, self.max_blocks
        )
        return first, second

    def return_scan_bwd(self, grad_first, grad_second, mask, dones, lam, offsets, options):
        sequences = len(grad_first) if offsets is None else len(offsets) - 1
        shape = grad_first.shape
        out = (
            poisoned(*shape),
            poisoned(*((0,) if grad_second is None else shape)),
            poisoned(sequences),
        )
        given = arguments(
            grad_first=grad_first, grad_second=grad_second, mask=mask, dones=dones, lam=lam,
            offsets=offsets, grad_rewards=out[0], grad_values=out[1], grad_bootstrap=out[2],
        )  # fmt: skip
        self.module.scan_backward(
            given, sequences, shape[-1], options, self.scan_threads, self.max_blocks
        )
        return out

    def group_advantages(self, rewards, group_size, group_ids, lengths, given, weights, options):
        count, columns = rewards.shape
        out = poisoned(count)
        if count == 0:
            return out
        totals = poisoned(count, dtype=torch.float64)
        tensors = arguments(
            rewards=rewards, group_ids=group_ids, lengths=lengths, given=given, weights=weights,
            totals=totals, out=out,
        )  # fmt: skip
        self.module.groups(
            tensors, count, columns, group_size, options, self.group_threads, self.max_blocks
        )
        return out

    def masked_moments(self, x, mask):
        moments = poisoned(3, dtype=torch.float64)
        self.module.moments(
            arguments(x=x, mask=mask, moments=moments), x.numel(), self.finish_threads,
            self.max_blocks,
        )  # fmt: skip
        return moments

    def whiten(self, x, mask, moments, options, out=None):
        """`out`: where to write, at any alignment."""
        out = poisoned(*x.shape) if out is None else out
        given = arguments(x=x, mask=mask, moments=moments, out=out)
        self.module.whiten(given, x.numel(), options, self.max_blocks)
        return out


def emulated_advantages() -> EmulatedAdvantages:
    return EmulatedAdvantages(build("_emulated_advantages", "emulated_advantages.cpp"))

"""gae on a GPU: many sequences, one long one, and a size at which the loop over time that trainers
have ends in time. Beside it at the longer sizes: a scan by doubling, the same recurrence in
log2(T) steps over whole tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.contestants import relative, usual
from benchmarks.gpu.registry import GpuCase, register

GAMMA, LAM = 0.999, 0.95
LOOP, MANY, LONG = "256 x 512", "256 x 8192", "1 x 65536"
SIZES = {LOOP: (256, 512), MANY: (256, 8192), LONG: (1, 65536)}


def ours(rewards, values, mask):
    import rlkern

    return rlkern.gae(rewards, values, gamma=GAMMA, lam=LAM, mask=mask)


def by_steps(rewards, values, mask):
    """As verl's: masked tokens hand on what comes after them."""
    x = torch.zeros_like(rewards[:, 0])
    next_value, advantages = x, []
    for t in reversed(range(rewards.shape[1])):
        m = mask[:, t].to(rewards.dtype)
        here = rewards[:, t] + GAMMA * next_value - values[:, t] + GAMMA * LAM * x
        x = here * m + x * (1 - m)
        next_value = values[:, t] * m + next_value * (1 - m)
        advantages.append(here)
    stacked = torch.stack(advantages[::-1], 1) * mask
    return stacked, stacked + values * mask


def by_doubling(rewards, values, mask):
    """Of sequences that are padded at their ends alone: there everything is 0."""
    v = values * mask
    x = (rewards + GAMMA * torch.nn.functional.pad(v[:, 1:], (0, 1)) - values) * mask
    reach = 1
    while reach < x.shape[1]:
        x = x + (GAMMA * LAM) ** reach * torch.nn.functional.pad(x[:, reach:], (0, reach))
        reach *= 2
    return x, x + v


@register
class Gae(GpuCase):
    operator = "gae"
    contestants = (
        *usual(LOOP, ours, by_steps, compiles=False),
        *usual(MANY, ours, by_doubling),
        *usual(LONG, ours, by_doubling),
    )

    @staticmethod
    def small_calls(device: str) -> None:
        """Every kernel: gae, its backward, returns and V-trace, of blocks of every size."""
        import rlkern

        for sequences, length in ((3, 1), (3, 300), (2, 2500)):
            shape = sequences, length
            rewards, values = (torch.randn(*shape, device=device).requires_grad_() for _ in "rv")
            flags = torch.rand(2, *shape, device=device)
            mask, dones = flags[0] < 0.7, flags[1] < 0.1
            first = torch.randn(sequences, device=device)
            lam = torch.rand(sequences, device=device)
            for mode in ("carry", "break"):
                rest = {"dones": dones, "bootstrap_value": first, "mask_mode": mode}
                rlkern.gae(rewards, values, lam=lam, mask=mask, **rest).returns.sum().backward()
            r, v = rewards.detach(), values.detach()
            rlkern.vtrace(r, v, 0.1 * v, mask=mask, dones=dones)
            offsets = torch.arange(sequences + 1, device=device) * length
            rlkern.discounted_returns(r.flatten(), cu_seqlens=offsets)

    def __init__(self, device: str, tiny: bool) -> None:
        super().__init__(device, tiny)
        self.inputs: dict[str, tuple[Tensor, ...]] = {}
        self.exact: dict[str, tuple[Tensor, ...]] = {}

    def shape(self) -> str:
        return "float32, padded"

    def arguments(self, task: str) -> tuple[Tensor, ...]:
        if task not in self.inputs:
            shape = (3, 70) if self.tiny else SIZES[task]
            g = torch.Generator(self.device).manual_seed(0)
            rewards, values = torch.randn(2, *shape, generator=g, device=self.device)
            lengths = torch.randint(
                shape[1] // 2, shape[1] + 1, (shape[0], 1), generator=g, device=self.device
            )
            mask = torch.arange(shape[1], device=self.device) < lengths
            self.inputs[task] = rewards, values, mask
        return self.inputs[task]

    def prepare(self, task: str) -> tuple[Any, ...]:
        return self.arguments(task)

    def bytes_moved(self, task: str) -> int:
        """Rewards, values, the mask; advantages and returns."""
        return self.arguments(task)[2].numel() * (4 * 4 + 1)

    def errors(self, task: str, outputs: Any) -> dict[str, tuple[float, float]]:
        """Against the scan by doubling in float64. In fp32 a result is the sum of about
        1 / (1 - gamma lam) = 20 terms, each right to a few 2^-24."""
        if task not in self.exact:
            rewards, values, mask = self.arguments(task)
            self.exact[task] = by_doubling(rewards.double(), values.double(), mask)
        names = ("advantages", "returns")
        return {
            name: (relative(found, exact), 1e-5)
            for name, found, exact in zip(names, outputs, self.exact[task], strict=True)
        }

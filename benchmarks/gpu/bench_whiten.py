"""whiten on a GPU: masked, moments and result, beside the lines that trainers have for it."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.contestants import relative, usual
from benchmarks.gpu.registry import GpuCase, register

MASKED = "masked"


def ours(x, mask):
    import rlkern

    return rlkern.whiten(x, mask)


def eager(x, mask):
    m = mask.to(x.dtype)
    count = m.sum()
    mean = (x * m).sum() / count
    variance = ((x - mean) ** 2 * m).sum() / (count - 1)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * m


@register
class Whiten(GpuCase):
    operator = "whiten"
    contestants = usual(MASKED, ours, eager)

    @staticmethod
    def small_calls(device: str) -> None:
        """Full and part vectors, one block and several, at an address of no multiple of 16."""
        import rlkern

        for size in (2, 1031, 9001):
            x = torch.randn(size + 1, device=device)
            mask = torch.rand(size + 1, device=device) < 0.7
            mask[:3] = True
            for first in (0, 1):
                rlkern.whiten(x[first:], mask[first:])
            rlkern.whiten(x)

    def __init__(self, device: str, tiny: bool) -> None:
        super().__init__(device, tiny)
        self.sequences, self.length = (4, 64) if tiny else (256, 8192)
        shape = self.sequences, self.length
        g = torch.Generator(device).manual_seed(0)
        self.x = 2 + torch.randn(*shape, generator=g, device=device)
        lengths = torch.randint(1, self.length + 1, (shape[0], 1), generator=g, device=device)
        self.mask = torch.arange(self.length, device=device) < lengths

    def shape(self) -> str:
        return f"{self.sequences} x {self.length} float32"

    def prepare(self, task: str) -> tuple[Any, ...]:
        return self.x, self.mask

    def bytes_moved(self, task: str) -> int:
        """Values and mask twice, since the moments come first; the result."""
        return self.x.numel() * (2 * (4 + 1) + 4)

    def errors(self, task: str, outputs: Any) -> dict[str, tuple[float, float]]:
        """Against the same lines in float64; fp32 sums of a million in a tree are right to 1e-6."""
        return {"whitened": (relative(outputs, eager(self.x.double(), self.mask)), 1e-5)}

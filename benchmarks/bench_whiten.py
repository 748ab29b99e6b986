"""whiten against the lines that trainers carry, eager and compiled, and verl's function."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import peers
from benchmarks.case import FULL, SHORT, Case, Contestant

SHAPE = {"sequences": 512, "tokens": 4096}
QUICK_SHAPE = {"sequences": 8, "tokens": 256}
# The slack that fp32 peers need; rlkern itself rounds once. Of 2^21 values a compiled loop with 16
# lanes sums 2^17 in a row, whose roundings walk to sqrt(2^17) * 2^-24 = 2e-5 of the sum: as much
# for the mean in deviations, half as much for the factor. Relative above 1 that makes 3e-5; three
# times that lets the walk go further.
TOLERANCE = 1e-4
TASK = "masked whitening"


def masked_whiten(values, mask):
    """As verl writes it; it leaves numbers at masked positions, which no one reads."""
    count = mask.sum()
    mean = (values * mask).sum() / count
    variance = ((values - mean).square() * mask).sum() / count * (count / (count - 1))
    return (values - mean) * torch.rsqrt(variance + 1e-8)


def build_verl():
    return peers.member("verl.utils.torch_functional", "masked_whiten")


def build_whiten():
    import rlkern

    with rlkern.use_backend("native"):
        rlkern.whiten(torch.zeros(2))
    return rlkern.whiten


class Whiten(Case):
    """Ragged sequences of advantages, half as long as the padding or longer."""

    operator = "whiten"
    contestants = (
        Contestant(TASK, "rlkern", build_whiten),
        Contestant(TASK, "eager", lambda: masked_whiten),
        Contestant(TASK, "torch.compile", lambda: torch.compile(masked_whiten, dynamic=False)),
        Contestant(TASK, "verl", build_verl),
    )
    #: The moments read everything once, before the first result can be written.
    bounds = {TASK: ("read", "copy")}
    tolerance = TOLERANCE

    def __init__(self, sequences: int, tokens: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.bulk = torch.randn(sequences, tokens, generator=generator)
        self.values = self.bulk.clone()
        lengths = torch.randint(tokens // 2, tokens + 1, (sequences, 1), generator=generator)
        self.mask = torch.arange(tokens) < lengths

    def prepare(self, task: str) -> tuple[torch.Tensor, ...]:
        self.bulk.copy_(self.values)
        return self.bulk, self.mask

    def errors(self, task: str, outputs: Any) -> dict[str, float]:
        """The worst counting value's distance from float64's, relative above 1."""
        exact = masked_whiten(self.values.double(), self.mask)[self.mask]
        error = (outputs[self.mask].double() - exact).abs() / exact.abs().clamp(min=1)
        return {"whitened": error.max().item()}


SIDE_SHAPES = ({"sequences": 64, "tokens": 1024},)
SHAPES = [(SHAPE, FULL), *((shape, SHORT) for shape in SIDE_SHAPES)]


@pytest.mark.parametrize("shape, plan", SHAPES, ids=[str([*s.values()]) for s, _ in SHAPES])
@pytest.mark.parametrize("contestant", [c.key for c in Whiten.contestants])
def test_whiten(contest, quick, shape, plan, contestant):
    contest(Whiten, QUICK_SHAPE if quick else shape, contestant, plan)

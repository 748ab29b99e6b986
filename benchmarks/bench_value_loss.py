"""ValueLoss against eager, torch.compile, verl's and OpenRLHF's: loss, gradient, metrics."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import peers
from benchmarks.bench_policy_loss import relative, with_gradient
from benchmarks.case import FULL, SHORT, Case, Contestant

SHAPE = {"sequences": 64, "tokens": 4096}
QUICK_SHAPE = {"sequences": 8, "tokens": 256}
#: A micro-batch of PPO, and as much again as the main shape in few long sequences.
SIDE_SHAPES = ({"sequences": 8, "tokens": 1024}, {"sequences": 8, "tokens": 65536})
CLIP = 0.2
METRICS = "loss + gradient + metrics"
#: The same without metrics of anyone's choice; verl's function computes one all the same.
PLAIN = "loss + gradient"
# Of the loss and the metrics, relative above 1, and of the gradient in the 2-norm: sums of 1e5 fp32
# terms in torch's own order are good to about 1e-6.
TOLERANCE = 1e-4
# A token closer than this to its clip bound, or whose squares are closer, falls to either side in
# fp32, with its whole gradient or none, and is not looked at: differences of numbers up to 4 carry
# 2.4e-7, their squares, up to 16, thirty times that.
EITHER = 1e-5


def plain(values, returns, old, mask):
    """As PPO trainers write it, and the squares, from which metrics are taken."""
    clipped = values.clamp(old - CLIP, old + CLIP)
    free, held = (values - returns).square(), (clipped - returns).square()
    count = mask.sum()
    return 0.5 * (torch.max(free, held) * mask).sum() / count, free, held, count


def eager(values, returns, old, mask):
    loss, free, held, count = plain(values, returns, old, mask)
    with torch.no_grad():

        def variance(x):
            mean = (x * mask).sum() / count
            return ((x - mean).square() * mask).sum() / count

        metrics = {
            "value_clip_frac": ((held > free) & mask).sum() / count,
            "explained_variance": 1 - variance(returns - values) / variance(returns),
        }
    return loss, metrics


def eager_plain(*tensors):
    return plain(*tensors)[0], {}


def build_rlkern():
    import rlkern

    loss = rlkern.ValueLoss(clip=CLIP)

    def run(values, returns, old, mask):
        with rlkern.use_backend("native"):
            return loss(values, returns, old_values=old, mask=mask)

    return run


def build_verl():
    function = peers.member("verl.trainer.ppo.core_algos", "compute_value_loss")

    def run(values, returns, old, mask):
        loss, _ = function(values, returns, old, mask, CLIP)
        return loss, {}

    return run


def build_openrlhf():
    loss = peers.member("openrlhf.models.loss", "ValueLoss")(clip_eps=CLIP)
    return lambda values, returns, old, mask: (loss(values, old, returns, mask), {})


BUILDERS = {
    METRICS: {
        "rlkern": build_rlkern,
        "eager": lambda: eager,
        "torch.compile": lambda: torch.compile(eager, dynamic=False),
    },
    # rlkern's metrics come from the same pass: there is no cheaper call without them.
    PLAIN: {
        "rlkern": build_rlkern,
        "eager": lambda: eager_plain,
        "torch.compile": lambda: torch.compile(eager_plain, dynamic=False),
        "verl, with its metrics": build_verl,
        "OpenRLHF": build_openrlhf,
    },
}


class ValueLosses(Case):
    """Ragged sequences of values, half as long as the padding or longer."""

    operator = "value_loss"
    contestants = tuple(
        Contestant(task, name, with_gradient(build, metrics=task == METRICS))
        for task, builders in BUILDERS.items()
        for name, build in builders.items()
    )
    #: Values, old values and returns are read, a gradient is written.
    bounds = {task: ("read", "read", "copy") for task in BUILDERS}
    tolerance = TOLERANCE

    #: A cold call is policy_loss's figure.
    cache = "warm"

    def __init__(self, sequences: int, tokens: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal():
            return torch.randn(sequences, tokens, generator=generator)

        self.values = normal()
        self.bulk = self.values.clone()
        self.returns, self.old = normal(), self.values + 0.3 * normal()
        lengths = torch.randint(tokens // 2, tokens + 1, (sequences, 1), generator=generator)
        self.mask = torch.arange(tokens) < lengths
        self.truth: tuple | None = None

    def prepare(self, task: str) -> tuple[torch.Tensor, ...]:
        # The ceilings scale the bulk in place.
        self.bulk.copy_(self.values)
        return self.bulk.detach().requires_grad_(), self.returns, self.old, self.mask

    def errors(self, task: str, outputs: Any) -> dict[str, float]:
        """Errors against float64; see TOLERANCE."""
        if self.truth is None:
            leaf, returns, old = (x.double() for x in (self.values, self.returns, self.old))
            wide = (leaf.requires_grad_(), returns, old, self.mask)
            self.truth = with_gradient(lambda: eager, metrics=True)()(*wide)
            _, free, held, _ = plain(*wide)
            moved = (leaf - old).abs()
            near = (moved - CLIP).abs() < EITHER
            near |= (moved > CLIP) & ((free - held).abs() < EITHER)
            self.clear = ~near
        true_loss, true_gradient, true_metrics = self.truth
        loss, gradient, metrics = outputs

        difference = (gradient.double() - true_gradient)[self.clear]
        found = {
            "loss": relative(loss.item(), true_loss.item()),
            "gradient": (difference.norm() / true_gradient.norm()).item(),
        }
        if task == METRICS:
            found |= {name: relative(metrics[name], truth) for name, truth in true_metrics.items()}
        return found


SHAPES = [(SHAPE, FULL), *((shape, SHORT) for shape in SIDE_SHAPES)]


@pytest.mark.parametrize("shape, plan", SHAPES, ids=[str([*s.values()]) for s, _ in SHAPES])
@pytest.mark.parametrize("contestant", [c.key for c in ValueLosses.contestants])
def test_value_loss(contest, quick, shape, plan, contestant):
    contest(ValueLosses, QUICK_SHAPE if quick else shape, contestant, plan)

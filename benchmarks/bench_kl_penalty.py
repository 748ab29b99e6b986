"""kl_penalty against eager PyTorch, torch.compile, verl's and OpenRLHF's: value and gradient.

The clamps that verl and OpenRLHF always apply lie outside of what the inputs reach, so that all
compute the same numbers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import peers
from benchmarks.case import FULL, SHORT, Case, Contestant

SHAPE = {"sequences": 64, "tokens": 4096}
QUICK_SHAPE = {"sequences": 8, "tokens": 256}
SIDE_SHAPES = ({"sequences": 8, "tokens": 1024}, {"sequences": 8, "tokens": 65536})
ESTIMATORS = ("k3", "k2")
# Absolute, of values and gradients of about x. k3 as exp(x) - x - 1 rounds numbers near 1 three
# times, and x itself, a difference of two numbers up to 4, carries 2^-24 of it, or 2.4e-7, to the
# exponential: 4 * 2.4e-7. Ten times that holds for any x that 8 x 65536 normal numbers reach.
TOLERANCE = 1e-5


def eager_k3(logprobs, ref):
    x = ref - logprobs
    return torch.exp(x) - x - 1


def eager_k2(logprobs, ref):
    return 0.5 * (logprobs - ref).square()


EAGER = {"k3": eager_k3, "k2": eager_k2}


def build_rlkern(estimator: str):
    import rlkern

    def run(logprobs, ref):
        with rlkern.use_backend("native"):
            return rlkern.kl_penalty(logprobs, ref, estimator=estimator)

    return run


def build_verl(estimator: str):
    function = peers.member("verl.trainer.ppo.core_algos", "kl_penalty_forward")
    return lambda logprobs, ref: function(logprobs, ref, estimator)


def build_openrlhf(estimator: str):
    function = peers.member("openrlhf.models.utils", "compute_approx_kl")
    return lambda logprobs, ref: function(logprobs, ref, kl_estimator=estimator)


BUILDERS = {
    "rlkern": build_rlkern,
    "eager": lambda estimator: EAGER[estimator],
    "torch.compile": lambda estimator: torch.compile(EAGER[estimator], dynamic=False),
    "verl": build_verl,
    "OpenRLHF": build_openrlhf,
}


def task(estimator: str) -> str:
    return f"value + gradient, {estimator}"


def with_gradient(build, estimator: str):
    def build_task():
        function = build(estimator)

        def run(logprobs, ref, upstream):
            kl = function(logprobs, ref)
            (gradient,) = torch.autograd.grad(kl, logprobs, upstream)
            return kl.detach(), gradient

        return run

    return build_task


class KlPenalty(Case):
    """Log-probabilities of chosen tokens, the reference's, and an upstream gradient."""

    operator = "kl_penalty"
    contestants = tuple(
        Contestant(task(estimator), name, with_gradient(build, estimator))
        for estimator in ESTIMATORS
        for name, build in BUILDERS.items()
    )
    #: Forward: two are read and one is written; backward: three are read and one is written.
    bounds = {task(estimator): ("read", "copy", "read", "read", "copy") for estimator in ESTIMATORS}
    tolerance = TOLERANCE

    #: A cold call is policy_loss's figure.
    cache = "warm"

    def __init__(self, sequences: int, tokens: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal():
            return torch.randn(sequences, tokens, generator=generator)

        self.logprobs = -normal().abs()
        self.bulk = self.logprobs.clone()
        self.ref, self.upstream = self.logprobs + 0.3 * normal(), normal()

    def prepare(self, task_name: str) -> tuple[torch.Tensor, ...]:
        # The ceilings scale the bulk in place.
        self.bulk.copy_(self.logprobs)
        return self.bulk.detach().requires_grad_(), self.ref, self.upstream

    def errors(self, task_name: str, outputs: Any) -> dict[str, float]:
        """The worst token's error against float64, absolute."""
        x = self.ref.double() - self.logprobs.double()
        if task_name == task("k3"):
            exact = torch.expm1(x) - x, -torch.expm1(x)
        else:
            exact = 0.5 * x.square(), -x
        value, gradient = (out.double() for out in outputs)
        return {
            "value": (value - exact[0]).abs().max().item(),
            "gradient": (gradient - exact[1] * self.upstream.double()).abs().max().item(),
        }


SHAPES = [(SHAPE, FULL), *((shape, SHORT) for shape in SIDE_SHAPES)]


@pytest.mark.parametrize("shape, plan", SHAPES, ids=[str([*s.values()]) for s, _ in SHAPES])
@pytest.mark.parametrize("contestant", [c.key for c in KlPenalty.contestants])
def test_kl_penalty(contest, quick, shape, plan, contestant):
    contest(KlPenalty, QUICK_SHAPE if quick else shape, contestant, plan)

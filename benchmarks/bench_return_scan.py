"""gae, discounted_returns and vtrace against the loops that trainers carry, and SciPy's filter.

The main shape is that of long completions; every token counts, so that no contestant has to spend
time on a mask that another one has no word for. verl's gae is no contestant: it whitens as well.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.case import FULL, SHORT, Case, Contestant, Floor

SHAPE = {"sequences": 256, "tokens": 8192}
QUICK_SHAPE = {"sequences": 8, "tokens": 256}
#: Many short sequences; few very long ones.
SIDE_SHAPES = ({"sequences": 2048, "tokens": 512}, {"sequences": 32, "tokens": 32768})
GAMMA, LAM = 0.99, 0.95
#: Of the results.
NAMES = {
    "gae": ("advantages", "returns"),
    "discounted_returns": ("returns",),
    "vtrace": ("values", "advantages"),
}


def following(values):
    """V_{t+1}, 0 after the last token."""
    return torch.nn.functional.pad(values[:, 1:], (0, 1))


def scanned(a, factors):
    """x_t = a_t + factor_t x_{t+1}, a loop over columns."""
    x, reversed_columns = torch.zeros_like(a[:, 0]), []
    for t in reversed(range(a.shape[1])):
        x = a[:, t] + (factors[:, t] if isinstance(factors, torch.Tensor) else factors) * x
        reversed_columns.append(x)
    return torch.stack(reversed_columns[::-1], 1)


def loop_gae(rewards, values):
    """As PPO trainers write it: everything inside of the loop."""
    steps, last, reversed_columns = rewards.shape[1], 0.0, []
    for t in reversed(range(steps)):
        next_value = values[:, t + 1] if t + 1 < steps else 0.0
        delta = rewards[:, t] + GAMMA * next_value - values[:, t]
        last = delta + GAMMA * LAM * last
        reversed_columns.append(last)
    advantages = torch.stack(reversed_columns[::-1], 1)
    return advantages, advantages + values


def loop_returns(rewards):
    return (scanned(rewards, GAMMA),)


def loop_vtrace(rewards, values, log_ratios):
    """As IMPALA's code has it: all but the recurrence for whole tensors."""
    rho = log_ratios.exp().clamp(max=1)
    delta = rho * (rewards + GAMMA * following(values) - values)
    targets = values + scanned(delta, GAMMA * LAM * rho)
    blend = LAM * following(targets) + (1 - LAM) * following(values)
    return targets, rho * (rewards + GAMMA * blend - values)


def build_loop(task):
    return {"gae": loop_gae, "discounted_returns": loop_returns, "vtrace": loop_vtrace}[task]


def build_compiled(task):
    raise NotImplementedError(
        "every time step becomes a part of the graph: 256 steps take more than a minute to compile"
    )


def build_scipy(task):
    """The recurrence as a filter over time turned round, in float32."""
    import numpy
    from scipy.signal import lfilter

    def filtered(a, factor):
        backwards = a.numpy()[:, ::-1]
        one, pole = numpy.float32([1]), numpy.float32([1, -factor])
        return torch.from_numpy(lfilter(one, pole, backwards, axis=1)).flip(1)

    def gae(rewards, values):
        advantages = filtered(rewards + GAMMA * following(values) - values, GAMMA * LAM)
        return advantages, advantages + values

    return {"gae": gae, "discounted_returns": lambda rewards: (filtered(rewards, GAMMA),)}[task]


def build_rlkern(task):
    import rlkern

    function = getattr(rlkern, task)
    options = {"gamma": GAMMA} if task == "discounted_returns" else {"gamma": GAMMA, "lam": LAM}

    def run(*tensors):
        with rlkern.use_backend("native"):
            out = function(*tensors, **options)
        return tuple(out) if isinstance(out, tuple) else (out,)

    return run


def scan_contestants():
    loop, scipy = {"PyTorch loop": build_loop}, {"scipy lfilter": build_scipy}
    peers = {
        "gae": loop | scipy | {"torch.compile": build_compiled},
        "discounted_returns": loop | scipy,
        "vtrace": loop,
    }
    return tuple(
        Contestant(task, name, lambda task=task, build=build: build(task))
        for task, builders in peers.items()
        for name, build in ({"rlkern": build_rlkern} | builders).items()
    )


class ReturnScans(Case):
    """Rewards, values and log-ratios of whole sequences."""

    operator = "return_scan"
    contestants = scan_contestants()
    #: Every tensor is read once or written once.
    bounds = {
        "gae": ("copy", "copy"),
        "discounted_returns": ("copy",),
        "vtrace": ("copy", "copy", "read"),
    }
    #: Relative to the recurrence over absolute values. A loop in fp32 rounds 6 times a step (3
    #: times in delta), and some 1 / (1 - gamma) = 100 steps are within reach: 600 * 2^-24 at worst.
    tolerance = 4e-5

    def __init__(self, sequences: int, tokens: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal():
            return torch.randn(sequences, tokens, generator=generator)

        self.rewards, self.values, self.log_ratios = normal(), normal(), 0.1 * normal()
        self.bulk = self.rewards.clone()
        self.truth: dict[str, tuple] = {}

    @staticmethod
    def floors(**params: Any) -> tuple[Floor, ...]:
        if params != SHAPE:
            return ()
        return (
            Floor("gae/rlkern", ("gae/PyTorch loop",), 50),
            Floor("gae/rlkern", ("gae/scipy lfilter",), 3),
            Floor("gae/rlkern", ("copy", "copy"), 0.5),
        )

    def prepare(self, task: str) -> tuple[torch.Tensor, ...]:
        # The ceilings scale the bulk in place.
        self.bulk.copy_(self.rewards)
        given = {"gae": 2, "discounted_returns": 1, "vtrace": 3}[task]
        return (self.bulk, self.values, self.log_ratios)[:given]

    def _expected(self, task: str) -> tuple[tuple, torch.Tensor]:
        """The results in float64, and the recurrence over absolute values."""
        if task not in self.truth:
            rewards, values, *rest = (x.double() for x in self.prepare("vtrace"))
            if task == "discounted_returns":
                exact, size, factor = loop_returns(rewards), rewards.abs(), GAMMA
            else:
                size = rewards.abs() + GAMMA * following(values).abs() + values.abs()
                factor = GAMMA * LAM
                exact = loop_gae(rewards, values) if task == "gae" else None
            if task == "vtrace":
                exact = loop_vtrace(rewards, values, *rest)
                rho = rest[0].exp().clamp(max=1)
                size, factor = size * rho, factor * rho
            self.truth[task] = exact, scanned(size, factor)
        return self.truth[task]

    def errors(self, task: str, outputs: Any) -> dict[str, float]:
        """The worst error of each result, relative to the recurrence over absolute values."""
        exact, scale = self._expected(task)
        return {
            name: ((x.double() - truth).abs() / scale).max().item()
            for name, x, truth in zip(NAMES[task], outputs, exact, strict=True)
        }


SHAPES = [(SHAPE, FULL), *((shape, SHORT) for shape in SIDE_SHAPES)]


@pytest.mark.parametrize("shape, plan", SHAPES, ids=[str([*s.values()]) for s, _ in SHAPES])
@pytest.mark.parametrize("contestant", [c.key for c in ReturnScans.contestants])
def test_return_scan(contest, quick, shape, plan, contestant):
    contest(ReturnScans, QUICK_SHAPE if quick else shape, contestant, plan)

"""What turns rewards into advantages, against the loops that trainers carry, compiled and SciPy's.

The scans' shape is that of long completions; every token counts, so that no contestant has to spend
time on a mask that another one has no word for.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.case import Case, Contestant, Floor

SCAN_SHAPE = {"sequences": 256, "tokens": 8192}
SCAN_QUICK_SHAPE = {"sequences": 8, "tokens": 256}
GAMMA, LAM = 0.99, 0.95
#: Of the results.
NAMES = {
    "gae": ("advantages", "returns"),
    "discounted_returns": ("returns",),
    "vtrace": ("values", "advantages"),
}


# ---- gae, discounted_returns, vtrace ----------------------------------------------------------


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
        backwards = a.flip(1).numpy()
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

        self.bulk, self.values, self.log_ratios = normal(), normal(), 0.1 * normal()
        self.truth: dict[str, tuple] = {}

    @staticmethod
    def floors(**params: Any) -> tuple[Floor, ...]:
        if params != SCAN_SHAPE:
            return ()
        return (
            Floor("gae/rlkern", ("gae/PyTorch loop",), 50),
            Floor("gae/rlkern", ("gae/scipy lfilter",), 3),
            Floor("gae/rlkern", ("copy", "copy"), 0.5),
        )

    def prepare(self, task: str) -> tuple[torch.Tensor, ...]:
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


@pytest.mark.parametrize("contestant", [c.key for c in ReturnScans.contestants])
def test_return_scan(contest, quick, contestant):
    contest(ReturnScans, SCAN_QUICK_SHAPE if quick else SCAN_SHAPE, contestant)


# ---- group_advantages ---------------------------------------------------------------------------

GROUP_SHAPE = {"rewards": 65536}
GROUP_QUICK_SHAPE = {"rewards": 2048}
#: Mean completions of a prompt; the groups have from 2 to 14.
GROUP_MEAN = 8
EPS = 1e-4
# The slack that fp32 peers need; rlkern itself rounds once. A peer's mean is off by 2^-24 of the
# sum of its rewards, up to 4, so 2.4e-7, which is divided by the deviation. Some 630 of the groups
# are pairs, whose differences are N(0, 2): the closest pair is about 1 / (0.56 * 630) apart, a
# deviation of 2e-3, and 1.2e-4 is what comes out. Eight times that lets a pair be closer.
GROUP_TOLERANCE = 1e-3
SORTED, SHUFFLED = "ragged groups, sorted", "ragged groups, shuffled"


def scattered(rewards, ids, count):
    """As one would write it knowing that the ids are numbers below `count`."""
    zeros = rewards.new_zeros(count)
    size = zeros.index_add(0, ids, torch.ones_like(rewards))
    mean = zeros.index_add(0, ids, rewards) / size
    centred = rewards - mean[ids]
    variance = zeros.index_add(0, ids, centred.square()) / (size - 1).clamp(min=1)
    advantages = centred / (variance.sqrt()[ids] + EPS)
    return advantages.where(size[ids] > 1, 0.0)


def scattered_by_any(rewards, ids, count):
    """For ids that may be any numbers, which is what rlkern serves."""
    found, places = torch.unique(ids, return_inverse=True)
    return scattered(rewards, places, found.numel())


def looped(rewards, ids, count):
    """Group by group, as verl and OpenRLHF write it: lists by id, a mean and a std for each."""
    groups: dict[int, list[int]] = {}
    for row, name in enumerate(ids.tolist()):
        groups.setdefault(name, []).append(row)
    advantages = torch.zeros_like(rewards)
    for rows in groups.values():
        if len(rows) > 1:
            mine = rewards[rows]
            advantages[rows] = (mine - mine.mean()) / (mine.std() + EPS)
    return advantages


def build_groups():
    import rlkern

    # A block around each call would weigh as much as the call: where there are native kernels
    # they are the automatic choice.
    with rlkern.use_backend("native"):
        rlkern.group_advantages(torch.zeros(2), group_size=2)
    return lambda rewards, ids, count: rlkern.group_advantages(rewards, group_ids=ids)


GROUP_BUILDERS = {
    "rlkern": build_groups,
    "eager, any ids": lambda: scattered_by_any,
    "eager": lambda: scattered,
    "torch.compile": lambda: torch.compile(scattered, dynamic=False),
    "a loop over groups": lambda: looped,
}


class GroupAdvantages(Case):
    """Rewards of groups of 2 to 14 completions; "eager" and "torch.compile" are told that the ids
    are dense, and how many there are."""

    operator = "group_advantages"
    contestants = tuple(
        Contestant(task, name, build)
        for task in (SORTED, SHUFFLED)
        for name, build in GROUP_BUILDERS.items()
    )
    #: Rewards are read and advantages written, in fp32, and the ids read, twice as wide.
    bounds = {task: ("copy", "read", "read") for task in (SORTED, SHUFFLED)}
    tolerance = GROUP_TOLERANCE

    def __init__(self, rewards: int, cache: str) -> None:
        self.cache = cache
        generator = torch.Generator().manual_seed(0)
        self.bulk = torch.randn(rewards, generator=generator)
        sizes = torch.randint(2, 2 * GROUP_MEAN - 1, (rewards,), generator=generator)
        ids = torch.repeat_interleave(torch.arange(rewards), sizes)[:rewards]
        self.count = int(ids[-1]) + 1
        self.rewards = self.bulk.clone()
        order = torch.randperm(rewards, generator=generator)
        self.ids = {SORTED: ids, SHUFFLED: ids[order]}

    @staticmethod
    def floors(**params: Any) -> tuple[Floor, ...]:
        if params != GROUP_SHAPE | {"cache": "warm"}:
            return ()
        return tuple(
            Floor(f"{t}/rlkern", (f"{t}/{peer}",), 10)
            for t in (SORTED, SHUFFLED)
            for peer in ("eager, any ids", "eager")
        )

    def prepare(self, task: str) -> tuple[Any, ...]:
        # The ceilings scale the bulk in place.
        self.bulk.copy_(self.rewards)
        return self.bulk, self.ids[task], self.count

    def errors(self, task: str, outputs: Any) -> dict[str, float]:
        """The worst advantage's distance from float64's, relative above 1."""
        exact = scattered(self.rewards.double(), self.ids[task], self.count)
        return {"advantages": worst(outputs, exact)}


def worst(outputs, exact) -> float:
    return ((outputs.double() - exact).abs() / exact.abs().clamp(min=1)).max().item()


# ---- whiten -------------------------------------------------------------------------------------

WHITEN_SHAPE = {"sequences": 512, "tokens": 4096}
WHITEN_QUICK_SHAPE = {"sequences": 8, "tokens": 256}
# The slack that fp32 peers need; rlkern itself rounds once. Of 2^21 values a compiled loop with 16
# lanes sums 2^17 in a row, whose roundings walk to sqrt(2^17) * 2^-24 = 2e-5 of the sum: as much
# for the mean in deviations, half as much for the factor. Relative above 1 that makes 3e-5; three
# times that lets the walk go further.
WHITEN_TOLERANCE = 1e-4
WHITEN = "masked whitening"


def masked_whiten(values, mask):
    """As verl writes it."""
    count = mask.sum()
    mean = (values * mask).sum() / count
    variance = ((values - mean).square() * mask).sum() / count * (count / (count - 1))
    return (values - mean) * torch.rsqrt(variance + 1e-8) * mask


def build_whiten():
    import rlkern

    with rlkern.use_backend("native"):
        rlkern.whiten(torch.zeros(2))
    return rlkern.whiten


class Whiten(Case):
    """Ragged sequences of advantages, half as long as the padding or longer."""

    operator = "whiten"
    contestants = (
        Contestant(WHITEN, "rlkern", build_whiten),
        Contestant(WHITEN, "eager", lambda: masked_whiten),
        Contestant(WHITEN, "torch.compile", lambda: torch.compile(masked_whiten, dynamic=False)),
    )
    #: The moments read everything once, before the first result can be written.
    bounds = {WHITEN: ("read", "copy")}
    tolerance = WHITEN_TOLERANCE

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
        """The worst value's distance from float64's, relative above 1."""
        exact = masked_whiten(self.values.double(), self.mask)
        return {"whitened": worst(outputs, exact)}


# ---- contests -----------------------------------------------------------------------------------


@pytest.mark.parametrize("contestant", [c.key for c in GroupAdvantages.contestants])
@pytest.mark.parametrize("cache", ("warm", "cold"))
def test_group_advantages(contest, quick, cache, contestant):
    shape = GROUP_QUICK_SHAPE if quick else GROUP_SHAPE
    contest(GroupAdvantages, shape | {"cache": cache}, contestant)


@pytest.mark.parametrize("contestant", [c.key for c in Whiten.contestants])
def test_whiten(contest, quick, contestant):
    contest(Whiten, WHITEN_QUICK_SHAPE if quick else WHITEN_SHAPE, contestant)

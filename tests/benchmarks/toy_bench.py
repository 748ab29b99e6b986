"""A case whose contestants fail in every way that the harness must survive."""

import pytest
import torch

from benchmarks.case import Case, Contestant, Floor, MemoryLimit

TEMPORARY_BYTES = 64 << 20


def right(x):
    return 2 * x


def wrong(x):
    return 2 * x + 1


def nan(x):
    return x * torch.nan


def in_place(x):
    return x.mul_(2)


def greedy(x):
    return 2 * x + torch.ones(TEMPORARY_BYTES // 4)[0] - 1


def raising(x):
    raise RuntimeError("cannot serve /some/where/this call")


def build_missing():
    import no_such_peer

    return no_such_peer


class Toy(Case):
    # By which its processes find it: some packages install a "tests" of their own.
    __module__ = "toy_bench"

    operator = "double"
    contestants = (
        Contestant("double", "rlkern in place", lambda: in_place),
        Contestant("double", "right", lambda: right),
        Contestant("double", "wrong", lambda: wrong),
        Contestant("double", "nan", lambda: nan),
        Contestant("double", "greedy", lambda: greedy),
        Contestant("double", "raising", lambda: raising),
        Contestant("double", "missing", build_missing),
    )
    bounds = {"double": ("read", "scale")}
    tolerance = 1e-6

    def __init__(self, size):
        self.pristine = torch.linspace(0, 1, size)
        self.bulk = self.pristine.clone()

    @staticmethod
    def floors(**params):
        return (
            Floor("double/rlkern in place", ("read", "scale"), 1e-9),
            Floor("double/rlkern in place", ("double/right",), 1e9),
            Floor("double/rlkern in place", ("double/missing",), 2),
            MemoryLimit("double/greedy", 0.01),
        )

    def prepare(self, task):
        self.bulk.copy_(self.pristine)
        return (self.bulk,)

    def errors(self, task, outputs):
        return {"double": (outputs - 2 * self.pristine.double()).abs().max().item()}


@pytest.mark.parametrize("contestant", [c.key for c in Toy.contestants])
def test_toy(contest, contestant):
    contest(Toy, {"size": 1 << 16}, contestant)

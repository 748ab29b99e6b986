"""Cases of which something breaks: a process, a later call, the judge, a contestant of ours."""

import os
import signal

import pytest
from toy_bench import Toy, in_place, right

from benchmarks.case import Contestant


def dies(x):
    os.kill(os.getpid(), signal.SIGSEGV)


class FailsLater:
    """Right three times: when it is compared, thrown away, and timed once."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        if self.calls > 3:
            raise RuntimeError(f"out of luck in /some/where/call {self.calls}")
        return 2 * x


class Breaking(Toy):
    __module__ = "toy_broken"  # as in toy_bench.py

    contestants = (
        Contestant("double", "rlkern in place", lambda: in_place),
        Contestant("double", "dies", lambda: dies),
        Contestant("double", "fails later", FailsLater),
        Contestant("double", "right", lambda: right),
    )

    @staticmethod
    def floors(**params):
        return ()


class Unjudged(Toy):
    __module__ = "toy_broken"

    def errors(self, task, outputs):
        raise ArithmeticError("the judge is broken")


def not_built(x):
    raise RuntimeError("backend 'native' was asked for, but cannot serve double: not built")


def wrong_call(x):
    raise TypeError("unexpected argument")


class Ours(Toy):
    __module__ = "toy_broken"

    contestants = (
        Contestant("double", "rlkern not built", lambda: not_built),
        Contestant("double", "rlkern wrong call", lambda: wrong_call),
        Contestant("double", "a peer's wrong call", lambda: wrong_call),
    )
    floors = Breaking.floors


@pytest.mark.parametrize("contestant", [c.key for c in Ours.contestants])
def test_ours(contest, contestant):
    contest(Ours, {"size": 64}, contestant)

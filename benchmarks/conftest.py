"""Runs the cases under pytest-benchmark.

The samples are taken in child processes, in turns; pytest-benchmark's own loop would run one
contestant after the other. It is given a clock that replays those samples, so its table, its
comparisons and `--benchmark-json` hold the real figures.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

import pytest

from benchmarks import machine, report
from benchmarks.measure import FULL, QUICK, measure

#: Summaries, or the error that prevented one, by operator and parameters.
CASES = pytest.StashKey[dict]()


class ReplayClock:
    """A timer that moves only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = ReplayClock()


def pytest_addoption(parser):
    group = parser.getgroup("rlkern benchmarks")
    group.addoption("--quick", action="store_true", help="small shapes, few samples: a smoke test")
    group.addoption("--check-floors", action="store_true", help="fail where a floor is missed")
    group.addoption("--results", type=Path, help="folder to write JSON and Markdown into")


def pytest_configure(config):
    if getattr(config.option, "numprocesses", None):
        raise pytest.UsageError("benchmarks need the machine to themselves: run pytest with -n 0")
    config.stash[CASES] = {}


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "contest" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=CLOCK))
            if config.pluginmanager.hasplugin("timeout"):
                # The first contestant of a case waits for the measurement of them all.
                item.add_marker(pytest.mark.timeout(0))


@pytest.fixture
def quick(request) -> bool:
    return request.config.option.quick


@pytest.fixture
def contest(request, benchmark, quick):
    """Measures a case, once however many contestants ask, and reports one contestant of it."""
    config = request.config
    reporter = config.pluginmanager.getplugin("terminalreporter")
    capture = config.pluginmanager.getplugin("capturemanager")

    def say(line):
        # A case takes minutes; its progress must not wait in pytest's capture.
        with capture.global_and_fixture_disabled():
            reporter.write_line(line)

    def summary_of(case, params):
        cases, name = config.stash[CASES], json.dumps([case.operator, params])
        if name not in cases:
            try:
                cases[name] = measure(case, params, QUICK if quick else FULL, say)
            except RuntimeError as error:
                cases[name] = error
        if isinstance(cases[name], RuntimeError):
            pytest.fail(str(cases[name]), pytrace=False)
        return cases[name]

    def run(case, params, key):
        summary = summary_of(case, params)
        entry = summary["entries"][key]
        ours = entry["name"].startswith("rlkern")
        strict = config.option.check_floors
        if entry["status"] != "ok":
            message = f"{key} {entry['status']}: {entry['reason']}"
            # A peer that does not run is a fact to report; a wrong result of ours is a bug.
            if ours and (strict or entry["status"] == "wrong"):
                pytest.fail(message, pytrace=False)
            pytest.skip(message)

        benchmark.group = " ".join([case.operator, *map(str, params.values()), entry["task"]])
        benchmark.extra_info |= entry | {"ceilings": summary["ceilings"]}
        floors = [floor for floor in summary["floors"] if floor["contestant"] == key]
        benchmark.extra_info["floors"] = floors
        medians = iter([median(samples) for samples in entry["samples"]])
        benchmark.pedantic(lambda: CLOCK.advance(next(medians)), rounds=summary["processes"])
        missed = [f"{f['text']}: {f['value']}" for f in floors if not f["met"]]
        if strict and missed:
            pytest.fail(f"{key} misses its floor: {'; '.join(missed)}", pytrace=False)

    return run


def pytest_terminal_summary(terminalreporter, config):
    summaries = [s for s in config.stash[CASES].values() if isinstance(s, dict)]
    if not summaries:
        return
    facts = machine.describe()
    terminalreporter.section("rlkern benchmarks")
    terminalreporter.write(report.render_all(summaries, facts))
    if config.option.results:
        report.write(config.option.results, summaries, facts)

"""Runs the cases under pytest-benchmark.

The samples are taken in child processes, in turns; pytest-benchmark's own loop would run one
contestant after the other. It is given a clock that replays those samples, so its table, its
comparisons and `--benchmark-json` hold the real figures.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from statistics import median

import pytest

from benchmarks import machine, report, store, sweeps, tables
from benchmarks.case import FULL, QUICK
from benchmarks.measure import BUSY_SECONDS, measure

#: Summaries, or the error that prevented one, by operator and parameters.
CASES = pytest.StashKey[dict]()
#: What was reported, by operator, parameters and contestant.
SEEN = pytest.StashKey[set]()
#: The machine, asked for once.
FACTS = pytest.StashKey[dict]()
#: What each sweep came to, in words.
SWEPT = pytest.StashKey[list]()
#: Cores that others keep busy: this is a fifth of the time of one, for which all threads of a call
#: then wait.
BUSY_CORES = 0.2
#: Guesses for what was never measured here: a process's imports and compiling, a sweep.
SETUP_SECONDS, SWEEP_SECONDS = 9, 16
#: How the reason begins for which ours cannot run here: nothing else excuses it.
NOT_BUILT = (
    "RuntimeError: backend 'native' was asked for, but cannot serve",
    "ModuleNotFoundError: No module named 'rlkern'",
)


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
    group.addoption(
        "--results",
        help="folder to write each case into as it is done; 'machine': benchmarks/results/ and "
        "this machine's name, or with --quick build/bench-quick",
    )
    group.addoption("--only", help="a,b: only bench_a.py and bench_b.py")


def pytest_configure(config):
    if getattr(config.option, "numprocesses", None):
        raise pytest.UsageError("benchmarks need the machine to themselves: run pytest with -n 0")
    config.stash[CASES], config.stash[SEEN] = {}, set()
    config.stash[FACTS], config.stash[SWEPT] = {}, []


def results_folder(config) -> Path | None:
    option = config.option.results
    if option != "machine":
        return Path(option) if option else None
    if config.option.quick:
        return machine.ROOT / "build" / "bench-quick"
    return store.RESULTS / machine.name()


def pytest_collection_modifyitems(config, items):
    if config.option.only:
        chosen = {f"bench_{name.strip()}.py" for name in config.option.only.split(",")}
        found = {item.path.name for item in items}
        if not chosen <= found:
            raise pytest.UsageError(
                f"--only: expected names of {', '.join(sorted(found))} between bench_ and .py, "
                f"got {config.option.only!r}"
            )
        config.hook.pytest_deselected(items=[i for i in items if i.path.name not in chosen])
        items[:] = [item for item in items if item.path.name in chosen]
    for item in items:
        if "contest" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=CLOCK))
            if config.pluginmanager.hasplugin("timeout"):
                # The first contestant of a case waits for the measurement of them all.
                item.add_marker(pytest.mark.timeout(0))


def pytest_report_collectionfinish(config, items):
    if config.option.quick or not items:
        return None
    kept = store.seconds_by_module(store.RESULTS / machine.name())
    known = sum(kept.get(stem, 0.0) for stem in {item.path.stem for item in items})
    guessed = sum(guessed_seconds([item for item in items if item.path.stem not in kept]))
    lines = [
        f"rlkern benchmarks: about {(known + guessed) / 60:.1f} minutes, {known / 60:.1f} of them "
        "as last time on this machine, the rest a guess; leave the machine alone meanwhile"
    ]
    share = machine.busy_share(BUSY_SECONDS)
    if is_busy([share]):
        lines.append(f"The processors are busy ({share:.0%}): the figures will say little.")
    return lines


def is_busy(shares) -> bool:
    """Whether the processors were too busy, with something else, for figures to say much."""
    cores = os.cpu_count() or 1
    return any(share is not None and share * cores > BUSY_CORES for share in shares)


def guessed_seconds(items):
    """Of each case among these tests, which are its contestants, and of each sweep."""
    cases: dict[str, list] = {}
    for item in items:
        params = dict(item.callspec.params) if hasattr(item, "callspec") else {}
        if "contestant" not in params:
            yield SWEEP_SECONDS
            continue
        del params["contestant"]
        cases.setdefault(f"{item.originalname} {params}", []).append(params.get("plan", FULL))
    for plans in cases.values():
        yield plans[0].processes * (SETUP_SECONDS + len(plans) * plans[0].seconds)


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

    def summary_of(case, params, plan):
        cases, name = config.stash[CASES], json.dumps([case.operator, params])
        if name not in cases:
            try:
                summary = cases[name] = measure(case, params, QUICK if quick else plan, say)
                if is_busy(summary["busy_before"]):
                    say(f"{case.operator} {params}: {tables.before(summary)}, by something else")
                if folder := results_folder(config):
                    store.keep(folder, cases[name], facts_of(config))
                    report.write_tables(folder, case.operator)
            except RuntimeError as error:
                cases[name] = error
        if isinstance(cases[name], RuntimeError):
            pytest.fail(str(cases[name]), pytrace=False)
        return cases[name]

    def run(case, params, key, plan=FULL):
        # With --quick the shapes beside the main one are the same small shape.
        seen = (case.operator, json.dumps(params), key)
        if seen in config.stash[SEEN]:
            pytest.skip("the same with --quick as another shape")
        config.stash[SEEN].add(seen)
        summary = summary_of(case, params, plan)
        entry = summary["entries"][key]
        ours = entry["name"].startswith("rlkern")
        strict = config.option.check_floors
        if entry["status"] != "ok":
            message = f"{key} {entry['status']}: {entry['reason']}"
            # A peer that does not run is a fact to report; ours is a bug.
            if ours and (strict or not entry["reason"].startswith(NOT_BUILT)):
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


@pytest.fixture
def run_sweep(request, quick):
    """Runs a sweep, keeps it where results are kept, and says what came of it."""
    config = request.config

    def run(operator, axis):
        sweep = sweeps.measure(operator, axis, quick)
        facts = facts_of(config)
        if folder := results_folder(config):
            sweeps.keep(folder, sweep, facts)
        for name in (n for n in sweep["points"][0]["seconds"] if n.startswith("rlkern")):
            lines = sweeps.sentences(sweep | {"machine": facts}, name)
            config.stash[SWEPT].append(" ".join([f"{sweep['title']}, {lines[0]}", *lines[1:]]))
        return sweep

    return run


def facts_of(config) -> dict:
    """Machine, versions, date and commit, asked for once a session."""
    if "machine" not in config.stash[FACTS]:
        config.stash[FACTS]["machine"] = machine.describe()
    return config.stash[FACTS]["machine"]


def pytest_terminal_summary(terminalreporter, config):
    summaries = [s for s in config.stash[CASES].values() if isinstance(s, dict)]
    if config.stash[SWEPT]:
        terminalreporter.section("rlkern scaling")
        for line in config.stash[SWEPT]:
            terminalreporter.write_line(line)
    if not summaries:
        return
    facts = facts_of(config)
    terminalreporter.section("rlkern benchmarks")
    terminalreporter.write(tables.render([s | {"machine": facts} for s in summaries]))


def pytest_sessionfinish(session):
    folder = results_folder(session.config)
    if folder and folder.is_dir():
        report.write_folder(folder)

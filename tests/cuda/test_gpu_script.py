"""gpu.sh in a dry run: its stages, its files and its table, where there is no GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from emulated_kernels import ROOT

from benchmarks.gpu import registry
from benchmarks.gpu import run as runner
from rlkern import _native

SCRIPT = ROOT / "benchmarks/gpu.sh"

pytestmark = [
    pytest.mark.skipif(shutil.which("bash") is None, reason="bash was not found"),
    pytest.mark.skipif(
        bool(_native.problems["cpu"]), reason="_C, which a dry run times, is absent"
    ),
]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": sys.executable} | environment,
    )


def test_dry_run(tmp_path):
    done = run(str(tmp_path), "--dry-run")
    assert done.returncode == 0, done.stderr
    files = sorted(path.name for path in tmp_path.iterdir())
    assert len(files) <= 8 and {"results.json", "summary.txt", "stages.tsv"} <= set(files), files
    stages = dict(line.split("\t")[:2] for line in (tmp_path / "stages.tsv").open())
    wanted = {"build": "skipped: a dry run", "tests": "ok", "sanitizer": "ok", "bench": "ok"}
    assert stages == wanted, (tmp_path / "bench.log").read_text()
    results = json.loads((tmp_path / "results.json").read_text())
    assert all(value > 0 for value in results["ceilings"].values())
    entries = results["entries"]
    native = {k: e for k, e in entries.items() if k.endswith("rlkern native")}
    wanted = {
        runner.key(case, contestant)
        for case in registry.discover()
        for contestant in case.contestants
        if contestant.name == "rlkern native"
    }
    assert native.keys() == wanted and all(e["status"] == "ok" for e in native.values()), native
    for entry in entries.values():
        assert ("seconds" in entry) == (entry["status"] == "ok")
        assert entry["status"] == "ok" or entry["reason"]
    table = (tmp_path / "summary.txt").read_text()
    assert "a dry run" in table and done.stdout.endswith(table)
    assert "fast" not in table, "nothing is fast where nothing was measured on a GPU"


def test_a_stage_that_fails_leaves_the_rest_to_run(tmp_path):
    """A Python without torch fails every stage, and the script still ends in its table."""
    shim = tmp_path / "python"
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "$@"\n')
    shim.chmod(0o755)
    out = tmp_path / "out"
    done = run(str(out), "--dry-run", PYTHON=str(shim), PYTHONPATH="")
    stages = dict(line.split("\t")[:2] for line in (out / "stages.tsv").open())
    assert done.returncode == 0 and list(stages) == ["build", "tests", "sanitizer", "bench"]
    assert all(stages[name].startswith("failed") for name in ("tests", "sanitizer", "bench"))
    assert "no benchmark results" in (out / "summary.txt").read_text()


def stand_ins(tmp_path, python):
    """A folder for PATH whose programs note how they are called; `python` says what Python does."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, does in {
        "python": python,
        "compute-sanitizer": "exit 0",
        "nvcc": "",
        "git": "",
    }.items():
        program = folder / name
        program.write_text(f'#!/bin/bash\necho "{name} $*" >> "{tmp_path}/calls"\n{does}\n')
        program.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": str(folder / "python")}


SUMMARY = f'[[ $* == *summary* ]] && exec "{sys.executable}" "$@"\n'


def test_a_whole_run_starts_every_stage_and_leaves_eight_files(tmp_path):
    out = tmp_path / "out"
    rates = ("copy", "read", "in_place")
    ceilings = {f"{name}_bytes_per_second": 1.0 for name in rates} | {"bf16_flop_per_second": 1.0}
    results = {"about": {"device": "cuda", "date": ""}, "ceilings": ceilings, "entries": {}}
    (tmp_path / "results").write_text(json.dumps(results))
    bench = f'[[ $* == *gpu.run* ]] && cp "{tmp_path}/results" "{out}/results.json"\n'
    done = run(str(out), **stand_ins(tmp_path, f"{SUMMARY}{bench}exit 0"))
    assert len(list(out.iterdir())) == 8, sorted(out.iterdir())
    stages = dict(line.split("\t")[:2] for line in (out / "stages.tsv").open())
    assert stages == dict.fromkeys(("build", "tests", "sanitizer", "bench"), "ok"), done.stderr
    calls = (tmp_path / "calls").read_text()
    assert "python setup.py build_ext --inplace" in calls
    assert "python -m pytest tests -m gpu" in calls
    for tool in ("memcheck", "racecheck"):
        assert f"compute-sanitizer --tool {tool} " in calls
    assert "python -m benchmarks.gpu.run" in calls and "--device cuda" in calls


def test_every_stage_runs_although_each_fails(tmp_path):
    out = tmp_path / "out"
    run(str(out), **stand_ins(tmp_path, f"{SUMMARY}exit 1"))
    stages = dict(line.split("\t")[:2] for line in (out / "stages.tsv").open())
    assert stages.pop("sanitizer") == "ok"
    assert stages == {n: f"failed, see {n}.log" for n in ("build", "tests", "bench")}


def test_stages_that_hang_are_stopped_within_the_limit(tmp_path):
    out = tmp_path / "out"
    hangs = f"{SUMMARY}[[ $* == *setup.py* ]] && sleep 60\nexit 0"
    begin = time.monotonic()
    done = run(str(out), GPU_SH_SECONDS="12", **stand_ins(tmp_path, hangs))
    assert time.monotonic() - begin < 30
    stages = dict(line.split("\t")[:2] for line in (out / "stages.tsv").open())
    assert stages.pop("build").startswith("stopped after")
    assert set(stages.values()) == {"skipped: no time left"} and len(stages) == 3
    assert "no benchmark results" in done.stdout


def test_usage(tmp_path):
    for arguments in ((), ("--dry-run",), (str(tmp_path / "out"), "--wet-run")):
        done = run(*arguments)
        assert done.returncode == 2 and "gpu.sh OUT" in done.stderr
    assert not (tmp_path / "out").exists()


def test_verdicts():
    from benchmarks.gpu import summary

    entry = {
        "status": "ok",
        "name": "rlkern native",
        "target": 0.9,
        "bytes_moved": 95,
        "seconds": 1,
    }

    def said(entry, copy=100.0, product=1.0):
        ceilings = {"copy_bytes_per_second": copy, "bf16_flop_per_second": product}
        return summary.verdict(entry, ceilings, True)

    assert said(entry) == "correct, fast (at least 90% of copy)"
    assert said(entry, copy=200.0) == "correct (not fast: 90% of copy was promised)"
    products = entry | {"flop": 19, "bytes_moved": 0}
    assert said(products, product=20.0) == "correct, fast (at least 90% of product)"
    assert said(products, product=30.0).startswith("correct (not fast: 90% of product")
    wrong = {"status": "wrong", "name": "rlkern native", "reason": "logprob 1 > 0.1"}
    assert said(wrong) == "neither: logprob 1 > 0.1"
    absent = {"status": "skipped", "name": "QuACK", "reason": "not installed"}
    assert said(absent) == "left out: not installed"


@pytest.mark.parametrize("text", ["{}", '{"entries": {}}', "[]", "{"])
def test_a_table_without_results_says_so(tmp_path, monkeypatch, capsys, text):
    from benchmarks.gpu import summary

    (tmp_path / "results.json").write_text(text)
    monkeypatch.setattr(sys, "argv", ["summary", str(tmp_path)])
    summary.main()
    assert "no benchmark results: " in capsys.readouterr().out


@pytest.fixture
def contestants(tmp_path, monkeypatch):
    """Makes the children measure contestants that are given as Python text."""
    case = tmp_path / "benchmarks_gpu_stub.py"
    real = subprocess.Popen

    def child(command, **options):
        return real([command[0], str(case), *command[3:]], **options)

    def prepare(**builds):
        listed = "".join(
            f"registry.Contestant('forward', {name!r}, {build}), " for name, build in builds.items()
        )
        case.write_text(
            "import os, sys, time\n"
            "from benchmarks.gpu import registry, run\n"
            "from benchmarks.gpu.bench_token_logprobs import TokenLogprobs, eager\n"
            "class Case(TokenLogprobs):\n"
            f"    contestants = ({listed})\n"
            "registry.discover = lambda: [Case]\n"
            "run.main()\n"
        )
        monkeypatch.setattr(runner.subprocess, "Popen", child)
        return runner

    return prepare


def test_a_contestant_that_kills_its_process_leaves_the_rest_to_be_measured(tmp_path, contestants):
    """As an illegal access does on a GPU."""
    runner = contestants(dies="lambda: os._exit(9)", lives="lambda: eager")
    entries = runner.supervise(tmp_path, "cpu", True, 120)["entries"]
    assert entries["token_logprobs/forward/dies"]["reason"] == "its process ended with 9"
    assert entries["token_logprobs/forward/lives"]["status"] == "ok"


def test_a_contestant_that_hangs_leaves_the_rest_to_be_measured(tmp_path, contestants):
    runner = contestants(hangs="lambda: time.sleep(90)", lives="lambda: eager")
    entries = runner.supervise(tmp_path, "cpu", True, 120, each=8)["entries"]
    assert entries["token_logprobs/forward/hangs"]["reason"] == "it took longer than 8 s"
    assert entries["token_logprobs/forward/lives"]["status"] == "ok"


def test_the_time_for_everything_holds_while_nothing_is_printed(tmp_path, contestants):
    runner = contestants(hangs="lambda: time.sleep(90)")
    begin = time.monotonic()
    results = runner.supervise(tmp_path, "cpu", True, 15)
    assert time.monotonic() - begin < 60
    assert results["stopped"].startswith("the time was spent") and not results["entries"]

"""The benchmark files under pytest, as a user runs them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_return_scan
from benchmarks.bench_return_scan import ReturnScans, build_loop
from benchmarks.bench_token_logprobs import BACKWARD, FORWARD, QUICK_SHAPE, TokenLogprobs, eager

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def run_pytest(*arguments):
    path = os.pathsep.join([*filter(None, sys.path), str(ROOT), str(HERE)])
    # A pytest that takes itself for a worker of xdist writes no benchmark file.
    env = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, arguments)],
        cwd=ROOT,
        env=env | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


def rows(text, heading):
    """The rows of the Markdown table that starts with this heading, by their first cell."""
    lines = iter(text.splitlines())
    first = next(line for line in lines if line.startswith(f"| {heading} "))
    header = [cell.strip() for cell in first.split("|")]
    next(lines)
    table = {}
    for line in lines:
        if not line.startswith("|"):
            break
        found = [cell.strip() for cell in line.split("|")]
        table[found[1]] = dict(zip(header[1:-1], found[1:-1], strict=False))
    return table


def test_quick_token_logprobs(tmp_path):
    file, data = ROOT / "benchmarks" / "bench_token_logprobs.py", tmp_path / "pytest.json"
    results = tmp_path / "results"
    run = run_pytest(
        file, "--quick", "-k", "float32", "--results", results, f"--benchmark-json={data}"
    )
    assert run.returncode == 0, run.stdout + run.stderr

    for task in (FORWARD, BACKWARD):
        table = rows(run.stdout, task)
        assert list(table) == [c.name for c in TokenLogprobs.contestants if c.task == task]
        assert float(table["eager"]["x eager"]) == 1
        for row in table.values():
            assert "[" in row["ms"] or row["ms"].startswith("skipped: "), row
    assert "No floor is promised" in run.stdout

    kept = json.loads((results / "token_logprobs.json").read_text())
    (case,) = kept["cases"]
    assert case["machine"]["versions"]["torch"] == torch.__version__
    assert case["entries"]["forward/eager"]["samples"]
    for text in ((results / "token_logprobs.md").read_text(), json.dumps(kept)):
        assert str(ROOT) not in text and str(tmp_path) not in text
    eager_runs = [b for b in json.loads(data.read_text())["benchmarks"] if "eager" in b["name"]]
    assert len(eager_runs) == 2
    for one in eager_runs:
        info = one["extra_info"]
        assert one["stats"]["median"] == pytest.approx(info["seconds"]["median"])
        assert info["errors"] and "extra_share" in info and "ceilings" in info


def test_quick_return_scan():
    run = run_pytest(ROOT / "benchmarks" / "bench_return_scan.py", "--quick")
    assert run.returncode == 0, run.stdout + run.stderr
    for task in ReturnScans.bounds:
        table = rows(run.stdout, task)
        assert list(table) == [c.name for c in ReturnScans.contestants if c.task == task]
        assert float(table["PyTorch loop"]["x PyTorch loop"]) == 1


def test_only_some_files_and_how_long_they_take():
    run = run_pytest("benchmarks", "--only", "whiten,kl_penalty", "--collect-only", "-q")
    files = {line.split("::")[0] for line in run.stdout.splitlines() if "::" in line}
    assert files == {"benchmarks/bench_whiten.py", "benchmarks/bench_kl_penalty.py"}
    run = run_pytest("benchmarks", "--only", "whiten", "--collect-only")
    said = re.search(r"rlkern benchmarks: about ([\d.]+) minutes", run.stdout)
    assert said and 0 < float(said.group(1)) < 10
    run = run_pytest("benchmarks", "--only", "no_such_file", "--collect-only")
    assert run.returncode != 0 and "got 'no_such_file'" in run.stderr


class TestReturnScanErrors:
    @pytest.mark.parametrize("task", list(ReturnScans.bounds))
    def test_each_result_is_looked_at(self, task):
        case = ReturnScans(**bench_return_scan.QUICK_SHAPE)
        right = build_loop(task)(*case.prepare(task))
        assert max(case.errors(task, right).values()) < case.tolerance
        for i in range(len(right)):
            wrong = [x.clone() for x in right]
            wrong[i][1, 7] += 1
            assert max(case.errors(task, wrong).values()) > 100 * case.tolerance
            wrong[i][1, 7] = torch.nan
            errors = case.errors(task, wrong).values()
            assert not all(error <= case.tolerance for error in errors)


@pytest.mark.parametrize("strict", [False, True])
def test_a_missed_floor_fails_only_where_asked(strict):
    options = ["--check-floors"] if strict else []
    run = run_pytest(HERE / "toy_bench.py", "-p", "benchmarks.conftest", "--quick", *options)
    assert run.returncode == strict, run.stdout + run.stderr
    assert "wrong: error double 1.0e+00" in run.stdout
    assert "skipped: ModuleNotFoundError: No module named 'no_such_peer'" in run.stdout
    assert ("misses its floor: 1e+09 times as fast as right" in run.stdout) == strict
    assert len(rows(run.stdout, "floor")) == 2


def test_ours_may_be_absent_but_not_fail():
    run = run_pytest(HERE / "toy_broken.py", "-p", "benchmarks.conftest", "--quick", "-rs")
    assert "1 failed, 2 skipped" in run.stdout, run.stdout + run.stderr
    assert "double/rlkern wrong call skipped: TypeError: unexpected argument" in run.stdout
    assert "SKIPPED" in run.stdout and "cannot serve double: not built" in run.stdout


class TestTokenLogprobsErrors:
    @pytest.fixture
    def case(self):
        return TokenLogprobs(**QUICK_SHAPE, dtype="float32")

    def outputs(self, case):
        logits, token_ids, upstream = case.prepare(BACKWARD)
        assert not logits.is_leaf and logits.data_ptr() == case.bulk.data_ptr()
        logprobs = eager(logits, token_ids)
        return logprobs.detach(), *torch.autograd.grad(logprobs, logits, upstream)

    def test_right_ones_pass(self, case):
        assert max(case.errors(BACKWARD, self.outputs(case)).values()) < 1e-5

    def test_each_output_is_looked_at(self, case):
        logprobs, gradient = self.outputs(case)
        only_target = torch.zeros_like(gradient)
        at = case.token_ids.unsqueeze(-1)
        only_target.scatter_(-1, at, gradient.gather(-1, at))
        assert case.errors(BACKWARD, (logprobs, only_target))["rest"] == pytest.approx(1)
        assert case.errors(BACKWARD, (logprobs, gradient - only_target))["target"] > 0.1
        assert case.errors(FORWARD, logprobs + 1)["logprob"] > 0.05

    def test_one_nan_is_enough(self, case):
        logprobs, gradient = self.outputs(case)
        gradient[0, 0, 5] = torch.nan
        errors = case.errors(BACKWARD, (logprobs, gradient))
        assert errors["rest"] != errors["rest"]

"""The log: whole records, one run in one file, and clear words where it cannot be written."""

from __future__ import annotations

import json
import math
import resource
import sys
import types
from dataclasses import dataclass

import pytest
import torch
from rlkern_loops.errors import LogError
from rlkern_loops.log import RunLog
from rlkern_loops.plots import plot_curves


@dataclass(frozen=True)
class Options:
    learning_rate: float = 0.1
    name: str = "run"


def read(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = path.read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def steps(log, *numbers):
    for number in numbers:
        log.step(number, {"rollout/reward": number / 10, "losses/policy_loss": -0.5})


def test_records_are_there_as_soon_as_they_are_written(tmp_path):
    log = RunLog(tmp_path / "a" / "run", Options())
    log.write({"phase": "warm start", "step": 1, "loss": 2.0})
    log.step(1, {"rollout/reward": torch.tensor(0.5), "losses/explained_variance": math.nan})
    assert read(log.path) == [
        {"phase": "config", "learning_rate": 0.1, "name": "run"},
        {"phase": "warm start", "step": 1, "loss": 2.0},
        {"phase": "train", "step": 1, "rollout/reward": 0.5, "losses/explained_variance": None},
    ]
    assert len(log.records) == 3
    # Another run in the same folder replaces it.
    assert len(read(RunLog(tmp_path / "a" / "run", Options()).path)) == 1


def test_a_resumed_run_reads_as_one(tmp_path):
    whole = RunLog(tmp_path / "whole", Options())
    stopped = RunLog(tmp_path / "stopped", Options())
    for log in (whole, stopped):
        log.write({"phase": "warm start", "step": 300, "loss": 2.0})
        for number in (1, 2, 3, 4):
            steps(log, number)
            log.samples(number, ["p"], [f"c{number}"], [1.0])
    with stopped.path.open("a") as file:
        file.write('{"phase": "train", "step": 5, "rollout/rew')  # a kill in the middle of a line
    resumed = RunLog(tmp_path / "stopped", Options(), resumed_step=2)
    for number in (3, 4):
        steps(resumed, number)
        resumed.samples(number, ["p"], [f"c{number}"], [1.0])
    assert read(resumed.path) == read(whole.path) == resumed.records
    assert read(resumed.samples_path) == read(whole.samples_path)


def test_a_finished_run_that_goes_on_has_its_new_options_and_one_result(tmp_path):
    log = RunLog(tmp_path, Options())
    steps(log, 1, 2)
    log.write({"phase": "result", "accuracy": 0.1})
    log = RunLog(tmp_path, Options(learning_rate=0.2), resumed_step=2)
    steps(log, 3)
    phases = [record["phase"] for record in read(log.path)]
    assert phases == ["config", "train", "train", "train"]
    assert read(log.path)[0]["learning_rate"] == 0.2


def test_the_console_has_one_row_a_step_under_a_heading(tmp_path, capsys):
    log = RunLog(tmp_path, Options(), print_every=2, total_steps=5)
    for number in (1, 2, 3, 4, 5):
        metrics = {"rollout/reward": number / 10, "losses/policy_loss": -0.5, "other/metric": 7.0}
        if number == 3:
            metrics["eval/accuracy"] = 0.75
        log.step(number, metrics)
    lines = capsys.readouterr().out.splitlines()
    # Every second one, the last, and whatever was evaluated, which gets a column with the first.
    assert [line.split()[0] for line in lines] == ["step", "2", "step", "3", "4", "5"]
    assert lines[0].split() == ["step", "reward", "loss"]
    assert lines[2].split() == ["step", "reward", "accuracy", "loss"]
    assert lines[3].split() == ["3", "0.300", "0.750", "-0.5000"]
    for part in (lines[:2], lines[2:]):
        assert len(set(map(len, part))) == 1, "columns that do not stand under each other"


def test_samples_are_shown_as_they_are(tmp_path, capsys):
    log = RunLog(tmp_path, Options())
    completion = "[bold]no markup[/bold] :smile: " + "x" * 200
    log.samples(3, ["p[0]", "q"], [completion, "second"], torch.tensor([1.0, 0.0]))
    out = capsys.readouterr().out
    assert f"step 3, reward 1.000: p[0]{completion}\n" == out
    log.samples(4, ["p"], ["a" + "x" * 5000 + "z"], [0.0])
    out = capsys.readouterr().out
    assert len(out) < 1100 and "pax" in out and "xz" in out and " ... " in out
    assert len(read(log.samples_path)[2]["completion"]) == 5002
    assert read(log.samples_path)[1] == {
        "step": 3, "prompt": "q", "completion": "second", "reward": 0.0,
    }  # fmt: skip


def test_progress_is_a_bar_only_at_a_terminal(tmp_path, capsys, monkeypatch):
    log = RunLog(tmp_path, Options(), total_steps=4, resumed_step=1)
    assert list(log.progress(range(2, 5))) == [2, 3, 4]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for number in log.progress(range(2, 5)):
        steps(log, number)
    captured = capsys.readouterr()
    assert "4/4" in captured.err and "0.400" in captured.out


def test_curves_are_drawn(tmp_path):
    log = RunLog(tmp_path, Options())
    for number in range(1, 6):
        log.step(number, {"rollout/reward": 0.1 * number, "losses/kl": math.nan})
    log.close()
    whole = (tmp_path / "curves.png").read_bytes()
    assert whole.startswith(b"\x89PNG")
    from matplotlib import image

    picture = image.imread(tmp_path / "curves.png")
    assert picture.shape[1] < 2 * picture.shape[0], "a panel of nothing but NaN was drawn"
    plot_curves([r | {"rollout/reward": 1.0} for r in log.records], tmp_path / "other.png")
    assert (tmp_path / "other.png").read_bytes() != whole
    plot_curves([], tmp_path / "empty.png")
    left = {"curves.png", "other.png", "empty.png", "metrics.jsonl"}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_curves_have_a_panel_each_in_two_rows_under_the_runs_name(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(
        Figure, "savefig", lambda self, path, **_: drawn.append(self) or path.touch()
    )
    losses = ("policy_loss", "value_loss", "explained_variance", "kl", "kl_coef", "entropy")
    names = ["rollout/reward", "eval/accuracy", *(f"losses/{name}" for name in losses)]
    records = [{"phase": "train", "step": s} | dict.fromkeys(names, s * 1.5) for s in (1, 2, 3)]
    plot_curves(records, tmp_path / "curves.png", "cost $1 to_2$")
    (figure,) = drawn
    figure.draw_without_rendering()
    assert figure.get_suptitle() == "cost $1 to_2$"
    assert [axis.get_title() for axis in figure.axes] == names
    assert figure.axes[0].get_gridspec().get_geometry() == (2, 4)
    for axis in figure.axes:
        (line,) = axis.lines
        assert line.get_ydata() == pytest.approx([1.5, 3.0, 4.5])
        assert all(tick == int(tick) for tick in axis.get_xticks())


# ---- what cannot be written ---------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LogError, match=r"cannot write the log in .*file/run: Not a directory"):
        RunLog(tmp_path / "file" / "run", Options())


def test_a_full_disk_is_named(tmp_path):
    log = RunLog(tmp_path, Options())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 20, hard))
    try:
        with pytest.raises(LogError, match=r"cannot write .*metrics.jsonl: File too large"):
            steps(log, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    # What is left of the line does not stand in the way of going on.
    log = RunLog(tmp_path, Options(), resumed_step=0)
    steps(log, 1)
    assert [record["phase"] for record in read(log.path)] == ["config", "train"]


# ---- trackers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_an_error_at_the_start(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(LogError, match=f"{name} is not installed: pip install {name}"):
        RunLog(tmp_path / "run", Options(), report_to=[name])
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_named(tmp_path):
    with pytest.raises(LogError, match=r"no tracker 'wandbb' \(did you mean 'wandb'\?\)"):
        RunLog(tmp_path, Options(), report_to=["wandbb"])


def test_a_service_that_does_not_start_is_an_error(tmp_path, monkeypatch):
    def refuse(**options):
        raise ValueError("no API key")

    module = types.ModuleType("wandb")
    module.init = refuse
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(LogError, match="report_to: wandb does not start: no API key"):
        RunLog(tmp_path, Options(), report_to=["wandb"])


def test_a_service_that_fails_later_costs_no_run(tmp_path, monkeypatch):
    class Run:
        def log(self, metrics, step):
            if step == 2:
                raise ConnectionError("gone")
            assert step == 1

    module = types.ModuleType("wandb")
    module.init = lambda **options: Run()
    monkeypatch.setitem(sys.modules, "wandb", module)
    log = RunLog(tmp_path, Options(), report_to=["wandb"])
    with pytest.warns(RuntimeWarning, match="wandb gets no more metrics, .*jsonl has .*: gone"):
        steps(log, 1, 2)
    steps(log, 3)
    log.close()
    assert [record["step"] for record in read(log.path)[1:]] == [1, 2, 3]


def test_tensorboard_has_the_metrics_of_one_run(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, Options(), report_to=["tensorboard"])
    steps(log, 1, 2, 3)
    log.close()
    log = RunLog(tmp_path, Options(), report_to=["tensorboard"], resumed_step=1)
    log.step(2, {"rollout/reward": 0.9})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(event.step, round(event.value, 6)) for event in events.Scalars("rollout/reward")]
    assert found == [(1, 0.1), (2, 0.9)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_gets_every_step_and_knows_a_resumed_run(tmp_path, monkeypatch, name):
    """Against a stand-in with the two calls that are made of either package."""
    started, logged = [], []

    class Run:
        log = staticmethod(lambda metrics, step: logged.append((step, metrics["rollout/reward"])))
        finish = staticmethod(lambda: logged.append("finished"))

    module = types.ModuleType(name)
    module.init = lambda **options: started.append(options) or Run()
    monkeypatch.setitem(sys.modules, name, module)
    log = RunLog(tmp_path, Options(), report_to=[name])
    steps(log, 1, 2)
    log.close()
    RunLog(tmp_path, Options(), report_to=[name], resumed_step=2)
    RunLog(tmp_path, Options(), report_to=[name])
    assert logged == [(1, 0.1), (2, 0.2), "finished"]
    first, resumed, other = [run["id" if name == "wandb" else "name"] for run in started]
    assert first == resumed != other
    assert all(run["config"] == {"learning_rate": 0.1, "name": "run"} for run in started)

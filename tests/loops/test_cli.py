"""The command as a new user meets it: help, files, slips of the pen and what comes of them."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from rlkern_loops import checkpoint, cli, data, errors, rewards, trackers

import rlkern

ROOT = Path(__file__).resolve().parents[2]


def option(default, text):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TinyConfig:
    """Options of a loop that is none."""

    learning_rate: float = option(1e-3, "Of AdamW.")
    group_size: int = option(8, "Completions per prompt, at least 2.")
    reward: str = option("numeric", "What judges completions.")
    whiten: bool = option(True, "Whiten the advantages.")
    scale: Literal["std", "none"] = option("std", "What the advantages are divided by.")
    limit: int | None = option(None, "At most this many examples.")
    report_to: list[str] = field(default_factory=list, metadata={"help": "Trackers."})

    def __post_init__(self):
        if self.group_size < 2:
            raise ValueError(f"group_size: expected at least 2, got {self.group_size}")


@dataclass(frozen=True)
class NeedsConfig:
    """Options of which one has no default."""

    dataset: str = field(metadata={"help": "Where the examples are."})


def parse(*arguments, of=TinyConfig):
    return cli.parse_config(of, arguments, "rlkern train tiny")


def refused(*arguments, of=TinyConfig):
    with pytest.raises(cli.UsageError) as error:
        parse(*arguments, of=of)
    return str(error.value)


@pytest.fixture
def file(tmp_path):
    def write(text):
        (tmp_path / "run.yaml").write_text(text)
        return "--config", str(tmp_path / "run.yaml")

    return write


# ---- options ------------------------------------------------------------------------------------


def test_options_in_either_spelling():
    assert parse() == TinyConfig()
    config = parse(
        "--learning-rate", "1e-6", "--group_size=4", "--no-whiten", "--report-to", "a", "b"
    )
    assert config == TinyConfig(1e-6, 4, whiten=False, report_to=["a", "b"])
    assert parse("--whiten", "false", "--limit", "3", "--scale", "none").limit == 3
    assert parse("--learning-rate", "-1").learning_rate == -1


def test_the_command_line_beats_the_file(file):
    text = "learning-rate: 1e-6\ngroup_size: 4\nwhiten: no\nlimit: null\nreport_to: [a, b]\n"
    expected = TinyConfig(1e-6, 4, whiten=False, report_to=["a", "b"])
    assert parse(*file(text)) == expected
    given = parse("--group-size", "6", *file(text), "--whiten", "--report-to", "c")
    assert given == TinyConfig(1e-6, 6, report_to=["c"])
    assert parse(*file("")) == TinyConfig()
    assert parse(*file("report_to: a\nreward: 'no'\n")) == TinyConfig(reward="no", report_to=["a"])
    assert parse(*file("dataset: x"), of=NeedsConfig) == NeedsConfig("x")


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["--learning-rat", "1"], "unknown option '--learning-rat' (did you mean '--learning-rat"),
        (["--group_sise=4"], "unknown option '--group_sise' (did you mean '--group-size'?)"),
        (["--zzz"], "unknown option '--zzz'"),
        (["--critic", "shared"], "unknown option '--critic' (an option of ppo)"),
        (["--group", "4"], "unknown option '--group'"),
        (["stray"], "unexpected argument 'stray'"),
        (["--group-size", "many"], "--group-size: invalid int value: 'many'"),
        (["--group-size", "2.5"], "--group-size: invalid int value: '2.5'"),
        (["--group-size"], "--group-size: expected one argument"),
        (["--scale", "max"], "--scale: invalid choice: 'max'"),
        (["--whiten", "perhaps"], "--whiten: "),
        (["--group-size", "1"], "group_size: expected at least 2, got 1"),
        (["--config"], "--config: expected one argument"),
        (["--config", "/nowhere.yaml"], "config: cannot read /nowhere.yaml: No such file"),
    ],
)  # fmt: skip
def test_a_slip_on_the_command_line_is_named(arguments, said):
    assert refused(*arguments).startswith(said)


def test_a_required_option_is_asked_for():
    assert "--dataset" in refused(of=NeedsConfig)


@pytest.mark.parametrize(
    "text,said",
    [
        ("learnin_rate: 1", "unknown option 'learnin_rate' (did you mean 'learning_rate'?)"),
        ("config: other.yaml", "config: expected on the command line alone, got 'other.yaml'"),
        ("grpo: {group_size: 2}", "unknown option 'grpo'; options stand side by side, in no group"),
        ("group_size: {a: 1}", "group_size: expected int, got a mapping {'a': 1}"),
        ("lam: 0.9", "unknown option 'lam' (an option of ppo)"),
        ("1: 2", "unknown option 1"),
        ("group_size: many", "group_size: expected int, got str 'many'"),
        ("group_size: true", "group_size: expected int, got bool True"),
        ("group_size: 2.5", "group_size: expected int, got float 2.5"),
        ("group_size: null", "group_size: expected int, got NoneType None"),
        ("group_size: [2]", "group_size: expected int, got list [2]"),
        ("reward: no", "reward: expected text, got bool False"),
        ("whiten: perhaps", "whiten: expected bool, got str 'perhaps'"),
        ("scale: max", "scale: expected std|none, got 'max'"),
        ("report_to: [{a: 1}]", "report_to: expected text, got a mapping"),
        ("- a\n- b", "expected options in"),
        ("group_size: [1", "is not YAML: while parsing"),
        ("group_size: 1", "group_size: expected at least 2, got 1"),
    ],
)
def test_a_slip_in_the_file_is_named(file, text, said):
    message = refused(*file(text))
    assert said in message and "\n" not in message
    assert "run.yaml" in message or "at least" in said


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as ended:
        parse("--help")
    said = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    for text in (
        "--learning-rate float Of AdamW. (default: 0.001)", "--scale std|none", "--limit int",
        "--no-whiten", "--config text YAML file of options",
    ):  # fmt: skip
        assert text in said
    assert "--learning_rate" not in said


# ---- what a run comes to ------------------------------------------------------------------------


def finished(train, *arguments):
    return cli.run(TinyConfig, train, arguments, "rlkern train tiny")


def test_a_run_gets_its_options(capsys):
    seen = []
    assert finished(seen.append, "--group-size", "4") == 0
    assert seen == [TinyConfig(group_size=4)] and capsys.readouterr().err == ""


def fail_in_data(config):
    data.load_examples("/x.jsonl", split="train", prompt_column="p", answer_column="a")


def fail_in_reward(config):
    rewards.load_reward(config.reward)(["p"], ["c"], ["no number"], [True])


def fail_in_checkpoint(config):
    checkpoint.resume("/", "/step-000001.pt")


def fail_in_training(config):
    raise errors.RunError("step 3: the loss is nan")


@pytest.mark.parametrize(
    "train,said",
    [
        (fail_in_data, "dataset '/x.jsonl': cannot be read"),
        (fail_in_reward, "reward 'numeric' raised ValueError: answer: expected"),
        (fail_in_checkpoint, "checkpoint /step-000001.pt: no such file"),
        (fail_in_training, "step 3: the loss is nan"),
    ],
)
def test_what_ends_a_run_is_one_line(train, said, capsys):
    assert finished(train) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"rlkern train tiny: error: {said}") and err.count("\n") == 1


def test_wrong_options_and_interrupts_have_their_codes(capsys):
    assert finished(fail_in_training, "--group-size", "1") == 2
    assert "group_size: expected at least 2, got 1 (see rlkern train tiny --help)" in (
        capsys.readouterr().err
    )

    def interrupt(config):
        raise KeyboardInterrupt

    assert finished(interrupt) == 130


def test_a_mistake_in_the_code_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        finished(lambda config: 1 / 0)


# ---- the documentation ---------------------------------------------------------------------------


def blocks(language):
    text = (ROOT / "docs" / "loops.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_the_commands_of_the_documentation_parse(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # The trackers that it asks for are not what is tested.
    monkeypatch.setattr(trackers, "check_installed", lambda names: None)
    (text,) = blocks("yaml")
    (tmp_path / "run.yaml").write_text(text)
    commands = [line for block in blocks("sh") for line in block.replace("\\\n", "").splitlines()]
    trained = [line for line in commands if line.startswith("rlkern train ")]
    for line in trained:
        _, _, loop, *arguments = shlex.split(line, comments=True)
        module, name = cli.LOOPS[loop]
        config = getattr(importlib.import_module(module), name)
        assert cli.parse_config(config, arguments, line)
    assert trained


def test_the_reward_of_the_documentation_runs(tmp_path, monkeypatch):
    (text,) = (block for block in blocks("python") if block.startswith("def reward("))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "documented_reward.py").write_text(text)
    reward = rewards.load_reward("documented_reward:reward")
    found = reward(["p", "p"], ["it is 4", "it is 5"], ["4", "4"], [True, False])
    assert found.tolist() == pytest.approx([1.0, -0.1])


# ---- the command --------------------------------------------------------------------------------


def command(*arguments, code=0, **environment):
    done = subprocess.run(
        [sys.executable, "-m", "rlkern_loops.cli", *arguments],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_command_from_a_shell():
    assert "rlkern train grpo --help lists its options" in command("train", "--help")
    assert "invalid choice: 'gpro'" in command("train", "gpro", code=2)
    said = command("train", "grpo", "--learning-rat", "1e-6", code=2)
    assert said.count("\n") == 1 and "(did you mean '--learning-rate'?)" in said


def test_info_needs_no_training_packages():
    """rlkern alone may be installed; the loops' packages are then not looked for."""
    blocked = (
        "import sys; sys.modules.update(transformers=None, rich=None, yaml=None, tqdm=None);"
        "from rlkern_loops.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", blocked, "info", "--json"], capture_output=True, text=True, cwd=ROOT
    )
    assert json.loads(done.stdout)["versions"]["rlkern"]
    done = subprocess.run(
        [sys.executable, "-c", blocked, "train", "grpo"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "is not installed: pip install 'rlkern[loops]'" in done.stderr


def test_the_version(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"rlkern {rlkern.__version__}\n"


def test_a_stray_argument_of_info_is_an_error(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["info", "--jsn"])
    assert ended.value.code == 2 and "unexpected argument '--jsn'" in capsys.readouterr().err

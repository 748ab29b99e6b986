"""The README is true: its Python runs, and each command is one that a test or CI runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
# At the end: the clone's rlkern must not hide an installed one.
sys.path.append(str(ROOT))

from benchmarks import readme  # noqa: E402

# Command -> the file that runs it.
RUN_BY = {
    "make train": ".ci/run",
    "make test": ".ci/run",
    "rlkern train ppo": "tests/loops/test_run.py",
    "pip install .": "tests/build/test_build.py",
    "make bench": "tests/benchmarks/test_report.py",
    "python -m rlkern.info": "tests/build/test_build.py",
}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_example_equals_the_lines_that_it_replaces():
    eager, ours = blocks("python")
    scope: dict = {}
    exec(ours, scope)
    mask, out = scope["mask"], scope["out"]
    given = {
        "logits": scope["lm_head"](scope["hidden"]) / 0.9,
        "token_ids": scope["completion_ids"],
    }
    exec(eager, given)
    torch.testing.assert_close(out.logprobs[mask], given["logprobs"][mask])
    assert (out.logprobs[~mask] == 0).all()
    assert scope["hidden"].grad.abs().sum() > 0


def test_every_command_is_run_somewhere():
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    assert sorted(commands) == sorted(RUN_BY)
    for command, file in RUN_BY.items():
        text = (ROOT / file).read_text()
        words = [Path(word).name for word in command.split() if word not in ("python", "pip")]
        assert all(word in text for word in words), f"{command} is not run by {file}"


def test_every_variable_is_read_somewhere():
    sources = [ROOT / "setup.py", *ROOT.glob("rlkern/*.py"), *ROOT.glob("rlkern/ops/*.py")]
    sources += ROOT.glob("csrc/cpu/*.cpp")
    text = "".join(path.read_text() for path in sources)
    for name in set(re.findall(r"RLKERN_[A-Z_]+", README)):
        assert name in text, name


def test_the_table_says_what_was_measured():
    assert readme.between(README) == readme.figures(), "run python -m benchmarks.report"


def test_folders_and_targets_exist():
    targets = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make (\w+)`", README):
        assert f"\n{target}:" in targets, target
    rooms = README.split("## Where things are")[1]
    for row in re.findall(r"^\| (`[a-z/_`, ]+`) \|", rooms, flags=re.MULTILINE):
        for folder in re.findall(r"`([a-z_/]+)`", row):
            assert (ROOT / folder).is_dir(), folder

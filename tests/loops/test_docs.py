"""docs/loops.md is true: its commands are ones that the loops take, and every option is there."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
from rlkern_loops.cli import parse_config
from rlkern_loops.grpo import GRPOConfig
from rlkern_loops.ppo import PPOConfig

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "loops.md").read_text()
LOOPS = {"grpo": GRPOConfig, "ppo": PPOConfig}
BLOCKS = re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL)
COMMANDS = [
    shlex.split(line, comments=True)
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("rlkern train ") and "--config" not in line
]


def test_there_are_commands_for_both_loops():
    assert {command[2] for command in COMMANDS} == {"grpo", "ppo"} and len(COMMANDS) >= 4


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_are_taken(command):
    config = parse_config(LOOPS[command[2]], command[3:], "rlkern train")
    for name, value in zip(command[3::2], command[4::2], strict=True):
        given = getattr(config, name.removeprefix("--").replace("-", "_"))
        assert value in (str(given), str(given).lower()) or given == float(value)


def test_options_that_are_named_exist():
    known = {f.name for config in LOOPS.values() for f in dataclasses.fields(config)}
    named = set(re.findall(r"--([a-z][a-z0-9_-]*)", TEXT)) - {"help", "config", "version"}
    assert not {name for name in named if name.replace("-", "_") not in known}


def test_presets_that_are_named_exist():
    (row,) = re.findall(r"^\| the loss, any preset.*\| (.*) \|$", TEXT, flags=re.MULTILINE)
    names = re.findall(r"`(?:--loss )?(\w+)`", row)
    assert len(names) > 5
    assert all(GRPOConfig(loss=name).objective() is not None for name in names)


def test_every_option_explains_itself():
    for config in LOOPS.values():
        for option in dataclasses.fields(config):
            assert option.metadata["help"].endswith("."), option.name

"""Runs that are killed, interrupted by an error, or resumed."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rlkern_loops import checkpoint, grpo, learn, ppo
from rlkern_loops.errors import CheckpointError, RewardError, RunError
from rlkern_loops.grpo import GRPOConfig
from rlkern_loops.learn import NonFiniteLoss
from rlkern_loops.ppo import PPOConfig
from transformers import AutoModelForCausalLM

LOOPS = {"grpo": (GRPOConfig, grpo.train), "ppo": (PPOConfig, ppo.train)}


def command(loop, options):
    given = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "rlkern_loops.cli", "train", loop, *given]


@pytest.mark.parametrize("loop", ["grpo", "ppo"])
def test_a_killed_run_goes_on_bit_for_bit(short, records, tmp_path, loop):
    """Killed by SIGKILL in the middle of a step, resumed, and compared with one left alone."""
    options = short | {"steps": 40, "save_every": 3, "seed": 3}
    if loop == "ppo":
        options |= {"target_kl": 1.0}
    config_class, train = LOOPS[loop]
    train(config_class(**options | {"output_dir": str(tmp_path / "whole")}))
    whole = records(tmp_path / "whole")

    folder = tmp_path / "killed"
    options |= {"output_dir": str(folder), "resume": "auto"}
    with subprocess.Popen(
        command(loop, options), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        log = folder / "metrics.jsonl"
        until = time.monotonic() + 300
        # The lines: the options, then one a step. After the fifth step, long before the last.
        while not (log.exists() and log.read_text().count("\n") >= 6):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < until
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
    left = records(folder)
    assert 5 <= len(left) < 40
    saved = checkpoint.latest(folder)
    assert saved is not None

    done = subprocess.run(command(loop, options), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "going on after step" in done.stdout
    assert records(folder) == whole
    weights = [
        torch.cat([p.flatten() for p in state["parts"]["policy"].values()])
        for state in (checkpoint.load(checkpoint.latest(tmp_path / n)) for n in ("whole", "killed"))
    ]
    assert torch.equal(*weights)


@pytest.mark.parametrize("loop", ["grpo", "ppo"])
def test_a_loss_that_is_no_number_changes_nothing(short, records, monkeypatch, loop):
    config_class, train = LOOPS[loop]
    options = short | {"steps": 6, "save_every": 5, "reward": "rlkern_loops.tasks:solved"}
    module = sys.modules[train.__module__]
    update, calls = module.update, []

    def poisoned(policy, *rest):
        calls.append({k: v.clone() for k, v in policy.state_dict().items()})
        if len(calls) == 2 * config_class().epochs * 2 + 2:  # the third step's second mini-batch
            with torch.no_grad():
                policy.transformer.h[0].mlp.c_fc.bias.register_hook(lambda g: g * torch.nan)
        return update(policy, *rest)

    monkeypatch.setattr(module, "update", poisoned)
    with pytest.raises(NonFiniteLoss, match="--resume auto goes on after step 2, from .*000002"):
        train(config_class(**options))
    saved = checkpoint.load(checkpoint.latest(short["output_dir"]))
    for name, value in saved["parts"]["policy"].items():
        assert torch.equal(value, calls[-1][name])
    monkeypatch.setattr(module, "update", update)
    train(config_class(**options, resume="auto"))
    assert [r["step"] for r in records(short["output_dir"])] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("loss,cause", [(math.inf, "A reward, or a coeff"), (math.nan, "fp32")])
def test_what_may_be_behind_a_loss_that_is_no_number(loss, cause):
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = torch.optim.AdamW([weight])
    with pytest.raises(NonFiniteLoss, match=f"the loss is {loss} .* mini-batch. .*{cause}"):
        learn.step(optimizer, loss, 1.0)
    assert weight.tolist() == [1, 1] and weight.grad is None


@pytest.mark.parametrize("loop", ["grpo", "ppo"])
def test_a_reward_that_raises_loses_no_step(short, records, tmp_path, monkeypatch, loop):
    """The run that goes on after it is the run without it."""
    (tmp_path / f"moody_{loop}.py").write_text(
        "calls = 0\nfail_at = None\n\n\n"
        "def judge(completions):\n"
        "    global calls\n    calls += 1\n"
        "    assert calls != fail_at, 'not today'\n"
        "    return [len(c) % 3 for c in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    moody = __import__(f"moody_{loop}")
    config_class, train = LOOPS[loop]
    options = short | {
        "steps": 4, "reward": f"moody_{loop}:judge", "eval_reward": "rlkern_loops.tasks:solved"
    }  # fmt: skip
    train(config_class(**options | {"output_dir": str(tmp_path / "whole")}))
    moody.calls, moody.fail_at = 0, 3
    with pytest.raises(RewardError, match="not today.*--resume auto goes on after step 2"):
        train(config_class(**options))
    moody.fail_at = None
    train(config_class(**options, resume="auto"))
    assert records(short["output_dir"]) == records(tmp_path / "whole")


def test_a_new_run_does_not_go_on_from_an_old_one(short, records):
    train = grpo.train
    train(GRPOConfig(**short | {"save_every": 1}))
    train(GRPOConfig(**short | {"save_every": 0, "steps": 2}))
    assert len(records(short["output_dir"])) == 2
    assert checkpoint.latest(short["output_dir"]) is None
    assert list((Path(short["output_dir"]) / "checkpoints.previous").glob("*.pt"))


def test_options_that_changed_are_named(short, capsys):
    train = grpo.train
    train(GRPOConfig(**short | {"save_every": 1, "steps": 2}))
    train(GRPOConfig(**short | {"resume": "auto", "steps": 3, "learning_rate": 1e-4}))
    said = capsys.readouterr().out
    assert "other options than before: steps, learning_rate" in said


@pytest.mark.parametrize(
    "train,options,named",
    [
        (ppo.train, {"task": "addition"}, "another loop: .* options of PPOConfig, got GRPOConfig"),
        (grpo.train, {"task": "reversal"}, "^task: .* with 'addition', got 'reversal'"),
        (grpo.train, {"num_layers": 1}, "^num_layers: .* with 2, got 1"),
        (grpo.train, {"seed": 2}, "^seed: .* with 1, got 2"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(short, train, options, named):
    grpo.train(GRPOConfig(**short | {"save_every": 1, "steps": 1}))
    config_class = PPOConfig if train is ppo.train else GRPOConfig
    with pytest.raises(CheckpointError, match=named):
        train(config_class(**short | options | {"resume": "auto"}))


def test_a_model_that_was_replaced_is_refused(short, folders):
    options = short | {"save_every": 1, "steps": 1}
    grpo.train(GRPOConfig(**options))
    place = Path(short["output_dir"]) / "warm_start"
    shutil.rmtree(place)
    shutil.copytree(folders["llama"], place)
    with pytest.raises(CheckpointError, match="another model: its policy does not fit") as refused:
        grpo.train(GRPOConfig(**options | {"resume": "auto", "steps": 2}))
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


def test_a_start_that_fails_leaves_the_earlier_run(short, capsys):
    options = short | {"save_every": 1, "steps": 1}
    grpo.train(GRPOConfig(**options))
    folder = Path(short["output_dir"])
    log = (folder / "metrics.jsonl").read_bytes()
    raising = {"eval_reward": "multiple_choice"}  # at the first answer that is no letter
    for slip in ({"reward": "numerci"}, {"model": str(folder / "nowhere")}, raising):
        with pytest.raises(RunError):
            grpo.train(GRPOConfig(**options | slip))
        assert checkpoint.latest(folder) and not checkpoint.previous(folder)
        assert (folder / "metrics.jsonl").read_bytes() == log
    # Where the newest are gone, a restart says where the others are.
    checkpoint.set_aside(folder)
    capsys.readouterr()
    grpo.train(GRPOConfig(**options | {"resume": "auto"}))
    assert "a new run starts; an earlier one's: " in capsys.readouterr().out


def test_fewer_steps_than_the_checkpoint_has_are_told(short, capsys):
    grpo.train(GRPOConfig(**short | {"save_every": 1, "steps": 2}))
    capsys.readouterr()
    grpo.train(GRPOConfig(**short | {"resume": "auto", "steps": 1}))
    assert "after step 2\nsteps: that is more than 1, nothing is left" in capsys.readouterr().out


@pytest.mark.parametrize("loop", ["grpo", "ppo"])
def test_a_failure_in_the_last_evaluation_loses_nothing(short, tmp_path, monkeypatch, loop):
    (tmp_path / f"picky_{loop}.py").write_text(
        "calls = 0\n\n\ndef judge(completions):\n"
        "    global calls\n    calls += 1\n"
        "    assert calls != 3, 'not today'\n    return [1.0] * len(completions)\n"
    )  # the calls: at the start, after the last step, and of the result
    monkeypatch.syspath_prepend(tmp_path)
    config_class, train = LOOPS[loop]
    options = short | {
        "steps": 1, "save_every": 0, "reward": "rlkern_loops.tasks:solved",
        "eval_reward": f"picky_{loop}:judge",
    }  # fmt: skip
    with pytest.raises(RewardError, match="not today.*--resume auto goes on after step 1"):
        train(config_class(**options))
    AutoModelForCausalLM.from_pretrained(Path(short["output_dir"]) / "model")
    train(config_class(**options, resume="auto"))


@pytest.mark.parametrize("loop", ["grpo", "ppo"])
def test_rounds_that_teach_nothing_are_warned_of_once(short, tmp_path, monkeypatch, capsys, loop):
    (tmp_path / f"mute_{loop}.py").write_text(
        "def judge(completions):\n    return [None] * len(completions)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config_class, train = LOOPS[loop]
    cut = {"mask_truncated": True, "max_new_tokens": 1, "warm_start_steps": 0, "steps": 2}
    # An untrained model ends a completion at once now and then; with no end token it cannot.
    monkeypatch.setattr("rlkern_loops.rollout.end_tokens", lambda model, tokenizer: [])
    train(config_class(**short | cut | {"reward": f"mute_{loop}:judge"}))
    said = capsys.readouterr().out
    assert said.count("warning: ") == 2 and said.count("warning: step 1 learned from no") == 2
    assert f"'mute_{loop}:judge' gave none of the completions a number" in said
    assert "max_new_tokens cut all completions off" in said

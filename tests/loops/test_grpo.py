"""GRPO runs: short ones for the machinery, whole ones (slow) for what they learn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHORT = [
    "--steps", "3", "--warm_start_steps", "20", "--warm_start_batch_size", "16",
    "--prompts_per_step", "8", "--group_size", "4", "--eval_every", "2", "--hidden_size", "16",
]  # fmt: skip


def run(folder, *options):
    command = [sys.executable, "-m", "rlkern_loops.grpo", "--device", "cpu", "--output_dir", folder]
    env = {k: v for k, v in os.environ.items() if not k.startswith("RLKERN_")}
    done = subprocess.run(
        [*map(str, command), *options], capture_output=True, text=True, env=env, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").open()]
    return done.stdout, records


def test_a_short_run_leaves_its_files(tmp_path):
    out, records = run(tmp_path / "run", *SHORT, "--kl_coef", "0.04", "--entropy_coef", "0.01")
    assert "greedy accuracy on 300 held-out problems" in out
    steps = [r for r in records if r["phase"] == "grpo"]
    assert [r["step"] for r in steps] == [1, 2, 3]
    for name in ("rollout/reward", "losses/policy_loss", "losses/kl", "losses/entropy"):
        assert all(name in r for r in steps)
    assert [("eval/accuracy" in r) for r in steps] == [False, True, True]
    assert records[-1]["phase"] == "result" and records[-1]["seconds"] > 0
    assert (tmp_path / "run" / "curves.png").exists()


def test_the_same_seed_gives_the_same_run(tmp_path):
    runs = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        _, records = run(tmp_path / name, *SHORT, "--seed", str(seed))
        runs.append([r for r in records if r["phase"] in ("grpo", "warm start")])
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


@pytest.mark.slow
def test_grpo_teaches_addition(tmp_path):
    _, records = run(tmp_path / "run")
    result = records[-1]
    assert result["accuracy_before"] <= 0.4
    assert result["accuracy_after"] >= 0.95


@pytest.mark.slow
def test_shuffled_rewards_teach_nothing(tmp_path):
    _, records = run(tmp_path / "run", "--shuffle_rewards")
    assert records[-1]["accuracy_after"] < 0.5

"""Options: what is refused, and what the left out ones come to."""

from __future__ import annotations

import math

import pytest
import torch
from rlkern_loops.grpo import GRPOConfig
from rlkern_loops.options import changed
from rlkern_loops.ppo import PPOConfig

from rlkern import PolicyLoss


@pytest.mark.parametrize(
    "name,value",
    [
        ("group_size", 1), ("temperature", 0.0), ("temperature", math.nan), ("steps", -1),
        ("clip_high", -0.1), ("minibatches", 10**6), ("hidden_size", 10), ("top_p", 0.0),
        ("device", "tpu"), ("learning_rate", -1.0), ("threads", 100_000), ("threads", 0),
        ("max_operand", 100_000), ("max_operand", 1), ("device", "cuda:x"), ("device", "cuda:99"),
        ("seed", 10**19), ("seed", -1), ("kl_coef", math.inf), ("entropy_coef", math.inf),
        ("warm_start_accuracy", math.nan), ("warm_start_accuracy", 2.0), ("top_p", 1.1),
        ("warm_start_accuracy", -1.0), ("temperature", 1e-45), ("output_dir", __file__),
        ("output_dir", ""),
        ("output_dir", f"{__file__}/run"), ("max_new_tokens", 0), ("dynamic_sampling", -1),
        ("final_learning_rate", 1.5), ("micro_batch_size", -1), ("keep_checkpoints", 0),
        ("eval_dataset", "x"), ("limit", 5), ("attention", "flash"), ("system_prompt", "be kind"),
    ],
)  # fmt: skip
def test_bad_options_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected .*got"):
        GRPOConfig(**{name: value})


@pytest.mark.parametrize(
    "name,options",
    [
        ("loss", {"loss": "gpro"}),
        ("clip_low", {"loss": "sapo", "clip_low": 0.1}),
        ("aggregation", {"aggregation": "mean"}),
        ("kl_estimator", {"kl_estimator": "k4", "kl_coef": 0.1}),
        ("model", {"dataset": "x.jsonl", "reward": "numeric"}),
        ("reward", {"dataset": "x.jsonl", "model": "m"}),
    ],
)
def test_contradictions_are_named(name, options):
    with pytest.raises(ValueError, match=f"^{name}: "):
        GRPOConfig(**options)


@pytest.mark.parametrize(
    "name,value",
    [
        ("gamma", 1.5), ("lam", -0.1), ("value_coef", 0.0), ("value_clip", -1.0),
        ("reward_clip", 0.0), ("target_kl", 0.0), ("kl_horizon", 0), ("missing_eos_penalty", -1.0),
        ("critic_learning_rate", 0.0), ("kl_estimator", "k3_st"),
        ("kl_estimator", "exact"), ("kl_estimator", "k9"),
    ],
)  # fmt: skip
def test_bad_options_of_ppo_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected .*got"):
        PPOConfig(**{name: value})


def test_contradictions_of_ppo_are_named():
    with pytest.raises(ValueError, match="^target_kl: "):
        PPOConfig(target_kl=6.0, kl_coef=0.0)
    with pytest.raises(ValueError, match="^critic_model: "):
        PPOConfig(critic="shared", critic_model="x")


def test_a_gpu_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="^device: expected auto or cpu.*'cuda'"):
        GRPOConfig(device="cuda")


def test_learning_rates_fit_the_model():
    assert GRPOConfig().learning_rate == 1e-3
    assert GRPOConfig(model="m").learning_rate == 1e-6
    assert GRPOConfig(model="m", learning_rate=1e-5).learning_rate == 1e-5
    assert PPOConfig(model="m").critic_learning_rate == 2e-6


def test_objectives():
    assert GRPOConfig().objective() == PolicyLoss.preset("dapo")
    assert GRPOConfig(loss="grpo").objective() == PolicyLoss.preset("grpo")
    over = {"clip_low": 0.1, "kl_coef": 0.0, "aggregation": "token_mean"}
    assert GRPOConfig(loss="grpo", **over).objective() == PolicyLoss.preset("grpo", **over)
    # A KL in the reward is none in the loss.
    assert PPOConfig(kl_coef=0.1, kl_estimator="k3").objective() == PolicyLoss.preset("ppo")
    in_loss = PPOConfig(kl_coef=0.1, kl_estimator="k2", kl_in="loss").objective()
    assert in_loss == PolicyLoss.preset("ppo", kl_coef=0.1, kl_estimator="k2")


def test_what_changed_since_the_checkpoint():
    before = vars(GRPOConfig(seed=1, output_dir="a", save_every=3))
    assert changed(GRPOConfig(seed=1, output_dir="b"), before) == []
    assert changed(GRPOConfig(seed=2, clip_high=0.3), before) == ["seed", "clip_high"]

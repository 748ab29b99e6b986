"""PPO: its pieces by hand, its variants for a few steps, a whole run (slow) for what it learns."""

from __future__ import annotations

import math

import pytest
import torch
from rlkern_loops import learn, model
from rlkern_loops.critic import load_critic
from rlkern_loops.kl import AdaptiveKL
from rlkern_loops.ppo import (
    PPOConfig,
    advantages_of,
    completion_scores,
    read,
    token_rewards,
    train,
    update,
)
from rlkern_loops.rollout import completion_hidden
from rlkern_loops.tiny import tiny_classifier

MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()


# ---- its pieces ---------------------------------------------------------------------------------


def test_the_score_is_the_last_tokens_and_the_kl_every_tokens():
    scores = torch.tensor([2.0, -1.0, 0.5, math.nan])
    kl = torch.arange(16.0).view(4, 4) * MASK
    rewards = token_rewards(scores, kl, 0.1, MASK)
    expected = -0.1 * kl
    expected[0, 2] += 2.0
    expected[1, 0] -= 1.0
    expected[2, 3] += 0.5
    assert torch.equal(rewards, expected)
    without = token_rewards(scores, None, 0.1, MASK)
    assert without[MASK].tolist() == [0, 0, 2.0, -1.0, 0, 0, 0, 0.5] and not without[~MASK].any()


def test_scores_are_clipped_and_a_missing_end_costs():
    scores, finished = torch.tensor([9.0, -9.0, 1.0]), torch.tensor([True, False, False])
    config = PPOConfig(reward_clip=5.0, missing_eos_penalty=0.5)
    assert completion_scores(scores, finished, config).tolist() == [5.0, -5.5, 0.5]
    assert completion_scores(scores, finished, PPOConfig()).tolist() == scores.tolist()


@pytest.mark.parametrize(
    "kl,factor", [(6.0, 1.0), (6.3, 1.005), (60.0, 1.02), (0.0, 0.98), (5.4, 0.99)]
)
def test_the_adaptive_coefficient_is_zieglers(kl, factor):
    controller = AdaptiveKL(0.2, target=6.0, horizon=1000)
    controller.update(kl, completions=100)
    assert controller.kl_coef == pytest.approx(0.2 * factor)
    again = AdaptiveKL(0.9, target=6.0, horizon=1000)
    again.load_state_dict(controller.state_dict())
    assert again.kl_coef == controller.kl_coef
    fixed = AdaptiveKL(0.2, target=None, horizon=1000)
    fixed.update(kl, completions=100)
    assert fixed.kl_coef == 0.2


def a_critic(policy, folders, **options):
    config = PPOConfig(**options)
    critic = load_critic(config, policy, folders["llama"], None, "cpu")
    torch.manual_seed(4)
    torch.nn.init.normal_(critic.head.weight, std=0.5)
    return critic, config


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_values_are_those_before_each_token(policy, folders, written, critic):
    critic, config = a_critic(policy, folders, critic=critic, micro_batch_size=5)
    old, values = read(policy, critic, written, config)
    assert old.shape == values.shape == written.ids.shape
    trunk = critic.trunk or model.backbone(policy)
    for row in range(12):
        part = written.select(torch.tensor([row]))
        prompt = part.prompt_ids.shape[1]
        ids = torch.cat([part.prompt_ids, part.ids], 1)
        with torch.no_grad(), model.evaluating(trunk):
            hidden = trunk(ids).last_hidden_state[0, prompt - 1 : -1]
            expected = (hidden @ critic.head.weight[0]) + critic.head.bias
        # fp32 through two layers, in batches of other sizes.
        torch.testing.assert_close(values[row, : len(expected)], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_advantages_and_returns_are_the_recursion(written, estimator, kl_in):
    config = PPOConfig(
        kl_estimator=estimator, kl_in=kl_in, gamma=0.97, lam=0.9, whiten_advantages=False
    )
    shape = written.ids.shape
    old, values, scores = -torch.rand(shape), torch.randn(shape), torch.randn(12)
    ref = old + 0.1 * torch.randn(shape)
    batch, kl = advantages_of(scores, written, old, values, ref, 0.3, config)
    for row in range(12):
        length = int(written.mask[row].sum())
        expected, ahead = torch.zeros(shape[1]), 0.0
        for t in reversed(range(length)):
            x = float(ref[row, t] - old[row, t])
            estimate = -x if estimator == "k1" else math.expm1(x) - x
            assert kl[row, t] == pytest.approx(estimate, rel=1e-3, abs=1e-6)
            reward = -0.3 * estimate if kl_in == "reward" else 0.0
            reward += float(scores[row]) if t == length - 1 else 0.0
            following = float(values[row, t + 1]) if t + 1 < length else 0.0
            ahead = reward + 0.97 * following - float(values[row, t]) + 0.97 * 0.9 * ahead
            expected[t] = ahead
        torch.testing.assert_close(batch.advantages[row], expected, rtol=1e-4, atol=1e-5)
        returns = (expected + values[row]) * written.mask[row]
        torch.testing.assert_close(batch.returns[row], returns, rtol=1e-4, atol=1e-5)


def test_whitening_is_over_the_rounds_tokens(written):
    shape, mask = written.ids.shape, written.mask
    old, values, scores = -torch.rand(shape), torch.randn(shape), torch.randn(12)
    batch, _ = advantages_of(scores, written, old, values, None, 0.0, PPOConfig())
    assert batch.advantages[mask].mean().abs() < 1e-5
    assert batch.advantages[mask].var() == pytest.approx(1.0, rel=1e-4)
    assert not batch.advantages[~mask].any()
    # A round that teaches nothing has no variance, and is no error.
    nothing = written._replace(mask=torch.zeros_like(mask))
    config = PPOConfig(whiten_rewards=True)
    batch, _ = advantages_of(scores, nothing, old, values, None, 0.0, config)
    assert not batch.advantages.any() and not batch.returns.any()


@pytest.fixture(params=["separate", "shared"])
def learner(request, policy, folders, written):
    """Everything that an update takes."""
    critic, _ = a_critic(policy, folders, critic=request.param)
    old, values = read(policy, critic, written, PPOConfig())
    old = old + 0.4 * torch.randn(old.shape)
    values = values + 0.4 * torch.randn(old.shape)
    ref = old + 0.1 * torch.randn(old.shape)
    batch, _ = advantages_of(torch.randn(12), written, old, values, ref, 0.1, PPOConfig())
    return policy, critic, batch


def gradients(learner, **options):
    """Gradients of one update, of policy and critic, and the metrics of the two losses."""
    policy, critic, batch = learner
    config = PPOConfig(max_grad_norm=1e9, kl_in="loss", kl_coef=0.1, **options)
    optimizer = learn.adamw(config, policy.parameters(), critic.parameters())
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in parameters]
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.extend(p.grad.clone() for p in parameters))
    metrics, norms = update(policy, critic, optimizer, batch, config.objective(), 9, config)
    with torch.no_grad():
        for p, old in zip(parameters, before, strict=True):
            assert not torch.equal(p, old)
            p.copy_(old)
    return seen, [m.item_dict() for m in metrics], norms


def test_micro_batches_add_up_to_the_mini_batch(learner):
    whole, whole_metrics, norms = gradients(learner)
    parts, parts_metrics, _ = gradients(learner, micro_batch_size=5)
    assert min(norms) > 1e-3
    for a, b in zip(whole, parts, strict=True):
        # fp32 products summed in another order, four layers deep.
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5 * max(norms))
    for of_whole, of_parts in zip(whole_metrics, parts_metrics, strict=True):
        for name, value in of_whole.items():
            assert of_parts[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_the_two_losses_are_the_formula(learner):
    """Clipped ratio with k3, and the clipped square, by hand from logits and values."""
    policy, critic, batch = learner
    found, (of_policy, of_critic), _ = gradients(learner, value_coef=0.7)
    mask = batch.completions.mask
    ids, stands = batch.completions.sequences()
    prompt = batch.completions.prompt_ids.shape[1]
    logits = policy(ids, attention_mask=stands, position_ids=model.positions(stands)).logits[
        :, prompt - 1 : -1
    ]
    logp = logits.log_softmax(-1).gather(-1, batch.completions.ids[..., None]).squeeze(-1)
    r, a = (logp - batch.old_logprobs).exp(), batch.advantages
    x = batch.ref_logprobs - logp
    policy_loss = -torch.min(r * a, r.clamp(0.8, 1.2) * a) + 0.1 * (x.exp() - x - 1)
    hidden = completion_hidden(policy, batch.completions)
    v = critic(policy, batch.completions, hidden)
    clipped = v.clamp(batch.values - 0.2, batch.values + 0.2)
    squares = torch.max((v - batch.returns) ** 2, (clipped - batch.returns) ** 2)
    total = (policy_loss + 0.7 * 0.5 * squares)[mask].mean()
    parameters = [*policy.parameters(), *critic.parameters()]
    expected = torch.autograd.grad(total, parameters)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert of_critic["value_loss"] == pytest.approx(0.5 * squares[mask].mean().item(), rel=1e-4)
    assert 0 < of_critic["value_clip_frac"] < 1 and 0 < of_policy["clip_frac"] < 1


def test_a_critic_of_another_vocabulary_is_refused(policy, folders, tmp_path):
    small = model.load_backbone(folders["qwen"], PPOConfig(), "cpu")
    small.resize_token_embeddings(9)
    small.save_pretrained(tmp_path)
    with pytest.raises(model.ModelError, match="critic_model: expected .* 14 tokens, got 9"):
        load_critic(PPOConfig(critic_model=str(tmp_path)), policy, "", None, "cpu")
    with pytest.raises(model.ModelError, match="no reward model is used"):
        load_critic(PPOConfig(critic_model="reward"), policy, "", None, "cpu")


@pytest.mark.parametrize(
    "options,start",
    [
        ({}, "qwen"),  # the built-in tasks' reward model shares the policy's tokenizer
        ({"critic_model": "policy"}, "llama"),
        ({"model": "a/policy"}, "llama"),
        ({"model": "a/policy", "critic_model": "reward"}, "qwen"),
    ],
)
def test_what_the_critic_starts_from(policy, folders, options, start):
    config = PPOConfig(**options)
    critic = load_critic(config, policy, folders["llama"], folders["qwen"], "cpu")
    expected = model.load_backbone(folders[start], config, "cpu").state_dict()
    assert critic.trunk.state_dict().keys() == expected.keys()
    assert all(torch.equal(v, expected[k]) for k, v in critic.trunk.state_dict().items())


# ---- runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"critic": "separate", "target_kl": 1.0, "kl_horizon": 32, "whiten_rewards": True},
        {"critic": "separate", "critic_model": "policy", "precision": "bf16"},
        {"critic": "shared", "kl_in": "loss", "value_clip": 0.0, "micro_batch_size": 3},
        {"kl_in": "loss", "kl_estimator": "exact", "micro_batch_size": 3},
        {"kl_coef": 0.0, "reward": "rlkern_loops.tasks:solved", "mask_truncated": True},
        {"task": "addition", "missing_eos_penalty": 1.0, "gradient_checkpointing": True},
    ],
)
def test_short_runs_of_every_variant(short, records, capsys, options):
    train(PPOConfig(**short | options))
    steps = records(short["output_dir"])
    assert [r["step"] for r in steps] == [1, 2, 3]
    for name in ("rollout/reward", "losses/policy_loss", "losses/value_loss", "losses/entropy"):
        assert all(math.isfinite(r[name]) for r in steps)
    assert ("losses/kl" in steps[0]) == (options.get("kl_coef") != 0)
    if options.get("target_kl"):
        # No KL yet in the first step, far below the target: down by 0.2 * 8 / 32 of itself.
        assert steps[1]["losses/kl_coef"] == pytest.approx(0.05 * 0.95, rel=1e-4)
    trains_one = "reward" not in options
    assert ("reward model: " in capsys.readouterr().out) == trains_one


def test_models_and_data_of_ones_own(short, folders, sums, tokenizer, records, tmp_path):
    torch.manual_seed(2)
    judge = tiny_classifier(tokenizer, hidden_size=16, num_layers=2, num_heads=2)
    judge.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    options = short | {
        "model": folders["qwen"], "dataset": sums, "reward": f"model:{tmp_path / 'judge'}",
        "eval_reward": "numeric", "critic_model": "reward", "eval_size": 8, "max_new_tokens": 5,
        "micro_batch_size": 3, "learning_rate": 1e-4,
    }  # fmt: skip
    train(PPOConfig(**options))
    steps = records(short["output_dir"])
    assert len(steps) == 3 and all(math.isfinite(r["losses/value_loss"]) for r in steps)
    assert "eval/accuracy" in steps[-1] and all(-9 < r["rollout/reward"] < 9 for r in steps)


def test_completions_without_a_verdict_teach_nothing(short, records, tmp_path, monkeypatch):
    (tmp_path / "silent_judge.py").write_text(
        "def judge(completions):\n    return [None] * len(completions)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = short | {"reward": "silent_judge:judge", "kl_coef": 0.0, "steps": 1}
    train(PPOConfig(**options))
    (step,) = records(short["output_dir"])
    assert step["rollout/no_verdict"] == 1 and step["losses/grad_norm"] == 0


def test_eager_operators_give_the_same_curve_at_the_start(short, records, tmp_path):
    found = {}
    for operators in ("rlkern", "eager"):
        folder = str(tmp_path / operators)
        options = short | {"output_dir": folder, "operators": operators, "minibatches": 1}
        train(PPOConfig(**options, epochs=1))
        found[operators] = records(folder)[0]
    for name, value in found["rlkern"].items():
        if name.startswith(("losses/", "rollout/")):
            # One mini-batch: fp32 rounding alone, of means of some 60 numbers up to 10.
            assert found["eager"][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


@pytest.mark.slow
def test_ppo_teaches_reversal(tmp_path):
    result = train(PPOConfig(output_dir=str(tmp_path / "run"), device="cpu"))
    assert result["accuracy_before"] <= 0.6
    assert result["accuracy_after"] >= 0.95

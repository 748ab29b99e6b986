"""GRPO: its pieces by hand, every option for a few steps, whole runs (slow) for what they learn."""

from __future__ import annotations

import math

import pytest
import torch
from rlkern_loops import learn, model
from rlkern_loops.data import Example, Sampler
from rlkern_loops.grpo import GRPOConfig, Round, advantages_of, train, update, with_signal
from rlkern_loops.grpo import write_and_judge as write
from rlkern_loops.rollout import logprobs_of, sample
from rlkern_loops.tiny import tiny_gpt2

PRESETS = (
    "ppo", "grpo", "bnpo", "dr_grpo", "dapo", "gspo", "gspo_token", "cispo", "sapo", "gmpo",
    "vespo", "luspo", "rloo", "dppo_tv", "dppo_kl", "reinforce",
)  # fmt: skip


# ---- a run --------------------------------------------------------------------------------------


def test_a_short_run_leaves_its_files(short, records, capsys):
    result = train(GRPOConfig(**short, kl_coef=0.04, entropy_coef=0.01, group_size=4))
    folder = short["output_dir"]
    steps = records(folder)
    assert [r["step"] for r in steps] == [1, 2, 3]
    for name in ("rollout/reward", "losses/policy_loss", "losses/kl", "losses/entropy"):
        assert all(math.isfinite(r[name]) for r in steps)
    assert [("eval/accuracy" in r) for r in steps] == [False, True, True]
    assert records(folder, "result")[0]["accuracy_after"] == result["accuracy_after"]
    assert "300 held-out problems" in capsys.readouterr().out
    again = model.load(f"{folder}/model", GRPOConfig(), "cpu")
    assert model.load_tokenizer(f"{folder}/model").padding_side == "left"
    assert again.config.vocab_size == 14 and result["seconds"] > 0


def test_the_same_seed_gives_the_same_run(short, records, tmp_path):
    runs = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        folder = str(tmp_path / name)
        train(GRPOConfig(**short | {"output_dir": folder}, seed=seed, group_size=4))
        runs.append(records(folder))
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_eager_operators_give_the_same_curve_at_the_start(short, records, tmp_path):
    found = {}
    for operators in ("rlkern", "eager"):
        folder = str(tmp_path / operators)
        config = GRPOConfig(
            **short | {"output_dir": folder}, operators=operators, group_size=4, kl_coef=0.04
        )
        train(config)
        found[operators] = records(folder)[0]
    for name, value in found["rlkern"].items():
        # Of the first step. Its first mini-batch agrees to fp32 rounding; its update, of Adam and
        # hence the gradient's sign, may move a weight whose gradient is rounding by 1e-4 (the
        # rate) either way, of which the second mini-batch's means feel a small part.
        if name.startswith(("losses/", "rollout/")):
            assert found["eager"][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_a_model_of_ones_own_on_a_file(short, folders, sums, records, tmp_path, name):
    (tmp_path / "my_reward.py").write_text(
        "def length(completions, finished):\n    return [float(len(c)) for c in completions]\n"
    )
    options = short | {
        "model": folders[name], "dataset": sums, "reward": "numeric+0.1*exact_match",
        "eval_size": 8, "group_size": 4, "max_new_tokens": 5, "precision": "bf16",
        "gradient_checkpointing": True, "micro_batch_size": 6, "learning_rate": 1e-4,
        "rollout_batch_size": 12, "top_p": 0.95, "loss": "grpo",
    }  # fmt: skip
    train(GRPOConfig(**options))
    steps = records(options["output_dir"])
    assert len(steps) == 3 and all(math.isfinite(r["losses/policy_loss"]) for r in steps)
    assert "eval/reward" in steps[-1] and "eval/accuracy" not in steps[-1]
    started, ended = (
        model.load(place, GRPOConfig(), "cpu")
        for place in (folders[name], f"{options['output_dir']}/model")
    )
    moved = [
        (a - b).abs().max() for a, b in zip(started.parameters(), ended.parameters(), strict=True)
    ]
    assert 0 < max(moved) < 2e-3  # three steps of two updates, each at most the learning rate


@pytest.mark.parametrize(
    "options",
    [
        {"baseline": "leave_one_out", "scale": "none"},
        {"baseline": "length_weighted", "unbiased": False},
        {"baseline": "given", "scale": "none"},
        {"baseline": "pass_at_k"},
        {"baseline": "batch_mean", "scale": "batch_std"},
        {"scale": "mean"},
        {"mask_truncated": True, "max_new_tokens": 2},
        {"dynamic_sampling": 2},
        {"kl_coef": 0.1, "kl_estimator": "exact", "precision": "bf16", "micro_batch_size": 5},
        {"epochs": 2, "minibatches": 1},
        {"epochs": 1, "minibatches": 1},
        {"task": "reversal", "word_length": 4},
    ],
)
def test_every_option_runs(short, records, options):
    train(GRPOConfig(**short | {"group_size": 4, "steps": 1} | options))
    (step,) = records(short["output_dir"])
    assert math.isfinite(step["losses/policy_loss"])


# ---- its pieces ---------------------------------------------------------------------------------


@pytest.fixture
def batch(policy, written):
    """Twelve completions in groups of four, with advantages."""
    old = logprobs_of(policy, written, GRPOConfig())
    # As if the policy had moved on: ratios on both sides of 1, and of the clip range.
    old = old + 0.5 * torch.randn(old.shape)
    ref = old + 0.1 * torch.randn(old.shape)
    return Round(written, torch.randn(12), old, ref)


def gradients(policy, batch, config, reference=None):
    """The gradient of a mini-batch's update, its loss's metrics and its norm."""
    seen = []
    optimizer = learn.adamw(config, policy.parameters())
    optimizer.register_step_pre_hook(
        lambda *_: seen.extend(p.grad.clone() for p in policy.parameters())
    )
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    metrics, norm = update(policy, optimizer, batch, 9, config, reference)
    policy.load_state_dict(before)
    return seen, metrics.item_dict(), norm


@pytest.mark.parametrize("loss", PRESETS)
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_micro_batches_add_up_to_the_mini_batch(policy, batch, loss, kl_coef):
    options = {"loss": loss, "entropy_coef": 0.01, "kl_coef": kl_coef, "max_grad_norm": 1e9}
    if not kl_coef:
        batch = batch._replace(ref_logprobs=None)
    whole, whole_metrics, whole_norm = gradients(policy, batch, GRPOConfig(**options))
    parts, parts_metrics, parts_norm = gradients(
        policy, batch, GRPOConfig(**options, micro_batch_size=5)
    )
    assert parts_norm == pytest.approx(whole_norm, rel=1e-4) and whole_norm > 1e-4
    for a, b in zip(whole, parts, strict=True):
        # fp32 products summed in another order: 1e-6 of the largest entry, four layers deep.
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5 * whole_norm)
    for name, value in whole_metrics.items():
        assert parts_metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_loss_and_gradient_are_the_formula(policy, batch):
    """Clipped ratio, k3 and entropy by hand, from the model's own logits."""
    config = GRPOConfig(kl_coef=0.04, entropy_coef=0.01, max_grad_norm=1e9)
    found, metrics, _ = gradients(policy, batch, config)
    total, low, high, count = 0.0, 0, 0, int(batch.completions.mask.sum())
    for i, advantage in enumerate(batch.advantages):
        part = batch.completions.select(torch.tensor([i]))
        ids, stands = part.sequences()
        logits = policy(ids, attention_mask=stands, position_ids=model.positions(stands)).logits[
            0, part.prompt_ids.shape[1] - 1 : -1
        ]
        logps = logits.log_softmax(-1)
        for t in range(part.ids.shape[1]):
            logp = logps[t, part.ids[0, t]]
            r = (logp - batch.old_logprobs[i, t]).exp()
            x = batch.ref_logprobs[i, t] - logp
            total = total - torch.min(r * advantage, r.clamp(0.8, 1.28) * advantage)
            total = total + 0.04 * (x.exp() - x - 1)
            total = total + 0.01 * (logps[t].exp() * logps[t]).sum()
            low += bool(r < 0.8 and advantage < 0)
            high += bool(r > 1.28 and advantage > 0)
    expected = torch.autograd.grad(total / count, list(policy.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert metrics["clip_frac"] == pytest.approx((low + high) / count) and low and high


def test_the_exact_kl_is_the_sum_over_the_vocabulary(policy, batch, tokenizer):
    torch.manual_seed(8)
    reference = tiny_gpt2(tokenizer, hidden_size=16, num_layers=2, num_heads=2).requires_grad_(
        False
    )
    options = {"kl_coef": 2.0, "kl_estimator": "exact", "max_grad_norm": 1e9}
    batch = batch._replace(ref_logprobs=None)
    found, metrics, _ = gradients(
        policy, batch, GRPOConfig(**options, micro_batch_size=5), reference
    )
    without, _, _ = gradients(policy, batch, GRPOConfig(max_grad_norm=1e9))
    mask, prompt = batch.completions.mask, batch.completions.prompt_ids.shape[1]
    ids, stands = batch.completions.sequences()
    arguments = {"attention_mask": stands, "position_ids": model.positions(stands)}
    ours, theirs = (
        m(ids, **arguments).logits[:, prompt - 1 : -1].log_softmax(-1) for m in (policy, reference)
    )
    kl = (ours.exp() * (ours - theirs.detach())).sum(-1)[mask].mean()
    expected = torch.autograd.grad(2.0 * kl, list(policy.parameters()))
    for a, b, c in zip(found, without, expected, strict=True):
        torch.testing.assert_close(a - b, c, rtol=1e-3, atol=1e-5)
    assert metrics["kl"] == pytest.approx(kl.item(), rel=1e-4) and kl > 1e-3


def test_groups_with_a_signal():
    nan = math.nan
    rewards = torch.tensor([1, 1, 1.0, 0, nan, 1, nan, nan, nan, 0, 0, 0, 0, nan, 1])
    assert with_signal(rewards, 3).tolist() == [False, True, False, False, True]


class Scripted:
    """A setting whose completions are the prompts' own, and whose rewards are in the answers."""

    class tokenizer:
        pad_token_id = 0

    def __init__(self, policy, tokenizer):
        self.written = sample(policy, tokenizer, ["1+1="], max_new_tokens=3, temperature=1.0)
        self.asked = []
        self.reward = None

    def sample(self, policy, examples, group_size=1, **_):
        self.asked.append(len(examples))
        rows = torch.zeros(len(examples) * group_size, dtype=torch.long)
        return self.written.select(rows)

    def judge(self, reward, examples, written):
        # Groups whose answer is "mixed" have a signal.
        mixed = torch.tensor([e.answer == "mixed" for e in examples]).float()
        return mixed * torch.arange(len(examples)) % 2


@pytest.mark.parametrize(
    "rounds,expected_asked,expected_groups", [(0, [4], 4), (1, [4, 2], 3), (5, [4, 2, 1, 1], 4)]
)
def test_dynamic_sampling_draws_again_for_groups_without_signal(
    policy, tokenizer, rounds, expected_asked, expected_groups
):
    # By fours, twos and ones: mixed, flat, mixed, flat | mixed, flat | flat | mixed
    answers = ["mixed", "flat", "mixed", "flat", "mixed", "flat", "flat", "mixed"]
    queue = [Example(f"{i}", a) for i, a in enumerate(answers)]

    class InOrder:
        def next(self, count):
            taken, queue[:] = queue[:count], queue[count:]
            return taken

    setting = Scripted(policy, tokenizer)
    config = GRPOConfig(prompts_per_step=4, group_size=2, dynamic_sampling=rounds, minibatches=1)
    asked, written, rewards, without = write(policy, setting, InOrder(), config)
    assert setting.asked == expected_asked
    assert len(asked) == len(rewards) == len(written.ids) == 2 * expected_groups
    if rounds:
        assert {e.answer for e in asked} == {"mixed"} and with_signal(rewards, 2).all()
    drawn = sum(expected_asked)
    assert without == pytest.approx(1 - answers[:drawn].count("mixed") / drawn)


def test_rounds_without_any_signal_end(policy, tokenizer):
    setting = Scripted(policy, tokenizer)
    config = GRPOConfig(prompts_per_step=2, group_size=2, dynamic_sampling=3, minibatches=1)
    sampler = Sampler([Example("a", "flat")], 0)
    asked, _, rewards, without = write(policy, setting, sampler, config)
    assert setting.asked == [2, 2, 2, 2] and len(asked) == 4 and without == 1
    assert not advantages_of(policy, setting, asked, setting.written, rewards, config).any()


# ---- what is learned ----------------------------------------------------------------------------


@pytest.mark.slow
def test_grpo_teaches_addition(tmp_path):
    result = train(GRPOConfig(output_dir=str(tmp_path / "run"), device="cpu"))
    assert result["accuracy_before"] <= 0.4
    assert result["accuracy_after"] >= 0.95


@pytest.mark.slow
def test_shuffled_rewards_teach_nothing(tmp_path):
    config = GRPOConfig(output_dir=str(tmp_path / "run"), device="cpu", shuffle_rewards=True)
    assert train(config)["accuracy_after"] < 0.5

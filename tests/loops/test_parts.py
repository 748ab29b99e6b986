"""The loop's parts, one by one."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from rlkern_loops.grpo import GRPOConfig, objective, parse
from rlkern_loops.log import RunLog, plot_curves
from rlkern_loops.model import char_tokenizer, tiny_gpt2
from rlkern_loops.rollout import completion_logprobs, sample
from rlkern_loops.tasks import Addition
from rlkern_loops.warmstart import demonstrations, warm_start


@pytest.fixture(scope="module")
def task():
    return Addition()


@pytest.fixture(scope="module")
def tokenizer(task):
    return char_tokenizer(task.alphabet)


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    return tiny_gpt2(tokenizer, hidden_size=16, num_layers=2, num_heads=2)


# ---- the task ---------------------------------------------------------------------------------


def sums(problems):
    return {tuple(sorted(map(int, p.prompt[:-1].split("+")))) for p in problems}


def test_held_out_problems_are_never_trained_on(task):
    splits = task.splits(seed=3)
    assert len(splits.held_out) == 300
    parts = [sums(part) for part in (splits.train, splits.validation, splits.held_out)]
    assert not (parts[0] & parts[2] or parts[1] & parts[2] or parts[0] & parts[1])
    assert sum(map(len, parts)) == 100 * 101 // 2


def test_splits_follow_their_seed(task):
    assert task.splits(1) == task.splits(1) and task.splits(1) != task.splits(2)
    with pytest.raises(ValueError, match="max_operand: expected enough sums .* got 6 sums"):
        Addition(2).splits(0)


def test_the_verifier(task):
    problem = task.problem(7, 85)
    assert problem.prompt == "07+85=" and problem.answer == "290"
    assert task.reward(problem, "290", finished=True) == 1
    for completion, finished in (("290", False), ("092", True), ("29", True), ("2900", True)):
        assert task.reward(problem, completion, finished) == 0


def test_the_tokenizer_keeps_every_character(task, tokenizer):
    text = "07+85=290"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text


# ---- rollout ------------------------------------------------------------------------------------


def test_sampling_reports_the_log_probabilities_it_drew_with(task, tokenizer, model):
    prompts = ["07+85=", "1+1="]  # of different lengths: padding must change nothing
    written = sample(
        model, tokenizer, prompts, max_new_tokens=6, temperature=0.8, group_size=8,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert written.ids.shape[0] == 16
    with torch.no_grad():
        logprobs = completion_logprobs(model, written, temperature=0.8)
    torch.testing.assert_close(logprobs, written.logprobs, rtol=1e-4, atol=1e-4)
    assert (written.logprobs[written.mask] < 0).all()
    # Alone, without padding, the same.
    row = 9
    length = int(written.mask[row].sum())
    prompt = tokenizer("1+1=", return_tensors="pt")["input_ids"]
    ids = torch.cat([prompt[0], written.ids[row, :length]])
    with torch.no_grad():
        logits = model(ids[None]).logits[0, len(prompt[0]) - 1 : -1] / 0.8
    alone = logits.log_softmax(-1).gather(-1, written.ids[row, :length, None]).squeeze(-1)
    torch.testing.assert_close(alone, written.logprobs[row, :length], rtol=1e-4, atol=1e-4)


def test_the_mask_ends_with_the_end_token(task, tokenizer, model):
    written = sample(
        model, tokenizer, ["07+85="], max_new_tokens=30, temperature=1.0, group_size=32
    )
    for ids, mask, finished in zip(written.ids, written.mask, written.finished, strict=True):
        ends = (ids == tokenizer.eos_token_id).nonzero()
        length = int(ends[0]) + 1 if finished else 30
        assert mask.sum() == length and mask[:length].all()
        assert bool(len(ends)) == bool(finished)
    assert written.finished.any()


def test_temperature_zero_takes_the_most_probable_token(tokenizer, model):
    first = sample(model, tokenizer, ["1+1="], max_new_tokens=1, temperature=0.0)
    prompt = tokenizer("1+1=", return_tensors="pt")["input_ids"]
    assert first.ids.item() == model(prompt).logits[0, -1].argmax().item()


# ---- the loss ---------------------------------------------------------------------------------


def test_loss_and_gradient_are_the_formula():
    b, t = 12, 9
    old = -torch.rand(b, t).double()
    logp = (old + 0.5 * torch.randn(b, t)).requires_grad_()
    ref = old + 0.1 * torch.randn(b, t)
    entropy = torch.rand(b, t).double()
    a, mask = torch.randn(b).double(), torch.rand(b, t) > 0.3
    loss, metrics = objective(GRPOConfig(kl_coef=0.04, entropy_coef=0.01))(
        logp, a, old_logprobs=old, ref_logprobs=ref, entropy=entropy, mask=mask
    )
    (actual,) = torch.autograd.grad(loss, logp)

    total, low, high, count = 0.0, 0, 0, int(mask.sum())
    twin = logp.detach().clone().requires_grad_()
    for i in range(b):
        for j in range(t):
            if mask[i, j]:
                r = (twin[i, j] - old[i, j]).exp()
                total = total - torch.min(r * a[i], r.clamp(0.8, 1.28) * a[i])
                total = total + 0.04 * (
                    (ref[i, j] - twin[i, j]).exp() - (ref[i, j] - twin[i, j]) - 1
                )
                total = total - 0.01 * entropy[i, j]
                low += bool(r < 0.8 and a[i] < 0)
                high += bool(r > 1.28 and a[i] > 0)
    (expected,) = torch.autograd.grad(total / count, twin)
    torch.testing.assert_close(loss, total / count, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    assert metrics["clip_frac"].item() == pytest.approx((low + high) / count)
    assert low and high


# ---- options, files, warm start -----------------------------------------------------------------


@pytest.mark.parametrize(
    "name,value",
    [
        ("group_size", 1), ("temperature", 0.0), ("temperature", math.nan), ("steps", -1),
        ("clip_low", 1.0), ("clip_high", -0.1), ("minibatches", 10**6), ("hidden_size", 10),
        ("device", "tpu"), ("learning_rate", -1.0), ("threads", 100_000), ("threads", 0),
        ("max_operand", 100_000), ("max_operand", 1), ("device", "cuda:x"), ("device", "cuda:99"),
        ("seed", 10**19), ("seed", -1), ("kl_coef", math.inf), ("entropy_coef", math.inf),
        ("warm_start_accuracy", math.nan), ("warm_start_accuracy", 2.0),
        ("warm_start_accuracy", -1.0), ("temperature", 1e-45), ("output_dir", __file__),
        ("output_dir", f"{__file__}/run"),
    ],
)  # fmt: skip
def test_bad_options_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected .*got"):
        GRPOConfig(**{name: value})


def test_the_least_sums_are_enough():
    least = GRPOConfig(max_operand=34).max_operand
    assert len(Addition(least).splits(0).train) > 0
    with pytest.raises(ValueError, match="max_operand"):
        Addition(least - 1).splits(0)


def test_a_gpu_that_is_not_there_is_named(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        parse(["--device", "cuda"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and "device: expected auto or cpu" in said and "'cuda'" in said


def test_command_lines(capsys):
    config = parse(["--steps", "3", "--shuffle_rewards"])
    assert config.steps == 3 and config.shuffle_rewards
    for arguments in (["--stepz", "3"], ["--group_size", "1"], ["--steps", "many"]):
        with pytest.raises(SystemExit):
            parse(arguments)
    assert "group_size: expected at least 2, got 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert "Completions per prompt" in capsys.readouterr().out


def test_records_are_written_as_they_come(tmp_path):
    log = RunLog(str(tmp_path / "run"), GRPOConfig())
    log.write({"phase": "grpo", "step": 1, "rollout/reward": 0.5})
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [line["phase"] for line in lines] == ["config", "grpo"]
    plot_curves(log.records, tmp_path / "run" / "curves.png")
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["curves.png", "metrics.jsonl"]


def test_demonstrations_are_the_answers(task, tokenizer):
    problems = [task.problem(7, 85), task.problem(99, 99)]
    shown = demonstrations(tokenizer, problems, "cpu")
    assert task.rewards(problems, shown, tokenizer).tolist() == [1.0, 1.0]
    assert (shown.ids[:, -1] == tokenizer.eos_token_id).all() and shown.mask.all()


def test_the_warm_start_lowers_the_loss(task, tokenizer, model):
    rng = random.Random(0)
    options = GRPOConfig(warm_start_steps=30, warm_start_batch_size=32)
    steps = list(warm_start(model, tokenizer, task.splits(0).train, options, rng, "cpu"))
    assert [step for step, _ in steps] == list(range(1, 31))
    assert steps[-1][1] < 0.8 * steps[0][1]

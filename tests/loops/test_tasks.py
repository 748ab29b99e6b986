"""The built-in tasks, and the small models that are made for them."""

from __future__ import annotations

import random

import pytest
import torch
from rlkern_loops.options import RunConfig
from rlkern_loops.rewardmodel import labelled, slip, train_reward_model
from rlkern_loops.rewards import load_reward
from rlkern_loops.tasks import Addition, Reversal, built_in, solved
from rlkern_loops.warmstart import demonstrations, warm_start


def operands(examples):
    return {tuple(sorted(map(int, e.prompt[:-1].split("+")))) for e in examples}


def test_held_out_sums_are_never_trained_on(task):
    splits = task.splits(seed=3)
    assert len(splits.held_out) == 300
    parts = [operands(part) for part in (splits.train, splits.validation, splits.held_out)]
    assert not (parts[0] & parts[2] or parts[1] & parts[2] or parts[0] & parts[1])
    assert sum(map(len, parts)) == 100 * 101 // 2


def test_words_are_in_one_set_each_and_turned_round():
    splits = Reversal(5).splits(seed=3)
    parts = [
        {e.prompt for e in part} for part in (splits.train, splits.validation, splits.held_out)
    ]
    assert [len(part) for part in parts] == [3400, 300, 300]
    assert not (parts[0] & parts[2] or parts[1] & parts[2] or parts[0] & parts[1])
    assert Reversal(5).example("gaceb") == ("gaceb>", "becag")


@pytest.mark.parametrize("task", [Addition(), Reversal()])
def test_splits_follow_their_seed(task):
    assert task.splits(1) == task.splits(1) and task.splits(1) != task.splits(2)


def test_too_few_sums_are_refused():
    least = RunConfig(max_operand=34).max_operand
    assert len(Addition(least).splits(0).train) > 0
    with pytest.raises(ValueError, match="max_operand: expected enough sums"):
        Addition(least - 1).splits(0)


def test_the_rule_wants_the_answer_and_its_end(task):
    assert task.example(7, 85) == ("07+85=", "290")
    written = ["290", "290", "092", "29", "2900"]
    finished = [True, False, True, True, True]
    assert solved(written, ["290"] * 5, finished) == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_the_tokenizer_keeps_every_character(tokenizer):
    text = "07+85=290"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text


def test_demonstrations_are_the_answers(task, tokenizer):
    examples = [task.example(7, 85), task.example(99, 99)]
    shown = demonstrations(tokenizer, examples, "cpu")
    judged = solved(shown.texts(tokenizer), [e.answer for e in examples], shown.finished.tolist())
    assert judged == [1.0, 1.0]
    assert (shown.ids[:, -1] == tokenizer.eos_token_id).all() and shown.mask.all()


def test_the_warm_start_lowers_the_loss_and_ends_when_it_may(task, tokenizer, policy):
    options = RunConfig(warm_start_steps=30, warm_start_batch_size=32)
    reached = iter([0.0, 0.1, 0.2, 0.3])
    records = warm_start(policy, tokenizer, task.splits(0).train, options, lambda: next(reached), 5)
    assert [r["step"] for r in records] == [5, 10, 15, 20]  # 0.3 is above 0.25
    assert records[-1]["loss"] < records[0]["loss"]


def test_slips_are_wrong_and_labels_say_where():
    rng = random.Random(0)
    assert all(slip("abcdef", "abcdefgh", rng) != "abcdef" for _ in range(2000))
    task = Reversal(6)
    shown = labelled([task.example("fedcba")] * 400, "abcdefgh", rng)
    assert 150 < shown.right.sum() < 250
    for answer, right, so_far in zip(shown.answers, shown.right, shown.right_so_far, strict=True):
        assert right == (answer == "abcdef")
        assert so_far == [float("abcdef".startswith(answer[: i + 1])) for i in range(len(answer))]
    assert min(map(len, shown.answers)) == 0  # an answer may also be cut down to nothing


@pytest.mark.slow
def test_the_reward_model_tells_right_from_wrong(tmp_path):
    torch.set_num_threads(1)
    config = RunConfig(task="reversal")
    task = built_in(config)
    splits = task.splits(config.seed)
    train_reward_model(config, task, splits, "cpu", tmp_path)
    scores = load_reward(f"model:{tmp_path}")
    shown = labelled(splits.validation, task.alphabet, random.Random(9))
    given = scores(shown.prompts, shown.answers, shown.answers, [True] * len(shown.answers))
    assert ((given > 0) == shown.right.bool()).float().mean() >= 0.97

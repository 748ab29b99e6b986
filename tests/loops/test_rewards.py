"""Rewards: what they give, and what is said where one goes wrong."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from rlkern_loops.errors import RewardError
from rlkern_loops.rewards import check_reward, load_reward, model_reward
from rlkern_loops.tiny import char_tokenizer, tiny_gpt2

from rlkern import group_advantages

PROMPTS = ["1+1=", "2+2=", "3+3="]
COMPLETIONS = ["2", "so 5", "<think></think><answer>6</answer>"]
ANSWERS = ["2", "4", "6"]
FINISHED = [True, False, True]


def call(reward):
    return reward(PROMPTS, COMPLETIONS, ANSWERS, FINISHED)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes my_rewards.py into the current folder; returns the reward of one of its functions."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)

    def write(text, function="reward"):
        (tmp_path / "my_rewards.py").write_text(text)
        return load_reward(f"my_rewards:{function}")

    yield write
    sys.modules.pop("my_rewards", None)


# ---- rules --------------------------------------------------------------------------------------


def test_a_verifier_and_a_weighted_sum():
    rewards = call(load_reward("numeric"))
    assert rewards.dtype == torch.float32 and rewards.tolist() == [1, 0, 1]
    expected = torch.tensor([1.0, 0.0, 1.2])
    torch.testing.assert_close(call(load_reward("numeric + 0.2*format_tags")), expected)
    torch.testing.assert_close(call(load_reward("-1*numeric")), -torch.tensor([1.0, 0.0, 1.0]))


@pytest.mark.parametrize(
    "spec,message",
    [
        ("numerc", r"no verifier 'numerc' \(did you mean 'numeric'\?\); expected numeric, "),
        ("", "expected terms such as .* got ''"),
        ("numeric+", r"expected terms such as .* got 'numeric\+'"),
        ("1e*numeric", "expected terms such as"),
        ("1e999*numeric", "expected terms such as"),
        ("no_such_module:f", "cannot import 'no_such_module': ModuleNotFoundError"),
        ("math:sqroot", r"math has no function 'sqroot' \(did you mean 'sqrt'\?\)"),
        ("math:pi", "math has no function 'pi'"),
        ("model:/nowhere", "reward 'model:/nowhere': "),
    ],
)
def test_a_reward_that_is_not_there_is_named(spec, message):
    with pytest.raises(RewardError, match=message):
        load_reward(spec)
    if spec != "model:/nowhere":
        with pytest.raises(RewardError, match=message):
            check_reward(spec)


def test_a_check_looks_for_no_model():
    check_reward("numeric+0.5*model:/nowhere")
    with pytest.raises(RewardError, match="no verifier 'numerc'"):
        check_reward("model:/nowhere+numerc")


def test_an_answer_that_the_rule_cannot_read_is_an_error():
    with pytest.raises(RewardError, match="reward 'numeric' raised ValueError: answer: expected"):
        load_reward("numeric")(["p"], ["1"], ["none"], [True])


# ---- functions of the user ----------------------------------------------------------------------


def test_a_function_gets_the_lists_that_it_takes(module):
    text = "def reward(completions, finished, weight=2.0):\n"
    text += "    return [weight * len(c) * f for c, f in zip(completions, finished)]\n"
    assert call(module(text)).tolist() == [2.0, 0.0, 2.0 * len(COMPLETIONS[2])]


def test_a_function_of_any_keyword_gets_all(module):
    reward = module("def reward(**given):\n    return [len(given)] * len(given['prompts'])\n")
    assert call(reward).tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    "result,expected",
    [
        ("[True, 2, 0.5]", [1, 2, 0.5]),
        ("(1, 2, 3)", [1, 2, 3]),
        ("__import__('torch').tensor([1., 2., 3.], requires_grad=True)", [1, 2, 3]),
        ("__import__('numpy').array([1, 2, 3])", [1, 2, 3]),
    ],
)
def test_any_sequence_of_numbers_will_do(module, result, expected):
    assert call(module(f"def reward(completions):\n    return {result}\n")).tolist() == expected


def test_no_verdict_is_nan_and_has_no_advantage(module):
    reward = module("def reward(completions):\n    return [1.0, None, float('nan')]\n")
    rewards = call(reward)
    assert rewards[0] == 1 and rewards[1:].isnan().all()
    total = load_reward("numeric+my_rewards:reward")
    assert call(total)[0] == 2 and call(total)[1:].isnan().all()
    rewards = torch.tensor([1.0, 0.0, math.nan])
    assert group_advantages(rewards, group_size=3)[2] == 0


@pytest.mark.parametrize(
    "result,message",
    [
        ("[1.0, 2.0]", "expected 3 numbers, one a completion, got 2"),
        ("1.0", "expected 3 numbers, got float"),
        ("None", "expected 3 numbers, got NoneType"),
        ("'abc'", "expected 3 numbers, got str"),
        ("[1.0, 'x', 2.0]", "expected a finite number, NaN or None, got 'x' for 'so 5'"),
        ("[1.0, '2', 2.0]", "expected a finite number, NaN or None, got '2' for 'so 5'"),
        ("[1.0, float('inf'), 2.0]", "got inf for 'so 5'"),
        ("[1.0, 1e300, 2.0]", r"got 1e\+300 for 'so 5'"),
        ("[[1.0], [1.0], [1.0]]", r"got \[1.0\] for '2'"),
    ],
)
def test_a_wrong_result_is_an_error(module, result, message):
    with pytest.raises(RewardError, match=f"reward 'my_rewards:reward': .*{message}"):
        call(module(f"def reward(completions):\n    return {result}\n"))


def test_an_exception_is_named_with_its_cause(module):
    with pytest.raises(
        RewardError,
        match=r"reward 'my_rewards:reward' raised KeyError: 'score' \(.*my_rewards.py, line 2\); "
        "the first completion of its batch was '2'",
    ) as raised:
        call(module("def reward(completions):\n    return {}['score']\n"))
    assert isinstance(raised.value.__cause__, KeyError)


def test_a_module_or_signature_that_cannot_work_is_an_error_at_the_start(module):
    with pytest.raises(RewardError, match="cannot import 'my_rewards': SyntaxError"):
        module("def reward(:\n")
    with pytest.raises(RewardError, match=r"parameter 'completion' is none of .*'completions'\?"):
        module("def reward(completion):\n    return [1.0]\n")
    sys.modules.pop("my_rewards")
    with pytest.raises(RewardError, match="parameter 'prompts' is none of"):
        module("def reward(prompts, /):\n    return [1.0]\n")


# ---- reward models ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(0)
    tokenizer = char_tokenizer("0123456789+= so")
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=12, n_embd=16, n_layer=1, n_head=2, num_labels=1,
        pad_token_id=tokenizer.pad_token_id, initializer_range=0.5,
    )  # fmt: skip
    model = GPT2ForSequenceClassification(config).eval()
    folder = tmp_path_factory.mktemp("classifier")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model, tokenizer


def test_a_reward_model_scores_prompt_and_completion(classifier):
    folder, model, tokenizer = classifier
    completions = ["2", "so 5", "6" * 30]  # the last one beyond the model's 12 positions
    rewards = load_reward(f"model:{folder}")(PROMPTS, completions, ["", "", ""], FINISHED)
    assert rewards.dtype == torch.float32 and not rewards.requires_grad
    # One by one and without padding, the same; a long text by its end.
    for prompt, completion, reward in zip(PROMPTS, completions, rewards, strict=True):
        ids = tokenizer(prompt + completion, return_tensors="pt")["input_ids"][:, -12:]
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits[0, 0], reward, rtol=1e-5, atol=1e-5)
    small = model_reward(model, tokenizer, batch_size=2)
    torch.testing.assert_close(small(PROMPTS, completions, [], []), rewards, rtol=1e-5, atol=1e-5)
    assert small([], [], [], []).shape == (0,)


def test_a_folder_with_a_plus_in_its_name(classifier, tmp_path):
    folder = tmp_path / "a+b"
    folder.symlink_to(classifier[0])
    assert load_reward(f"model:{folder}")(["1", "2"], ["3", "4"], [], []).shape == (2,)


def test_a_model_that_was_not_trained_to_judge_is_refused(classifier, tmp_path):
    _, model, tokenizer = classifier
    torch.manual_seed(0)
    tiny_gpt2(tokenizer, hidden_size=16, num_layers=1, num_heads=2).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(RewardError, match=r"the weights of score.weight are not in it"):
        load_reward(f"model:{tmp_path}")


def test_several_labels_are_refused(classifier, monkeypatch):
    _, model, tokenizer = classifier
    monkeypatch.setattr(model.config, "id2label", {0: "bad", 1: "good"})
    with pytest.raises(RewardError, match="expected one label, got 2"):
        model_reward(model, tokenizer)

"""What a run starts from: a model, its tokenizer, prompts to learn and to be judged by, rewards.

The built-in tasks' small models are made here and saved like any others, so that the loops know
only models by name or folder, data and rewards.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from rlkern_loops.data import Example, fit_prompts, hold_out, load_examples, render
from rlkern_loops.errors import DataError
from rlkern_loops.model import load_tokenizer, max_positions
from rlkern_loops.rewardmodel import train_reward_model
from rlkern_loops.rewards import Reward, check_reward, load_reward
from rlkern_loops.rollout import Completions, sample
from rlkern_loops.tasks import Task, built_in
from rlkern_loops.tiny import char_tokenizer, tiny_gpt2
from rlkern_loops.verifiers import VERIFIERS
from rlkern_loops.warmstart import warm_start

RULE = "rlkern_loops.tasks:solved"


@dataclass(frozen=True)
class Setting:
    """What a run starts from.

    Attributes:
        model: name or folder of the policy at the start, which is the reference too.
        tokenizer: of the policy, padding on the left.
        train: examples to learn from; their prompts are as the model reads them.
        validation: examples for evaluations while training.
        held_out: examples for the result; with a dataset those of validation.
        reward_model: its name or folder, where the reward is one.
        reward, eval_reward: of sampled, and of greedily written completions.
        eval_name: what the mean of eval_reward is: an accuracy where a rule gives 0 or 1.
        max_new_tokens: the longest completion.
        sampling: arguments of `rollout.sample`.
    """

    model: str
    tokenizer: Any
    train: list[Example]
    validation: list[Example]
    held_out: list[Example]
    reward_model: str | None
    reward: Reward
    eval_reward: Reward
    eval_name: str
    max_new_tokens: int
    sampling: dict[str, Any]

    def sample(self, model, examples: Sequence[Example], **options: Any) -> Completions:
        """Completions of the examples' prompts."""
        prompts = [example.prompt for example in examples]
        return sample(
            model, self.tokenizer, prompts, max_new_tokens=self.max_new_tokens,
            **(self.sampling | options),
        )  # fmt: skip

    def judge(
        self, reward: Reward, examples: Sequence[Example], written: Completions
    ) -> torch.Tensor:
        """Rewards [B] fp32 of completions, the i-th of the i-th example, on their device."""
        rewards = reward(
            [example.prompt for example in examples],
            written.texts(self.tokenizer),
            [example.answer for example in examples],
            written.finished.tolist(),
        )
        return rewards.to(written.ids.device)

    def evaluate(self, model, examples: Sequence[Example]) -> float:
        """The mean reward of the most probable completions; those without a verdict left out."""
        written = self.sample(model, examples, temperature=0.0, top_p=1.0)
        return self.judge(self.eval_reward, examples, written).nanmean().item()


def prepare(
    config: Any, device: str, *, learned_reward: bool = False, resumed: bool = False
) -> Setting:
    """Loads what the options name, and makes what a built-in task is to bring.

    Args:
        config: a run's options.
        device: where models are.
        learned_reward: a built-in task without a reward trains a reward model, instead of using
            its rule.
        resumed: what an earlier start of the run made is taken as it is.

    Raises:
        RunError: data, a model or a reward that cannot be loaded, or that do not fit together.
    """
    for spec in filter(None, (config.reward, config.eval_reward)):
        check_reward(spec)
    if config.dataset is None:
        return _built_in_setting(config, device, learned_reward, resumed)
    tokenizer = load_tokenizer(config.model)
    columns = {"prompt_column": config.prompt_column, "answer_column": config.answer_column}
    examples = load_examples(
        config.dataset, split=config.dataset_split, limit=config.limit, **columns
    )
    if config.eval_dataset is None:
        try:
            train, validation = hold_out(examples, config.eval_size, config.seed)
        except DataError as error:
            default = " (the default)" if config.eval_size == type(config).eval_size else ""
            raise DataError(f"{error}{default}") from error
    else:
        train = examples
        validation = load_examples(
            config.eval_dataset, split=config.eval_split, limit=config.eval_size, **columns
        )
    max_new_tokens = config.max_new_tokens or 256
    train, validation = (
        _fitted(part, tokenizer, config, config.model, max_new_tokens)
        for part in (train, validation)
    )
    return _setting(config, device, config.model, tokenizer, train, validation, validation,
                    config.reward, max_new_tokens)  # fmt: skip


def _fitted(
    examples: list[Example], tokenizer: Any, config: Any, model: str, max_new_tokens: int
) -> list[Example]:
    """The examples as the model reads them, without those too long for the options or for it."""
    longest = config.max_prompt_tokens
    positions = max_positions(model)
    if positions is not None:
        longest = min(longest, positions - max_new_tokens)
    if longest < 1:
        raise DataError(
            f"max_new_tokens: expected fewer than the {positions} positions of {model!r}, "
            f"got {max_new_tokens}{'' if config.max_new_tokens else ' (the default)'}"
        )
    template = {"chat_template": config.chat_template, "system_prompt": config.system_prompt}
    rendered = [e._replace(prompt=render(e, tokenizer, **template)) for e in examples]
    kept, left_out = fit_prompts(
        rendered, tokenizer, longest, add_special_tokens=not config.chat_template
    )
    if left_out:
        print(f"{left_out} prompts of more than {longest} tokens are left out")
    return kept


def _setting(
    config, device, model, tokenizer, train, validation, held_out, reward, max_new_tokens
) -> Setting:
    eval_spec = config.eval_reward or (RULE if config.dataset is None else reward)
    by_rule = eval_spec == RULE or eval_spec in VERIFIERS
    judge = load_reward(reward, device=device)
    return Setting(
        model, tokenizer, train, validation, held_out,
        reward_model=reward.removeprefix("model:") if reward.startswith("model:") else None,
        reward=judge,
        eval_reward=judge if eval_spec == reward else load_reward(eval_spec, device=device),
        eval_name="eval/accuracy" if by_rule else "eval/reward",
        max_new_tokens=max_new_tokens,
        sampling={
            "temperature": config.temperature, "top_p": config.top_p,
            "batch_size": config.rollout_batch_size,
            "add_special_tokens": not config.chat_template,
        },
    )  # fmt: skip


# ---- the built-in tasks -------------------------------------------------------------------------


def _built_in_setting(config, device: str, learned_reward: bool, resumed: bool) -> Setting:
    task = built_in(config)
    splits = task.splits(config.seed)
    folder = Path(config.output_dir)

    def made_once(name: str, make: Callable[[Path], None]) -> str:
        """A folder's name, filled by `make`; a run that goes on finds it as it was."""
        place = folder / name
        if not (resumed and place.is_dir()):
            _make_whole(place, make)
        return str(place)

    model = config.model or made_once(
        "warm_start", lambda place: _warm_started(config, task, splits, device, place)
    )
    tokenizer = load_tokenizer(model)
    max_new_tokens = config.max_new_tokens or task.max_new_tokens
    train, validation, held_out = (
        _fitted(part, tokenizer, config, model, max_new_tokens)
        for part in (splits.train, splits.validation, splits.held_out)
    )
    reward = config.reward or RULE
    if config.reward is None and learned_reward:
        reward = "model:" + made_once(
            "reward_model",
            lambda place: train_reward_model(config, task, splits, device, place),
        )
    return _setting(config, device, model, tokenizer, train, validation, held_out, reward,
                    max_new_tokens)  # fmt: skip


def _make_whole(place: Path, make: Callable[[Path], None]) -> None:
    """Fills a folder beside its name and renames it, so that a killed run leaves no half of it."""
    staged = place.with_name(place.name + ".tmp")
    try:
        for old in (staged, place):
            if old.is_dir():
                shutil.rmtree(old)
        staged.mkdir(parents=True)
        make(staged)
        os.replace(staged, place)
    except (OSError, SafetensorError) as error:
        raise DataError(f"output_dir: cannot write {place}: {error}") from error


def _warm_started(config, task: Task, splits, device: str, place: Path) -> None:
    torch.manual_seed(config.seed)
    tokenizer = char_tokenizer(task.alphabet)
    model = tiny_gpt2(
        tokenizer, hidden_size=config.hidden_size, num_layers=config.num_layers,
        num_heads=config.num_heads,
    ).to(device)  # fmt: skip
    rule = load_reward(RULE)

    def accuracy() -> float:
        asked = splits.validation
        written = sample(
            model, tokenizer, [e.prompt for e in asked], max_new_tokens=task.max_new_tokens,
            temperature=0.0,
        )  # fmt: skip
        answers = [e.answer for e in asked]
        return rule([], written.texts(tokenizer), answers, written.finished.tolist()).mean().item()

    records = warm_start(model, tokenizer, splits.train, config, accuracy, every=task.check_every)
    if records:
        reached, steps = records[-1]["eval/accuracy"], records[-1]["step"]
        print(f"warm start: greedy accuracy {reached:.3f} after {steps:.0f} supervised steps")
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)

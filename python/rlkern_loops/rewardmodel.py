"""The built-in tasks' reward model: a small classifier that learns from labelled answers.

It is trained before the run and frozen in it, as reward models of human preference are; the
labels come from the task's rule, and the wrong answers from slips that a half-trained model makes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlkern_loops.data import Example
from rlkern_loops.rewards import model_reward
from rlkern_loops.tasks import Splits, Task
from rlkern_loops.tiny import char_tokenizer, tiny_classifier
from rlkern_loops.warmstart import supervised_steps

SMOOTHING = 0.2


def slip(answer: str, letters: str, rng: random.Random) -> str:
    """A wrong answer, mostly near the right one: letters changed, exchanged, too many or too few.

    A quarter is cut short, down to nothing: a policy finds what a reward model has never seen.
    """
    if rng.random() < 0.25:
        return answer[: rng.randrange(len(answer))]
    while True:
        written = list(answer)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            i, j = rng.randrange(len(written)), rng.randrange(len(written))
            kind = rng.choice(("change", "change", "exchange", "drop", "add"))
            if kind == "change":
                written[i] = rng.choice(letters)
            elif kind == "exchange":
                written[i], written[j] = written[j], written[i]
            elif kind == "drop" and len(written) > 1:
                del written[i]
            else:
                written.insert(i, rng.choice(letters))
        if "".join(written) != answer:
            return "".join(written)


class Labelled(NamedTuple):
    """N answers of which about half are right.

    Attributes:
        prompts, answers: texts.
        right: [N] fp32, 1 for a right answer.
        right_so_far: one list an answer: for each of its letters 1 if no letter up to it is wrong.
    """

    prompts: list[str]
    answers: list[str]
    right: Tensor
    right_so_far: list[list[float]]


def labelled(examples: Sequence[Example], letters: str, rng: random.Random) -> Labelled:
    """Half of the examples with their answer, half with a slip in it, labelled by the rule."""
    good = [rng.random() < 0.5 for _ in examples]
    answers = [
        e.answer if right else slip(e.answer, letters, rng)
        for e, right in zip(examples, good, strict=True)
    ]
    so_far = [
        [float(e.answer.startswith(answer[: i + 1])) for i in range(len(answer))]
        for e, answer in zip(examples, answers, strict=True)
    ]
    return Labelled([e.prompt for e in examples], answers, torch.tensor(good).float(), so_far)


def loss_of(model, tokenizer, so_far_head: nn.Module, batch: Labelled) -> Tensor:
    """Cross entropy of the score at the last token, and of a second head at every letter.

    The score alone takes ten times the steps: whether six letters are all right is one bit a text,
    and the second head says which letter it was.
    """
    texts = [prompt + answer for prompt, answer in zip(batch.prompts, batch.answers, strict=True)]
    encoded = tokenizer(texts, padding=True, return_tensors="pt").to(model.device)
    hidden = model.base_model(**encoded).last_hidden_state  # [N, L, D]
    # One token a letter: the answer's stand after the prompt's, and the last one ends the text.
    rows, columns, last = [], [], []
    for row, (prompt, answer) in enumerate(zip(batch.prompts, batch.answers, strict=True)):
        rows += [row] * len(answer)
        columns += range(len(prompt), len(prompt) + len(answer))
        last.append(len(prompt) + len(answer) - 1)
    right = batch.right.to(model.device)
    so_far = torch.tensor(sum(batch.right_so_far, []), device=model.device)
    scores = model.score(hidden[range(len(last)), last])[:, 0]
    letters = so_far_head(hidden[rows, columns])[:, 0]
    # Smoothed labels keep the scores about +-2, where a sure classifier's would grow without end
    # and a critic would have to follow.
    smoothed = SMOOTHING / 2 + (1 - SMOOTHING) * right
    cross_entropy = nn.functional.binary_cross_entropy_with_logits
    return cross_entropy(scores, smoothed) + cross_entropy(letters, so_far)


def train_reward_model(config: Any, task: Task, splits: Splits, device: str, place: Path) -> None:
    """Trains the classifier on train's prompts, prints its accuracy on held_out's, and saves it.

    Args:
        config: has seed, hidden_size, num_layers, num_heads, reward_model_steps,
            warm_start_batch_size and warm_start_learning_rate.
        task: whose alphabet the answers are written in.
        splits: its examples.
        device: where to train.
        place: folder to save into.
    """
    rng = random.Random(config.seed)
    torch.manual_seed(config.seed)
    tokenizer = char_tokenizer(task.alphabet, padding_side="right")
    model = tiny_classifier(
        tokenizer, hidden_size=config.hidden_size, num_layers=config.num_layers,
        num_heads=config.num_heads,
    ).to(device)  # fmt: skip
    so_far_head = nn.Linear(config.hidden_size, 1, device=device)

    def batch_loss() -> Tensor:
        drawn = rng.choices(splits.train, k=config.warm_start_batch_size)
        return loss_of(model, tokenizer, so_far_head, labelled(drawn, task.alphabet, rng))

    for _ in supervised_steps(
        nn.ModuleList([model, so_far_head]), batch_loss, config.reward_model_steps,
        config.warm_start_learning_rate,
    ):  # fmt: skip
        pass
    shown = labelled(splits.held_out * 4, task.alphabet, rng)
    count = len(shown.answers)
    scores = model_reward(model, tokenizer)(shown.prompts, shown.answers, [], [True] * count)
    right = ((scores > 0) == shown.right.bool()).float().mean().item()
    print(f"reward model: {right:.3f} of {count} answers to held-out prompts told right from wrong")
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)

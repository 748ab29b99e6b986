"""Verifiable tasks: where prompts come from and how an answer is judged, by rule."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

import torch


class Problem(NamedTuple):
    """A prompt and the one completion that solves it."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Splits:
    """Three sets of problems, no two of which share a sum up to the order of its operands.

    Attributes:
        train: what the model is trained on, by supervision and by reward.
        validation: what decides when the warm start ends and what is plotted during training.
        held_out: what the reported accuracy is measured on, and nothing else.
    """

    train: list[Problem]
    validation: list[Problem]
    held_out: list[Problem]


class Addition:
    """Sums of two whole numbers, the answer written from the units up: "07+85=" gives "290".

    From the units up, every digit depends on two digits of the prompt and one carry, so a model
    of two layers can write it without looking ahead. Leading zeros keep each digit in its place.

    Args:
        max_operand: the largest operand; both operands run from 0 to this.
    """

    alphabet = "0123456789+="

    def __init__(self, max_operand: int = 99):
        self.max_operand = max_operand
        self.digits = len(str(max_operand))
        self.answer_digits = len(str(2 * max_operand))
        self.max_new_tokens = self.answer_digits + 1  # and the end token

    def problem(self, a: int, b: int) -> Problem:
        prompt = f"{a:0{self.digits}d}+{b:0{self.digits}d}="
        return Problem(prompt, answer=f"{a + b:0{self.answer_digits}d}"[::-1])

    def splits(self, seed: int, held_out: int = 300, validation: int = 300) -> Splits:
        """Shuffles all sums and cuts them into three sets.

        a+b and b+a always fall into the same set: a model that has seen one knows the other.
        """
        rng = random.Random(seed)
        pairs = [(a, b) for a in range(self.max_operand + 1) for b in range(a + 1)]
        if len(pairs) <= held_out + validation:
            raise ValueError(
                f"max_operand: expected enough sums to hold {held_out + validation} out of training"
                f", got {len(pairs)} sums for max_operand={self.max_operand}"
            )
        rng.shuffle(pairs)
        either_order = [rng.sample(pair, 2) for pair in pairs[: held_out + validation]]
        both_orders = {p for a, b in pairs[held_out + validation :] for p in ((a, b), (b, a))}
        return Splits(
            train=[self.problem(a, b) for a, b in sorted(both_orders)],
            validation=[self.problem(a, b) for a, b in either_order[held_out:]],
            held_out=[self.problem(a, b) for a, b in either_order[:held_out]],
        )

    def rewards(self, problems: list[Problem], written, tokenizer) -> torch.Tensor:
        """The rewards [B] fp32 of a batch of completions, the i-th of the i-th problem."""
        texts, finished = written.texts(tokenizer), written.finished.tolist()
        judged = map(self.reward, problems, texts, finished)
        return torch.tensor(list(judged))

    def reward(self, problem: Problem, completion: str, finished: bool) -> float:
        """1 for the right answer followed by the end token, else 0.

        Args:
            problem: what was asked.
            completion: what was written, special tokens left out.
            finished: whether the model ended it, rather than the length limit.
        """
        return float(finished and completion == problem.answer)

"""Built-in tasks: prompts that need no download, and answers that a rule judges."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rlkern_loops.data import Example


@dataclass(frozen=True)
class Splits:
    """Three sets of examples that share nothing.

    Attributes:
        train: what the models are trained on, by supervision and by reward.
        validation: what decides when the warm start ends and what is plotted during training.
        held_out: what the reported accuracy is measured on, and nothing else.
    """

    train: list[Example]
    validation: list[Example]
    held_out: list[Example]


class Task(Protocol):
    """What `built_in` hands out.

    Attributes:
        alphabet: what prompts and answers are made of.
        max_new_tokens: the answer and its end token.
        check_every: supervised steps between evaluations in the warm start.
    """

    alphabet: str
    max_new_tokens: int
    check_every: int

    def splits(self, seed: int, held_out: int = 300, validation: int = 300) -> Splits: ...


def solved(
    completions: Sequence[str], answers: Sequence[str], finished: Sequence[bool]
) -> list[float]:
    """The rule of both tasks: 1 for the right answer followed by the end token, else 0."""
    judged = zip(completions, answers, finished, strict=True)
    return [float(ended and completion == answer) for completion, answer, ended in judged]


class Addition:
    """Sums of two whole numbers, the answer written from the units up: "07+85=" gives "290".

    From the units up, every digit depends on two digits of the prompt and one carry, so a model
    of two layers can write it without looking ahead. Leading zeros keep each digit in its place.

    Args:
        max_operand: the largest operand; both operands run from 0 to this.
    """

    alphabet = "0123456789+="
    # It comes slowly: of many evaluations in a row one would be above a bound by chance, and the
    # policy be weaker than it says.
    check_every = 5

    def __init__(self, max_operand: int = 99):
        self.max_operand = max_operand
        self.digits = len(str(max_operand))
        self.answer_digits = len(str(2 * max_operand))
        self.max_new_tokens = self.answer_digits + 1  # and the end token

    def example(self, a: int, b: int) -> Example:
        prompt = f"{a:0{self.digits}d}+{b:0{self.digits}d}="
        return Example(prompt, answer=f"{a + b:0{self.answer_digits}d}"[::-1])

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
            train=[self.example(a, b) for a, b in sorted(both_orders)],
            validation=[self.example(a, b) for a, b in either_order[held_out:]],
            held_out=[self.example(a, b) for a, b in either_order[:held_out]],
        )


class Reversal:
    """Words to be written backwards: "gaceba>" gives "abecag".

    A rule that a small classifier learns nearly perfectly from examples, so that a reward model
    of it is worth learning from.

    Args:
        length: letters of every word.
        count: words altogether, drawn at random without repetition.
    """

    alphabet = "abcdefgh>"
    # From nothing to everything it is ten steps.
    check_every = 1

    def __init__(self, length: int = 6, count: int = 4000):
        self.length = length
        self.count = count
        self.max_new_tokens = length + 1  # and the end token

    def example(self, word: str) -> Example:
        return Example(word + ">", answer=word[::-1])

    def splits(self, seed: int, held_out: int = 300, validation: int = 300) -> Splits:
        """Different words in each set."""
        rng = random.Random(seed)
        letters = self.alphabet[:-1]
        words: dict[str, None] = {}  # in the order they were drawn
        while len(words) < min(self.count, len(letters) ** self.length):
            words["".join(rng.choices(letters, k=self.length))] = None
        examples = list(map(self.example, words))
        cut = held_out + validation
        return Splits(examples[cut:], examples[held_out:cut], examples[:held_out])


def built_in(config: Any) -> Task:
    """The task that a run's options name."""
    if config.task == "addition":
        return Addition(config.max_operand)
    return Reversal(config.word_length)

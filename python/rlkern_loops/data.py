"""Prompts with their answers: where they come from, and the order in which a run sees them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from rlkern_loops.errors import DataError, did_you_mean


class Example(NamedTuple):
    """A prompt and what a verifier or a reward compares its completions with."""

    prompt: str
    answer: str


def load_examples(
    source: str, *, split: str, prompt_column: str, answer_column: str, limit: int | None = None
) -> list[Example]:
    """The examples of a file, a folder or a data set of the Hugging Face hub.

    Args:
        source: a `.jsonl` file of one JSON object a line, or a `.json` file of a list of objects;
            a folder, saved by `datasets` or with data files that `datasets` reads; or a name on
            the hub, "openai/gsm8k:main" for its configuration `main`.
        split: "train", "test", or a slice such as "train[:90%]". A file, and a single data set
            that was saved, has no splits: any name means all of it, and a slice is an error.
        prompt_column: the column of the prompts, text.
        answer_column: the column of the answers, text; "" where the reward asks for none.
        limit: at most this many rows, from the first.

    Raises:
        DataError: the source is not there or cannot be read, has no such split or column, is
            empty, or has a row that is not text (or a blank prompt).
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit: expected at least 1 example, got {limit}")
    path = Path(source)
    if path.suffix in (".jsonl", ".json"):
        _no_slice(source, split)
        rows: Iterable[Any] = _json_rows(path)
    elif path.is_file():
        raise DataError(f"dataset {source!r}: expected a .jsonl or .json file, got {path.suffix!r}")
    else:
        rows = _dataset_rows(source, split)
    columns = [column for column in (prompt_column, answer_column) if column]
    examples = []
    for number, row in enumerate(islice(rows, limit), start=1):
        where = f"dataset {source!r}, row {number}"
        if not isinstance(row, Mapping):
            raise DataError(f"{where}: expected an object with columns, got {type(row).__name__}")
        for column in columns:
            if column not in row:
                raise DataError(
                    f"{where}: no column {column!r}{did_you_mean(column, row)}; "
                    f"there are {', '.join(map(repr, row)) or 'none'}"
                )
            if not isinstance(row[column], str):
                raise DataError(
                    f"{where}, column {column!r}: expected text, got "
                    f"{type(row[column]).__name__} {str(row[column])[:80]}"
                )
        if not row[prompt_column].strip():
            raise DataError(f"{where}, column {prompt_column!r}: expected a prompt, got blank text")
        examples.append(Example(row[prompt_column], row[answer_column] if answer_column else ""))
    if not examples:
        raise DataError(f"dataset {source!r}: expected at least one row, got an empty data set")
    return examples


def _no_slice(source: str, split: str) -> None:
    if not split.isidentifier():
        raise DataError(f"split: expected a plain name, as {source!r} has no splits, got {split!r}")


def _json_rows(path: Path) -> Iterator[Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"dataset {str(path)!r}: cannot be read: {reason}") from error
    if path.suffix == ".json" and text.lstrip().startswith("["):
        yield from _parse(text, path, 1)
        return
    # Not splitlines(): JSON leaves characters such as U+2028 as they are inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _parse(line, path, number)


def _parse(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(f"dataset {str(path)!r}, line {line}: not JSON: {error.msg}") from error


def _dataset_rows(source: str, split: str) -> Iterable[Any]:
    import datasets

    folder = Path(source)
    if not folder.is_dir() and (folder.is_absolute() or source.startswith(".")):
        raise DataError(f"dataset {source!r}: no such folder")
    try:
        if any((folder / name).exists() for name in ("dataset_dict.json", "state.json")):
            found = datasets.load_from_disk(source)
            if isinstance(found, datasets.Dataset):
                _no_slice(source, split)
                return found
            if split not in found:
                raise DataError(
                    f"split: {source!r} has {', '.join(map(repr, found))}, got {split!r}"
                )
            return found[split]
        name, _, config = (source, "", "") if folder.is_dir() else source.partition(":")
        return datasets.load_dataset(name, config or None, split=split)
    except DataError:
        raise
    except Exception as error:  # of the file system, of the network, or of a builder
        # The first line says what is wrong, the rest are hints and addresses.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"dataset {source!r}, split {split!r}: {reason}") from error


def render(
    example: Example, tokenizer: Any, *, chat_template: bool, system_prompt: str | None = None
) -> str:
    """The text that the model reads: the bare prompt, or a conversation that it is to answer.

    With `chat_template` the template writes the special tokens itself: tokenize the result with
    `add_special_tokens=False`, or the first token stands there twice.

    Raises:
        DataError: the tokenizer has no chat template, the template refuses the messages, or a
            system prompt is given where there is no chat.
    """
    if not chat_template:
        if system_prompt:
            raise DataError("system_prompt: expected none without chat_template, got one")
        return example.prompt
    if not tokenizer.chat_template:
        raise DataError("chat_template: the tokenizer has none; leave it out, or use a chat model")
    messages = [{"role": "user", "content": example.prompt}]
    if system_prompt:
        messages.insert(0, {"role": "system", "content": system_prompt})
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # jinja2's, whose classes are no dependency of ours
        raise DataError(f"chat_template: {error}") from error


def fit_prompts(
    examples: Sequence[Example],
    tokenizer: Any,
    max_prompt_tokens: int,
    *,
    add_special_tokens: bool = True,
) -> tuple[list[Example], int]:
    """The examples whose prompts have at most `max_prompt_tokens` tokens, and how many have more.

    Raises:
        DataError: none is left.
    """
    prompts = [example.prompt for example in examples]
    ids = tokenizer(prompts, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    kept = [e for e, one in zip(examples, ids, strict=True) if len(one) <= max_prompt_tokens]
    if not kept:
        shortest = min(map(len, ids))
        raise DataError(
            f"max_prompt_tokens: expected at least {shortest}, the length of the shortest of "
            f"{len(examples)} prompts, got {max_prompt_tokens}"
        )
    return kept, len(examples) - len(kept)


def hold_out(
    examples: Sequence[Example], count: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """Cuts examples into those to train on and `count` held out, at random by `seed`.

    A prompt that occurs several times never falls on both sides: what repeats a held-out prompt is
    left out of training.

    Raises:
        DataError: nothing would be left to train on.
    """
    shuffled = random.Random(seed).sample(list(examples), len(examples))
    held_out, rest = shuffled[:count], shuffled[count:]
    asked = {example.prompt for example in held_out}
    train = [example for example in rest if example.prompt not in asked]
    if count < 0 or not train:
        raise DataError(
            f"eval_size: expected fewer than the {len(examples)} examples there are, and others "
            f"to train on, got {count}"
        )
    return train, held_out


class Sampler:
    """Hands out examples in an order that is shuffled anew every epoch and can be resumed.

    The order depends on `seed` and the epoch alone. A batch at the end of an epoch goes on with the
    first of the next.
    """

    def __init__(self, examples: Sequence[Example], seed: int):
        if not examples:
            raise DataError("examples: expected at least one, got none")
        self.examples = list(examples)
        self.seed = seed
        text = json.dumps(self.examples)
        self._digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._shuffle(0)
        self.position = 0

    def next(self, count: int) -> list[Example]:
        """The next `count` examples."""
        batch: list[Example] = []
        while len(batch) < count:
            if self.position == len(self.examples):
                self._shuffle(self.epoch + 1)
                self.position = 0
            taken = self._order[self.position : self.position + count - len(batch)]
            batch += [self.examples[i] for i in taken]
            self.position += len(taken)
        return batch

    def _shuffle(self, epoch: int) -> None:
        self.epoch = epoch
        self._order = list(range(len(self.examples)))
        random.Random(f"{self.seed}/{epoch}").shuffle(self._order)

    def state_dict(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self.position,
            "examples": self._digest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken.

        Raises:
            DataError: it was taken with another seed or over other examples.
        """
        for name, ours in (("seed", self.seed), ("examples", self._digest)):
            if state[name] != ours:
                raise DataError(
                    f"{name}: the checkpoint was written with other {name} than this run's "
                    f"({state[name]}, here {ours}); resume with the same, or start a new run"
                )
        self._shuffle(state["epoch"])
        self.position = state["position"]

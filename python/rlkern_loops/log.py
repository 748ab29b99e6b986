"""What a run leaves behind: JSON lines as it goes, rows on the console, curves at the end."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.text import Text
from tqdm import tqdm

from rlkern_loops import trackers
from rlkern_loops.errors import LogError, shorten
from rlkern_loops.plots import plot_curves

T = TypeVar("T")

# The columns of the console, those of them that the run measures: metric, heading, format.
_COLUMNS = (
    ("rollout/reward", "reward", ".3f"),
    ("eval/accuracy", "accuracy", ".3f"),
    ("eval/reward", "eval", ".3f"),
    ("losses/policy_loss", "loss", ".4f"),
    ("losses/value_loss", "value loss", ".4f"),
    ("losses/explained_variance", "expl. var", ".3f"),
    ("losses/kl", "kl", ".4f"),
    ("losses/entropy", "entropy", ".3f"),
    ("losses/clipfrac", "clipfrac", ".3f"),
    ("rollout/length", "length", ".1f"),
    ("rollout/finished", "finished", ".3f"),
    ("charts/learning_rate", "lr", ".1e"),
)
_WIDTH = 10
_HEADING_EVERY = 25
# Characters of a prompt, and of a completion, on the console; the file has all of them.
_SHOWN = 1000


class RunLog:
    """The log of one run: `metrics.jsonl`, `samples.jsonl`, the console, trackers and curves.

    `metrics.jsonl` holds one JSON object a line: the options (phase "config"), whatever `write`
    is given, and one record a step (phase "train") with its metrics under cleanrl's names.

    Args:
        folder: made if it is not there; an earlier run's log is replaced, unless this run goes on
            from a checkpoint.
        config: the run's options, a dataclass.
        report_to: trackers that get the metrics as well: "tensorboard", "wandb", "trackio". One
            that fails later on is left out from there, with a warning.
        resumed_step: the steps that were done when the checkpoint was written that the run goes on
            from. What was logged beyond it is cut, so that the files read as one run.
        total_steps: the run's length, for the progress bar.
        print_every: steps between rows on the console.

    Raises:
        LogError: the folder cannot be written (here, and in every call that writes), or a tracker
            is unknown or not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        config: Any,
        *,
        report_to: Sequence[str] = (),
        resumed_step: int | None = None,
        total_steps: int | None = None,
        print_every: int = 1,
    ):
        self.folder = Path(folder)
        self.path = self.folder / "metrics.jsonl"
        self.samples_path = self.folder / "samples.jsonl"
        self.records: list[dict[str, Any]] = []
        self.resumed_step = resumed_step
        self.total_steps = total_steps
        self.print_every = print_every
        self._columns: list[tuple[str, str, str]] = []
        self._rows = 0
        self._console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
        options = dataclasses.asdict(config)
        trackers.check_installed(report_to)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            kept: list[dict[str, Any]] = []
            if resumed_step is not None:
                kept = _until(_read(self.path), resumed_step)
                if samples := _read(self.samples_path):
                    _replace(self.samples_path, [s for s in samples if s["step"] <= resumed_step])
            else:
                self.samples_path.unlink(missing_ok=True)
            self.records = [
                {"phase": "config", **options},
                *(record for record in kept if record.get("phase") != "config"),
            ]
            _replace(self.path, self.records)
        except OSError as error:
            raise LogError(f"cannot write the log in {self.folder}: {error.strerror}") from error
        self._trackers = [
            trackers.start(name, self.folder, options, resumed_step) for name in report_to
        ]

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a record of any kind; its "phase" says which."""
        self.records.append(dict(record))
        self._append(self.path, [record])

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs the metrics of a training step everywhere.

        Args:
            step: from 1; the steps that are done.
            metrics: numbers under cleanrl's names, such as losses/policy_loss and rollout/reward.
        """
        numbers = {name: float(value) for name, value in metrics.items()}
        self.write({"phase": "train", "step": step, **numbers})
        self._track(step, numbers)
        evaluated = any(name.startswith("eval/") for name in numbers)
        if step % self.print_every == 0 or step == self.total_steps or evaluated:
            self._print_row(step, numbers)

    def _track(self, step: int, metrics: dict[str, float]) -> None:
        for tracker in list(self._trackers):
            try:
                tracker.log(step, metrics)
            except Exception as error:  # a lost connection must not cost the run
                self._trackers.remove(tracker)
                warnings.warn(
                    f"{tracker.name} gets no more metrics, {self.path} has them all: {error}",
                    RuntimeWarning,
                    stacklevel=3,
                )

    def _print_row(self, step: int, metrics: dict[str, float]) -> None:
        # A metric that comes later, as an evaluation's does, gets a column and a new heading.
        columns = [c for c in _COLUMNS if c in self._columns or c[0] in metrics]
        if columns != self._columns:
            self._columns, self._rows = columns, 0
        if self._rows % _HEADING_EVERY == 0:
            headings = "".join(f"{heading:>{_WIDTH + 1}}" for _, heading, _ in self._columns)
            self.print(Text(f"{'step':>6}{headings}", style="bold"))
        self._rows += 1
        cells = [
            f"{metrics[name]:>{_WIDTH + 1}{form}}" if name in metrics else " " * (_WIDTH + 1)
            for name, _, form in self._columns
        ]
        self.print(f"{step:>6}{''.join(cells)}".rstrip())

    def samples(
        self,
        step: int,
        prompts: Sequence[str],
        completions: Sequence[str],
        rewards: Sequence[float],
        *,
        shown: int = 1,
    ) -> None:
        """Keeps completions with their rewards in `samples.jsonl`, and prints the first `shown`."""
        rows = zip(prompts, completions, map(float, rewards), strict=True)
        found = [
            {"step": step, "prompt": prompt, "completion": completion, "reward": reward}
            for prompt, completion, reward in rows
        ]
        self._append(self.samples_path, found)
        for one in found[:shown]:
            self.print(
                Text.assemble(
                    (f"step {step}, reward {one['reward']:.3f}: ", "dim"),
                    shorten(str(one["prompt"]), _SHOWN),
                    (shorten(str(one["completion"]), _SHOWN), "bold"),
                )
            )  # fmt: skip

    def progress(self, iterable: Iterable[T]) -> Iterator[T]:
        """The steps that are left, with a progress bar where the errors go to a terminal."""
        yield from tqdm(
            iterable,
            total=self.total_steps,
            initial=self.resumed_step or 0,
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )

    def print(self, line: Any) -> None:
        """A line on the console, above the progress bar; a text's brackets are no markup."""
        with tqdm.external_write_mode():
            self._console.print(line)

    def close(self) -> None:
        """Draws `curves.png` of the whole run, and ends the trackers."""
        for tracker in self._trackers:
            tracker.close()
        try:
            plot_curves(self.records, self.folder / "curves.png", self.folder.resolve().name)
        except OSError as error:
            raise LogError(
                f"cannot write {self.folder / 'curves.png'}: {error.strerror}"
            ) from error

    def _append(self, path: Path, records: Sequence[Mapping[str, Any]]) -> None:
        try:
            with path.open("a", encoding="utf-8") as file:
                file.writelines(map(_line, records))
        except OSError as error:
            raise LogError(
                f"cannot write {path}: {error.strerror}; the checkpoints in {self.folder} are "
                "untouched"
            ) from error


def _line(record: Mapping[str, Any]) -> str:
    # JSON has no NaN and no infinity; Python writes them anyway, and other readers stop there.
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
    return json.dumps(finite) + "\n"


def _read(path: Path) -> list[dict[str, Any]]:
    """The records of a file up to the first broken line, which a killed run can leave."""
    records: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records


def _until(records: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    """The records before the first training step beyond `step`, without an earlier end's result."""
    for i, record in enumerate(records):
        if record.get("phase") == "train" and record["step"] > step:
            records = records[:i]
            break
    return [record for record in records if record.get("phase") != "result"]


def _replace(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Writes a file anew, whole or not at all."""
    staged = path.with_name(path.name + ".new")
    staged.write_text("".join(map(_line, records)), encoding="utf-8")
    os.replace(staged, path)

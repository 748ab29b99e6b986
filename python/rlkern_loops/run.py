"""The bookkeeping of a run: its seed and device, its log, checkpoints to go on from, its end."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from rlkern_loops import checkpoint
from rlkern_loops.data import Example
from rlkern_loops.errors import CheckpointError, RunError, shorten
from rlkern_loops.log import RunLog
from rlkern_loops.options import FIXED, RunConfig, changed
from rlkern_loops.rollout import Completions


class Run:
    """Where a run stands, and what it leaves on disk.

    In the order of use: `Run(config)`, `start` with everything that has a state, `begin`,
    `steps`, `record` after each, `save_model`, `finish`.

    Attributes:
        device: "cpu" or a GPU's name.
        resumed: whether the run goes on from a checkpoint.
        facts: numbers to keep over an interruption.
    """

    def __init__(self, config: RunConfig):
        self.config = config
        self.device = config.device
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.set_num_threads(config.threads)
        if not sys.stderr.isatty():
            transformers_logging.disable_progress_bar()
        self.facts: dict[str, float] = {}
        self._warned: set[str] = set()
        self._clock = time.perf_counter()
        self._found = None
        if config.resume:
            self._found = checkpoint.resume(config.output_dir, config.resume)
            if self._found is not None:
                self._compare(*self._found)
            elif earlier := checkpoint.previous(config.output_dir):
                print(f"no checkpoint to go on from, a new run starts; an earlier one's: {earlier}")
        self.resumed = self._found is not None

    def start(self, **parts: Any) -> None:
        """Seeds every generator, takes the parts back to the checkpoint's state.

        Args:
            **parts: what has state_dict() and load_state_dict(): models, optimizers, the sampler.

        Raises:
            RunError: the checkpoint is of another loop, model or data.
        """
        self.parts = parts
        self._saved = 0
        random.seed(self.config.seed)
        numpy.random.seed(self.config.seed % 2**32)
        torch.manual_seed(self.config.seed)
        if self._found is not None:
            self._saved, state = self._found
            try:
                for name, part in parts.items():
                    part.load_state_dict(state["parts"][name])
            except (KeyError, ValueError, RuntimeError) as error:
                reason = shorten(" ".join(str(error).split()))  # torch lists every weight
                raise CheckpointError(
                    f"the checkpoint of step {self._saved} is of another model: its {name} does "
                    f"not fit: {reason}"
                ) from error
            self.facts = state["facts"]
            self._clock -= self.facts.pop("seconds")
            checkpoint.set_rng_state(state["rng"])
            self._found = None  # its tensors are as large as the run's
            print(f"going on after step {self._saved}")
            if self._saved > self.config.steps:
                print(f"steps: that is more than {self.config.steps}, nothing is left to train")
        self._mark(self._saved)

    def begin(self, eval_name: str, evaluate: Callable[[], float]) -> None:
        """Evaluates a new run on held-out examples, then opens the log, in the place of an earlier
        run's, whose checkpoints it sets aside.

        Only then: a start that fails over a model, the data or a reward leaves the earlier run
        alone.
        """
        if not self.resumed:
            self.facts["accuracy_before"] = evaluate()
            print(f"at the start: {eval_name} {self.facts['accuracy_before']:.3f}, held out")
        if not self.config.resume:
            if moved := checkpoint.set_aside(self.config.output_dir):
                print(f"the checkpoints of an earlier run are in {moved} now")
        self.log = RunLog(
            self.config.output_dir, self.config, report_to=self.config.report_to,
            resumed_step=self.done if self.resumed else None, total_steps=self.config.steps,
            print_every=self.config.print_every,
        )  # fmt: skip

    def _compare(self, step: int, state: dict[str, Any]) -> None:
        """Says which options are others than the checkpoint's, and refuses what cannot be."""
        ours, theirs = type(self.config).__name__, state.get("loop")
        if theirs not in (None, ours):
            raise CheckpointError(
                f"the checkpoint of step {step} is of another loop: expected one with the options "
                f"of {ours}, got {theirs}'s; choose another output_dir, or start a new run"
            )
        before = state["config"]
        names = changed(self.config, before)
        for name in names:
            if name in FIXED:
                raise CheckpointError(
                    f"{name}: the checkpoint was written with {before.get(name)!r}, got "
                    f"{getattr(self.config, name)!r}; resume with the same, or start a new run"
                )
        if names:
            print(f"going on with other options than before: {', '.join(names)}")

    def steps(self) -> Iterator[int]:
        """The steps that are left, numbered from 1."""
        yield from self.log.progress(range(self.done + 1, self.config.steps + 1))

    @contextlib.contextmanager
    def rescued(self) -> Iterator[None]:
        """Around the steps and the last evaluation: an error leaves a checkpoint to go on from,
        with save_every 0 too.

        It holds the weights as they are, which a loss that was not finite did not change, with the
        random generators and the place in the data of the step's beginning: the step is repeated.
        """
        try:
            yield
        except CheckpointError:
            raise
        except RunError as error:
            if not self.done:
                raise
            if self._saved != self.done:
                self._save()
            latest = checkpoint.latest(self.config.output_dir)
            raise type(error)(
                f"{error}; --resume auto goes on after step {self.done}, from {latest}"
            ) from error

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Logs a step that is done, and saves a checkpoint where one is due."""
        self._mark(step)
        self.log.step(step, metrics)
        self._warn_of_silence(metrics)
        every = self.config.save_every
        if every and (step % every == 0 or step == self.config.steps):
            self._save()

    def samples(
        self, step: int, examples: Sequence[Example], written: Completions, tokenizer, rewards
    ) -> None:
        """Prints a completion of a step where it is due, and keeps all of them."""
        every = self.config.samples_every
        if every and step % every == 0:
            prompts = [example.prompt for example in examples]
            self.log.samples(step, prompts, written.texts(tokenizer), rewards.tolist())

    def _warn_of_silence(self, metrics: dict[str, float]) -> None:
        """Says once of each cause why no reward is learned from: the run goes on, as the next
        step may have one."""
        found = []
        if metrics["rollout/no_verdict"] == 1:
            reward = repr(self.config.reward) if self.config.reward else "the task's reward"
            found.append(f"{reward} gave none of the completions a number (None or NaN)")
        if self.config.mask_truncated and metrics["rollout/finished"] == 0:
            found.append(
                "max_new_tokens cut all completions off, and mask_truncated leaves them out"
            )
        for cause in found:
            if cause not in self._warned:
                self._warned.add(cause)
                self.log.print(f"warning: step {self.done} learned from no reward: {cause}")

    def _mark(self, step: int) -> None:
        """Notes that a step is done, and what changes before the next one's weights do: the random
        generators and the states without tensors."""
        self.done = step
        self._light = {
            name: part.state_dict() for name, part in self.parts.items()
            if not isinstance(part, (torch.nn.Module, torch.optim.Optimizer))
        }  # fmt: skip
        self._rng = checkpoint.rng_state()

    def _save(self) -> None:
        parts = {name: self._light.get(name) or p.state_dict() for name, p in self.parts.items()}
        state = {
            "loop": type(self.config).__name__,
            "config": dataclasses.asdict(self.config), "rng": self._rng, "parts": parts,
            "facts": self.facts | {"seconds": time.perf_counter() - self._clock},
        }  # fmt: skip
        checkpoint.save(self.config.output_dir, self.done, state, keep=self.config.keep_checkpoints)
        self._saved = self.done

    def save_model(self, model: Any, tokenizer: Any) -> None:
        """Saves the model in transformers' format under output_dir/model."""
        folder = Path(self.config.output_dir) / "model"
        try:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        except (OSError, SafetensorError) as error:
            raise RunError(f"cannot save the model to {folder}: {error}") from error

    def finish(self, eval_name: str, after: float, examples: int) -> dict[str, float]:
        """Ends the log and says what came of the run: the held-out figures before and after, and
        the seconds that all of it took."""
        before, seconds = self.facts["accuracy_before"], time.perf_counter() - self._clock
        result = {"accuracy_before": before, "accuracy_after": after, "seconds": seconds}
        self.log.write({"phase": "result", **result})
        self.log.close()
        loop = type(self.config).__name__.removesuffix("Config")
        print(
            f"greedy {eval_name.removeprefix('eval/')} on {examples} held-out problems: "
            f"{before:.3f} before, {after:.3f} after {loop} ({seconds:.0f} s on {self.device}); "
            f"model, curves and metrics in {self.config.output_dir}"
        )
        return result

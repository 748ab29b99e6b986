"""What both loops can be told: one dataclass, whose fields `rlkern train ... --help` explains."""

from __future__ import annotations

import math
import re
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch

from rlkern import PolicyLoss
from rlkern_loops import trackers

# Fields of PolicyLoss that a run may set over its preset's.
OVERRIDES = ("clip_low", "clip_high", "kl_coef", "kl_estimator", "entropy_coef", "aggregation")
# Options that say where a run is kept and how it is watched, and not what it computes.
ABOUT_THE_RECORD = frozenset(
    {"output_dir", "resume", "report_to", "print_every", "samples_every", "save_every",
     "keep_checkpoints", "eval_every"}
)  # fmt: skip

# Options that a run which goes on cannot change: its weights and its data are made by them.
FIXED = (
    "task", "model", "dataset", "seed", "max_operand", "word_length", "hidden_size", "num_layers",
    "num_heads", "critic",
)  # fmt: skip


def option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class RunConfig:
    """Options that GRPO and PPO share.

    Raises:
        ValueError: an option out of its range, or one that the others contradict, by name.
        LogError: a tracker that is unknown or not installed.
    """

    output_dir: str = option("runs/run", "Folder of everything that the run writes.")
    seed: int = option(1, "Of the data's order, the new weights and the sampling.")
    device: str = option("auto", "cpu, cuda, cuda:<number>, or auto: a GPU if there is one.")
    threads: int = option(1, "CPU threads; for the built-in tasks' small matrices 1 is fastest.")
    operators: Literal["rlkern", "eager"] = option(
        "rlkern", "Whose operators compute: rlkern's kernels, or eager PyTorch to compare with."
    )

    task: Literal["addition", "reversal"] = option(
        "addition", "The built-in task, where no dataset is given."
    )
    model: str | None = option(
        None, "A causal LM: hub name or folder. Left out: the built-in task's own small one."
    )
    precision: Literal["fp32", "bf16"] = option(
        "fp32", "bf16: autocast over fp32 weights; models that are not trained are held in bf16."
    )
    attention: Literal["auto", "flash", "sdpa", "eager"] = option(
        "auto",
        "flash: flash-attn over packed sequences; auto: that on a GPU with bf16 where it is "
        "installed, else sdpa (scaled_dot_product_attention).",
    )
    gradient_checkpointing: bool = option(
        False, "Make activations again in the backward pass instead of keeping them."
    )

    dataset: str | None = option(
        None, "A datasets name, a folder saved by datasets, or a .jsonl file. Needs model."
    )
    dataset_split: str = option("train", "Split of the dataset to train on.")
    prompt_column: str = option("prompt", "Column with the prompts.")
    answer_column: str = option("answer", "Column with what the reward compares with.")
    limit: int | None = option(None, "Read at most this many rows.")
    eval_dataset: str | None = option(
        None, "Data to evaluate on, as dataset. Left out: eval_size examples are held out."
    )
    eval_split: str = option("test", "Split of eval_dataset.")
    eval_size: int = option(200, "Examples to evaluate on, at most.")
    chat_template: bool = option(False, "Put prompts into the tokenizer's chat template.")
    system_prompt: str | None = option(None, "System message; needs chat_template.")
    max_prompt_tokens: int = option(512, "Longer prompts are left out, and counted.")

    reward: str | None = option(
        None,
        "A verifier's name, several with weights (numeric+0.2*format_tags), module:function, or "
        "model:NAME_OR_FOLDER. Needed with dataset; left out: the built-in task's.",
    )
    eval_reward: str | None = option(
        None, "The same, for greedy completions in evaluations. Left out: reward."
    )
    mask_truncated: bool = option(
        False, "Completions cut off by max_new_tokens teach nothing (DAPO's overlong filtering)."
    )

    steps: int = option(400, "Rounds of sampling and learning.")
    prompts_per_step: int = option(64, "Prompts per round.")
    max_new_tokens: int | None = option(
        None, "Longest completion. Left out: what the built-in task needs; 256 with a dataset."
    )
    temperature: float = option(1.0, "Of the softmax that completions are drawn from.")
    top_p: float = option(1.0, "Draw from the fewest tokens that have this probability together.")
    rollout_batch_size: int = option(0, "Completions drawn at a time; 0: all of a round.")

    loss: str = option("dapo", "A preset of rlkern.PolicyLoss.")
    clip_low: float | None = option(None, "Over the preset's: the ratio's lower bound is 1 - this.")
    clip_high: float | None = option(
        None, "Over the preset's: the ratio's upper bound is 1 + this."
    )
    kl_coef: float | None = option(
        None, "Over the preset's: weight of the KL to the model at the start; 0 leaves it out."
    )
    kl_estimator: str | None = option(
        None, "Over the preset's: k1, k2, k3, abs, a _st form, or exact: over the whole vocabulary."
    )
    entropy_coef: float | None = option(None, "Over the preset's: weight of the entropy bonus.")
    aggregation: str | None = option(
        None, "Over the preset's: how tokens are averaged (docs/losses.md)."
    )

    epochs: int = option(1, "Passes over a round's completions.")
    minibatches: int = option(4, "Optimizer steps per pass.")
    micro_batch_size: int = option(
        0, "Completions per forward and backward pass, gradients accumulated; 0: a mini-batch."
    )
    learning_rate: float | None = option(
        None, "Of AdamW. Left out: 1e-3 for a built-in task's small model, else 1e-6."
    )
    warmup_steps: int = option(10, "Rounds in which the learning rate rises from 0.")
    final_learning_rate: float = option(
        0.1, "The learning rate falls linearly to this share of itself; 1 keeps it."
    )
    weight_decay: float = option(0.0, "Of AdamW.")
    max_grad_norm: float = option(1.0, "The gradient's norm is clipped to this.")

    eval_every: int = option(10, "Rounds between greedy evaluations.")
    save_every: int = option(50, "Rounds between checkpoints; 0: none.")
    keep_checkpoints: int = option(2, "How many checkpoints stay on disk.")
    resume: str | None = option(
        None, "auto: go on from output_dir's newest whole checkpoint, if any; or a checkpoint."
    )
    report_to: list[str] = field(
        default_factory=list,
        metadata={"help": "tensorboard, wandb, trackio: trackers beside metrics.jsonl."},
    )
    print_every: int = option(10, "Rounds between lines of the console's table.")
    samples_every: int = option(50, "Rounds between printed completions; 0: none.")

    max_operand: int = option(99, "addition: operands of the sums run from 0 to this.")
    word_length: int = option(8, "reversal: letters of a word.")
    hidden_size: int = option(64, "Width of the built-in tasks' models.")
    num_layers: int = option(2, "Layers of the built-in tasks' models.")
    num_heads: int = option(4, "Attention heads of the built-in tasks' models.")
    warm_start_accuracy: float = option(0.25, "Validation accuracy that ends the warm start.")
    warm_start_steps: int = option(1500, "At most this many supervised steps.")
    warm_start_batch_size: int = option(128, "Demonstrations per supervised step.")
    warm_start_learning_rate: float = option(2e-3, "Of AdamW in the warm start.")
    reward_model_steps: int = option(
        600, "PPO: supervised steps of the built-in task's reward model, in such batches."
    )

    # What the numbers of this class may be; a subclass adds its own.
    RANGES = {
        # More threads than any machine has crash OpenMP; the sums grow as max_operand squared, and
        # below 34 there are too few to hold 600 out of training; torch takes 64 bits of seed.
        "threads": (1, 1024), "max_operand": (34, 999), "seed": (0, 2**63 - 1),
        "word_length": (4, 16), "warm_start_accuracy": (0, 1), "temperature": (1e-3, 1e3),
        "top_p": (1e-6, 1), "final_learning_rate": (0, 1),
    }  # fmt: skip
    LEAST = {
        "hidden_size": 1, "num_layers": 1, "num_heads": 1, "warm_start_steps": 0,
        "warm_start_batch_size": 1, "reward_model_steps": 0, "limit": 1, "eval_size": 1,
        "max_prompt_tokens": 1, "steps": 0, "prompts_per_step": 1, "max_new_tokens": 1,
        "rollout_batch_size": 0, "epochs": 1, "minibatches": 1, "micro_batch_size": 0,
        "warmup_steps": 0, "weight_decay": 0, "eval_every": 1, "save_every": 0,
        "keep_checkpoints": 1, "print_every": 1, "samples_every": 0, "kl_coef": 0,
        "entropy_coef": 0, "clip_low": 0, "clip_high": 0,
    }  # fmt: skip
    POSITIVE = ("learning_rate", "warm_start_learning_rate", "max_grad_norm")

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_source()
        self._check_model()
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", 1e-6 if self.model else 1e-3)
        if self.minibatches > self.completions_per_step:
            raise ValueError(
                f"minibatches: expected at most the {self.completions_per_step} completions of a "
                f"step, got {self.minibatches}"
            )
        self.objective()
        check_device(self.device)
        check_folder(self.output_dir)
        trackers.check_installed(self.report_to)

    @property
    def completions_per_step(self) -> int:
        return self.prompts_per_step

    def overrides(self) -> dict[str, Any]:
        """Fields of PolicyLoss to set over the preset's."""
        given = {name: getattr(self, name) for name in OVERRIDES}
        return {name: value for name, value in given.items() if value is not None}

    def objective(self) -> PolicyLoss:
        """The loss that `loss` and the options over it describe."""
        try:
            return PolicyLoss.preset(self.loss, **self.overrides())
        except (TypeError, ValueError) as error:
            # rlkern names its arguments as here, but for the preset.
            raise ValueError(re.sub("^preset:", "loss:", str(error))) from error

    def _check_numbers(self) -> None:
        def given(bounds):
            found = ((name, bound, getattr(self, name)) for name, bound in bounds.items())
            return ((name, bound, value) for name, bound, value in found if value is not None)

        for name, (low, high), value in given(self.RANGES):
            if not low <= value <= high:
                raise ValueError(f"{name}: expected a number from {low} to {high}, got {value}")
        for name, bound, value in given(self.LEAST):
            if not value >= bound:
                raise ValueError(f"{name}: expected at least {bound}, got {value}")
            if not math.isfinite(value):
                raise ValueError(f"{name}: expected a finite number, got {value}")
        for name, _, value in given(dict.fromkeys(self.POSITIVE)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {value}")

    def _check_source(self) -> None:
        def needs(name: str, because: str) -> None:
            raise ValueError(f"{name}: expected one, as {because}, got None")

        if self.dataset is not None:
            if self.model is None:
                needs("model", "the built-in task's model knows only its own prompts")
            if self.reward is None:
                needs("reward", "only the built-in tasks bring one")
        else:
            for name in ("eval_dataset", "limit"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}: expected None without dataset, got {getattr(self, name)!r}"
                    )
        if self.system_prompt is not None and not self.chat_template:
            raise ValueError(
                f"system_prompt: expected None without chat_template, got {self.system_prompt!r}"
            )

    def _check_model(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size: expected a multiple of num_heads = {self.num_heads}, "
                f"got {self.hidden_size}"
            )
        if self.attention == "flash" and self.precision != "bf16":
            raise ValueError("attention: expected sdpa or eager with precision fp32, got 'flash'")


def changed(config: RunConfig, before: dict[str, Any]) -> list[str]:
    """Options that shape what is computed and differ from an earlier run's, by name."""
    names = [f.name for f in fields(config) if f.name not in ABOUT_THE_RECORD]
    return [name for name in names if before.get(name, MISSING) != getattr(config, name)]


def check_device(name: str) -> None:
    """Raises ValueError for a device that this machine does not have."""
    if name in ("auto", "cpu"):
        return
    if not re.fullmatch(r"cuda(:\d{1,3})?", name):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:<number>, got {name!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise ValueError(f"device: expected auto or cpu, as torch finds no GPU here, got {name!r}")
    if int(name.partition(":")[2] or 0) >= count:
        raise ValueError(f"device: expected one of the {count} GPUs here, got {name!r}")


def check_folder(name: str) -> None:
    """Raises ValueError for a folder that cannot be made because a file is in the way."""
    if not name.strip():
        raise ValueError(f"output_dir: expected a folder, got {name!r}")
    folder = Path(name)
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise ValueError(
                f"output_dir: expected a folder, or one that can be made, got {name!r}, "
                f"where {str(place)!r} is a file"
            )

"""GRPO from one file: a small language model learns to add, rewarded by a rule.

    python -m rlkern_loops.grpo [--steps 400 --seed 1 ...]

A randomly initialised model is first shown a few right answers, until it is right now and then;
from there on it learns from rewards alone. For each prompt it writes a group of completions, and
each reward is normalised by its group's mean and standard deviation (Shao et al., 2024,
https://arxiv.org/abs/2402.03300). Log-probabilities, entropy, advantages and the loss come from
rlkern.
"""

from __future__ import annotations

import copy
import math
import random
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import HfArgumentParser

from rlkern import Metrics, PolicyLoss, group_advantages
from rlkern_loops.log import RunLog, plot_curves
from rlkern_loops.model import char_tokenizer, tiny_gpt2
from rlkern_loops.rollout import Completions, completion_hidden, completion_logprobs, sample
from rlkern_loops.tasks import Addition, Problem
from rlkern_loops.warmstart import warm_start

# cleanrl's names for the metrics of the loss.
LOGGED = {
    "losses/policy_loss": "policy_loss",
    "losses/approx_kl": "approx_kl",
    "losses/clipfrac": "clip_frac",
    "losses/entropy": "entropy",
    "losses/kl": "kl",
}


def option(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class GRPOConfig:
    """Options of a run; `--help` prints them."""

    output_dir: str = option("runs/grpo", "Folder for metrics.jsonl and curves.png.")
    seed: int = option(1, "Of the problems' split, the weights and the sampling.")
    device: str = option("auto", "cpu, cuda, or auto: a GPU if there is one.")
    threads: int = option(1, "CPU threads; for matrices this small more of them are slower.")

    max_operand: int = option(99, "Operands of the sums run from 0 to this.")
    hidden_size: int = option(64, "Width of the model.")
    num_layers: int = option(2, "Layers of the model.")
    num_heads: int = option(4, "Attention heads.")

    warm_start_accuracy: float = option(0.25, "Validation accuracy that ends the warm start.")
    warm_start_steps: int = option(1500, "At most this many supervised steps.")
    warm_start_batch_size: int = option(128, "Demonstrations per supervised step.")
    warm_start_learning_rate: float = option(2e-3, "Of AdamW in the warm start.")

    steps: int = option(400, "Rounds of sampling and learning.")
    prompts_per_step: int = option(64, "Prompts per round.")
    group_size: int = option(8, "Completions per prompt (G), at least 2.")
    temperature: float = option(1.0, "Of the softmax that completions are drawn from.")
    epochs: int = option(1, "Passes over a round's completions.")
    minibatches: int = option(4, "Optimizer steps per pass.")
    learning_rate: float = option(1e-3, "Of AdamW; falls linearly to a tenth.")
    max_grad_norm: float = option(1.0, "The gradient's norm is clipped to this.")
    clip_low: float = option(0.2, "The ratio is clipped at 1 - clip_low.")
    clip_high: float = option(0.28, "The ratio is clipped at 1 + clip_high.")
    kl_coef: float = option(0.0, "Weight of the k3 KL to the warm-started model; 0 leaves it out.")
    entropy_coef: float = option(0.0, "Weight of the entropy bonus.")
    advantage_eps: float = option(1e-4, "Added to a group's standard deviation.")

    eval_every: int = option(10, "Rounds between greedy evaluations on validation problems.")
    shuffle_rewards: bool = option(False, "Control: hand out each round's rewards at random.")

    def __post_init__(self) -> None:
        # More threads than any machine has crash OpenMP; the sums grow as max_operand squared, and
        # below 34 there are too few to hold 600 out of training; torch takes 64 bits of seed.
        ranges = {
            "threads": (1, 1024), "max_operand": (34, 999), "seed": (0, 2**63 - 1),
            "warm_start_accuracy": (0, 1), "temperature": (1e-3, 1e3),
        }  # fmt: skip
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(
                    f"{name}: expected a number from {low} to {high}, got {getattr(self, name)}"
                )
        least = {
            "hidden_size": 1, "num_layers": 1, "num_heads": 1,
            "warm_start_steps": 0, "warm_start_batch_size": 1, "steps": 0, "prompts_per_step": 1,
            "group_size": 2, "epochs": 1, "minibatches": 1, "eval_every": 1, "kl_coef": 0,
            "entropy_coef": 0, "advantage_eps": 0, "clip_low": 0, "clip_high": 0,
        }  # fmt: skip
        for name, bound in least.items():
            if not getattr(self, name) >= bound:
                raise ValueError(f"{name}: expected at least {bound}, got {getattr(self, name)}")
        for name in ("kl_coef", "entropy_coef", "advantage_eps"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}: expected a finite number, got {getattr(self, name)}")
        for name in ("learning_rate", "warm_start_learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if not self.clip_low < 1:
            raise ValueError(f"clip_low: expected an offset below 1, got {self.clip_low}")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size: expected a multiple of num_heads = {self.num_heads}, "
                f"got {self.hidden_size}"
            )
        completions = self.prompts_per_step * self.group_size
        if self.minibatches > completions:
            raise ValueError(
                f"minibatches: expected at most prompts_per_step * group_size = {completions}, "
                f"got {self.minibatches}"
            )
        check_device(self.device)
        folder = Path(self.output_dir)
        for place in (folder, *folder.parents):
            if place.exists() and not place.is_dir():
                raise ValueError(
                    f"output_dir: expected a folder, or one that can be made, got "
                    f"{self.output_dir!r}, where {str(place)!r} is a file"
                )


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


# ---- the algorithm ----------------------------------------------------------------------------


def objective(config: GRPOConfig) -> PolicyLoss:
    """The clipped ratio, averaged over the tokens of a mini-batch, with k3 KL and entropy bonus."""
    return PolicyLoss(
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        kl_coef=config.kl_coef,
        entropy_coef=config.entropy_coef,
        aggregation="token_mean",
    )


@torch.no_grad()
def greedy_accuracy(model, tokenizer, task: Addition, problems: list[Problem]) -> float:
    """The share of problems that the most probable completion solves."""
    written = sample(
        model, tokenizer, [p.prompt for p in problems], max_new_tokens=task.max_new_tokens,
        temperature=0.0,
    )  # fmt: skip
    return task.rewards(problems, written, tokenizer).mean().item()


def update(
    model, reference, optimizer, batch: Completions, advantages: torch.Tensor, config: GRPOConfig
) -> tuple[Metrics, float]:
    """One optimizer step on a mini-batch: the metrics of its loss, and the norm of its gradient."""
    ref_logprobs = None
    if reference is not None:
        with torch.no_grad():
            ref_logprobs = completion_logprobs(reference, batch, temperature=config.temperature)
    head = model.get_output_embeddings()
    loss, metrics = objective(config).from_hidden(
        completion_hidden(model, batch), head.weight, batch.ids, advantages, bias=head.bias,
        temperature=config.temperature, entropy=True, old_logprobs=batch.logprobs,
        ref_logprobs=ref_logprobs, mask=batch.mask,
    )  # fmt: skip
    if not torch.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss.item()}: the last step's weights are kept")
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    optimizer.step()
    return metrics, norm.item()


# ---- the run ----------------------------------------------------------------------------------


def train(config: GRPOConfig) -> dict[str, float]:
    """Runs it all; returns the greedy accuracies on held-out problems and the seconds it took."""
    started = time.perf_counter()
    torch.set_num_threads(config.threads)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(config.seed)
    rng = random.Random(config.seed)
    generator = torch.Generator(device).manual_seed(config.seed)

    task = Addition(config.max_operand)
    splits = task.splits(config.seed)
    tokenizer = char_tokenizer(task.alphabet)
    model = tiny_gpt2(
        tokenizer, hidden_size=config.hidden_size, num_layers=config.num_layers,
        num_heads=config.num_heads,
    ).to(device)  # fmt: skip
    log = RunLog(config.output_dir, config)

    def accuracy(problems: list[Problem]) -> float:
        return greedy_accuracy(model, tokenizer, task, problems)

    for step, loss in warm_start(model, tokenizer, splits.train, config, rng, device):
        # Often: once the model can carry, a few steps more would leave nothing to learn.
        if step % 5 == 0:
            solved = accuracy(splits.validation)
            log.write({"phase": "warm start", "step": step, "loss": loss, "eval/accuracy": solved})
            if solved >= config.warm_start_accuracy:
                break
    before = accuracy(splits.held_out)
    print(f"after the warm start: greedy accuracy {before:.3f} on held-out problems")

    reference = copy.deepcopy(model).requires_grad_(False) if config.kl_coef else None
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    progress = tqdm(range(1, config.steps + 1), desc="GRPO", disable=not sys.stderr.isatty())
    for step in progress:
        for group in optimizer.param_groups:
            # Ten steps of warm-up, while Adam's moments fill; then linearly down to a tenth.
            group["lr"] = config.learning_rate * min(step / 10, max(0.1, 1 - step / config.steps))

        # Sample G completions of each prompt and judge them.
        problems = rng.sample(splits.train, min(config.prompts_per_step, len(splits.train)))
        completions = sample(
            model, tokenizer, [p.prompt for p in problems], max_new_tokens=task.max_new_tokens,
            temperature=config.temperature, group_size=config.group_size, generator=generator,
        )  # fmt: skip
        asked = [p for p in problems for _ in range(config.group_size)]
        rewards = task.rewards(asked, completions, tokenizer).to(device)
        if config.shuffle_rewards:
            rewards = rewards[torch.randperm(len(rewards), generator=generator, device=device)]
        advantages = group_advantages(
            rewards, group_size=config.group_size, eps=config.advantage_eps
        )

        # Learn from them.
        collected, norms = [], []
        for _ in range(config.epochs):
            order = torch.randperm(len(rewards), generator=generator, device=device)
            for rows in order.chunk(config.minibatches):
                found, norm = update(
                    model, reference, optimizer, completions.select(rows), advantages[rows], config
                )
                collected.append(found)
                norms.append(norm)
        of_loss = sum(collected).item_dict()
        metrics = {
            name: of_loss[ours] for name, ours in LOGGED.items() if ours in of_loss
        }  # fmt: skip
        metrics["losses/grad_norm"] = sum(norms) / len(norms)
        spread = rewards.view(-1, config.group_size)
        metrics |= {
            "rollout/reward": rewards.mean().item(),
            "rollout/length": completions.mask.sum(1).float().mean().item(),
            "rollout/groups_without_signal": (spread == spread[:, :1]).all(1).float().mean().item(),
        }
        if step % config.eval_every == 0 or step == config.steps:
            metrics["eval/accuracy"] = accuracy(splits.validation)
            tqdm.write(
                f"step {step:4d}  reward {metrics['rollout/reward']:.3f}  "
                f"validation accuracy {metrics['eval/accuracy']:.3f}  "
                f"entropy {metrics['losses/entropy']:.3f}"
            )
        log.write({"phase": "grpo", "step": step, **metrics})
        progress.set_postfix(reward=f"{metrics['rollout/reward']:.3f}")

    after = accuracy(splits.held_out)
    plot_curves(log.records, Path(config.output_dir) / "curves.png")
    seconds = time.perf_counter() - started
    result = {"accuracy_before": before, "accuracy_after": after, "seconds": seconds}
    log.write({"phase": "result", **result})
    print(
        f"greedy accuracy on {len(splits.held_out)} held-out problems: {before:.3f} after the warm "
        f"start, {after:.3f} after GRPO ({seconds:.0f} s on {device}); curves in {log.folder}"
    )
    return result


def parse(arguments: list[str] | None = None) -> GRPOConfig:
    """The options of a command line."""
    parser = HfArgumentParser(GRPOConfig, prog="python -m rlkern_loops.grpo", allow_abbrev=False)
    try:
        (config,) = parser.parse_args_into_dataclasses(arguments)
    except ValueError as error:
        parser.error(str(error))
    return config


if __name__ == "__main__":
    train(parse())

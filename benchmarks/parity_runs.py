"""The two GRPO trainers that parity is asked of: TRL's GRPOTrainer, and the loop of rlkern_loops.

Both are told everything by one GRPOConfig of rlkern's loop; `trl_options` says it in TRL's words.

Run by itself as `python -m benchmarks.parity_runs REQUEST REPLY`, two JSON files, it trains both
from one seed's warm-started weights.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rlkern_loops import grpo, learn, model
from rlkern_loops.data import Example, Sampler
from rlkern_loops.prepare import Setting, prepare
from rlkern_loops.rollout import Completions
from torch import Tensor

import rlkern

# The losses that both have under one name and with one meaning, and TRL's word for our scales.
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo")
SCALES = {"std": "group", "batch_std": "batch", "none": "none"}
#: What the loop's AdamW has, and TRL's.
ADAM_EPS = 1e-8


class Recorded(NamedTuple):
    """A round that was written and judged once: B examples, completions and rewards [B] fp32."""

    asked: list[Example]
    completions: Completions
    rewards: Tensor


@dataclass
class Trace:
    """What a trainer did with recorded rounds.

    Attributes:
        grad_norms: of every optimizer step, before clipping.
        clip_frac: share of tokens outside the clip range, of every optimizer step.
        start, end: the parameters by name, before the first step and after the last.
    """

    grad_norms: list[float]
    clip_frac: list[float]
    start: dict[str, Tensor]
    end: dict[str, Tensor]


def trl_options(config: grpo.GRPOConfig, max_new_tokens: int) -> dict[str, Any]:
    """A run's options in the words of TRL 1.16's GRPOConfig.

    All that bears on the numbers is said, TRL's defaults too: they have changed between versions.

    Raises:
        ValueError: an option that TRL's trainer has no equal of.
    """
    objective = config.objective()
    fixed = {
        "baseline": "mean", "unbiased": True, "advantage_eps": 1e-4, "dynamic_sampling": 0,
        "shuffle_rewards": False, "micro_batch_size": 0, "precision": "fp32", "entropy_coef": None,
        "aggregation": None,
    }  # fmt: skip
    for name, only in fixed.items():
        if getattr(config, name) != only:
            raise ValueError(f"{name}: expected {only!r}, TRL's, got {getattr(config, name)!r}")
    if config.loss not in LOSSES:
        raise ValueError(f"loss: expected one of {', '.join(LOSSES)}, got {config.loss!r}")
    if config.scale not in SCALES:
        raise ValueError(f"scale: expected one of {', '.join(SCALES)}, got {config.scale!r}")
    if objective.kl_coef and objective.kl_estimator != "k3":
        raise ValueError(f"kl_estimator: expected 'k3', TRL's, got {objective.kl_estimator!r}")
    of_loss = {
        "loss_type": config.loss,
        "epsilon": objective.clip_low,
        "epsilon_high": objective.clip_high,  # where it is left out, TRL takes epsilon
        "delta": objective.ratio_cap,
        "beta": objective.kl_coef,
        "use_bias_correction_kl": objective.kl_ratio_weighted,  # TRL's default is True
        "importance_sampling_level": objective.ratio_level,
        "top_entropy_quantile": 1.0,
        "entropy_coef": 0.0,
        "off_policy_mask_threshold": None,
        "scale_rewards": SCALES[config.scale],
        "multi_objective_aggregation": "sum_then_normalize",
        "mask_truncated_completions": config.mask_truncated,
    }
    of_rounds = {
        "num_generations": config.group_size,
        "per_device_train_batch_size": config.completions_per_step // config.minibatches,
        "steps_per_generation": config.minibatches,
        "gradient_accumulation_steps": 1,
        "num_iterations": config.epochs,
        "max_steps": config.steps * config.minibatches * config.epochs,
        "max_completion_length": max_new_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": 0,
        "min_p": None,
        "repetition_penalty": 1.0,
        "use_vllm": False,
        "vllm_importance_sampling_correction": False,
    }
    of_optimizer = {
        "optim": "adamw_torch",
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "constant",  # of which `trl_trained` makes the loop's own course
        "warmup_steps": 0,
        # As learn.adamw has them; TRL's own default is (0.9, 0.999).
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_epsilon": ADAM_EPS,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
    }
    of_machine = {
        "use_cpu": True,
        "bf16": False,  # TRL's default is True
        "fp16": False,
        "gradient_checkpointing": False,
        "disable_dropout": True,
        "cast_lm_head_to_fp32": False,
    }
    return of_loss | of_rounds | of_optimizer | of_machine | {"seed": config.seed % 2**32}


def trl_trained(
    policy: torch.nn.Module,
    examples: Sequence[Example],
    config: grpo.GRPOConfig,
    setting: Setting,
    folder: str,
    told: dict[str, Any],
    **hooks: Any,
) -> Any:
    """TRL's GRPOTrainer after its run, quiet, which writes nothing but into `folder`.

    Args:
        policy: what it trains; its reference is what that was loaded from.
        examples: what it draws prompts from.
        config, setting: of the same run of ours.
        folder: for what it writes.
        told: fields of its GRPOConfig over those of `trl_options`.
        hooks: its reward_funcs, rollout_func.
    """
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Rate(TrainerCallback):
        """The loop's learning rate, which changes by the round; TRL's would by the step."""

        def on_step_begin(self, args, state, control, optimizer, **_: Any) -> None:
            step = 1 + state.global_step // (config.minibatches * config.epochs)
            peaks = [config.learning_rate] * len(optimizer.param_groups)
            learn.set_learning_rates(optimizer, peaks, step, config)

    told = trl_options(config, setting.max_new_tokens) | told
    quiet = {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    with warnings.catch_warnings():
        # rollout_func is experimental there, and transformers renames things that TRL calls.
        warnings.simplefilter("ignore")
        trainer = GRPOTrainer(
            model=policy, args=GRPOConfig(output_dir=folder, **quiet, **told),
            train_dataset=Dataset.from_list([example._asdict() for example in examples]),
            processing_class=setting.tokenizer, callbacks=[Rate()], **hooks,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer


def parameters_of(policy: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in policy.named_parameters()}


def compare(some: Trace, other: Trace) -> dict[str, float]:
    """How far two traces lie apart, as shares: see the page's first section for each.

    Returns:
        grad_norm, parameters, move, move_without_key_biases, coordinate, and moved: the move of
        the other over its parameters.
    """
    pairs = zip(some.grad_norms, other.grad_norms, strict=True)
    found = {"grad_norm": max(abs(a - b) / b for a, b in pairs)}
    for name, parts in (("move", lambda _, x: x), ("move_without_key_biases", _but_key_biases)):
        start, ends, end = (
            torch.cat([parts(name, value.double()).flatten() for name, value in values.items()])
            for values in (other.start, some.end, other.end)
        )
        apart, move = ends - end, end - start
        found[name] = (apart.norm() / move.norm()).item()
        if name == "move":
            found["parameters"] = (apart.norm() / end.norm()).item()
            found["coordinate"] = (apart.abs().max() / move.abs().max()).item()
            found["moved"] = (move.norm() / end.norm()).item()
    return found


def _but_key_biases(name: str, value: Tensor) -> Tensor:
    """GPT-2's biases of queries, keys and values lie in one vector."""
    if not name.endswith("attn.c_attn.bias"):
        return value
    queries, _, values = value.chunk(3)
    return torch.cat([queries, values])


# ---- recorded completions -----------------------------------------------------------------------


def record(policy, setting: Setting, config: grpo.GRPOConfig) -> list[Recorded]:
    """`config.steps` rounds of completions of one policy, with the setting's rewards."""
    torch.manual_seed(config.seed)
    sampler = Sampler(setting.train, config.seed)
    rounds = []
    with torch.no_grad():
        for _ in range(config.steps):
            asked, written, rewards, _ = grpo.write_and_judge(policy, setting, sampler, config)
            rounds.append(Recorded(asked, written, rewards))
    return rounds


def trl_on(
    rounds: list[Recorded], start: str, setting: Setting, config: grpo.GRPOConfig, adam_eps: float
) -> Trace:
    """TRL's trainer on recorded rounds: they come in the place of what it would generate."""
    waiting = iter(rounds)

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        asked, written, rewards = next(waiting)
        if prompts != [example.prompt for example in asked]:
            raise AssertionError("TRL asks for other prompts than were recorded, or in other order")
        torch.manual_seed(config.seed)  # of the mini-batches, which TRL draws next
        rows = zip(written.prompt_ids, written.prompt_mask, strict=True)
        completions = zip(written.ids, written.mask, strict=True)
        return {
            "prompt_ids": [ids[mask.bool()].tolist() for ids, mask in rows],
            "completion_ids": [ids[mask].tolist() for ids, mask in completions],
            "logprobs": None,  # of the sampler; only a correction for another one asks for them
            "recorded_reward": rewards.tolist(),
        }

    def recorded_reward(recorded_reward: list[float], **_: Any) -> list[float]:
        return recorded_reward

    # Each prompt once, in the order of the record: TRL repeats it for its group.
    prompts = [e for asked, _, _ in rounds for e in asked[:: config.group_size]]
    told = {"shuffle_dataset": False, "adam_epsilon": adam_eps}
    policy = model.load(start, config, "cpu")
    before = parameters_of(policy)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trained(
            policy, prompts, config, setting, folder, told, rollout_func=rollout,
            reward_funcs=recorded_reward,
        )  # fmt: skip
    steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return Trace(
        [entry["grad_norm"] for entry in steps],
        [entry["clip_ratio/region_mean"] for entry in steps],
        before,
        parameters_of(policy),
    )


def ours_on(
    rounds: list[Recorded],
    start: str,
    setting: Setting,
    config: grpo.GRPOConfig,
    adam_eps: float,
    dtype: torch.dtype = torch.float32,
) -> Trace:
    """Our loop on recorded rounds: all of its step but the writing and the judging."""
    policy = model.load(start, config, "cpu").to(dtype)
    reference = None
    if config.objective().kl_coef:
        reference = model.load(start, config, "cpu", frozen=True).to(dtype)
    optimizer = learn.adamw(config, policy.parameters())
    for group in optimizer.param_groups:
        group["eps"] = adam_eps
    before, norms, clipped = parameters_of(policy), [], []
    for step, (asked, written, rewards) in enumerate(rounds, start=1):
        learn.set_learning_rates(optimizer, (config.learning_rate,), step, config)
        with torch.no_grad():
            advantages = grpo.advantages_of(
                policy, setting, asked, written, rewards.to(dtype), config
            )
        batch = grpo.round_of(policy, reference, written, advantages, config)
        torch.manual_seed(config.seed)  # TRL's mini-batches, where a round has one pass
        found, of_round = grpo.learn_from(
            policy, optimizer, batch, setting.max_new_tokens, config, reference
        )
        norms += of_round
        clipped += [metrics["clip_frac"].item() for metrics in found]
    return Trace(norms, clipped, before, parameters_of(policy))


def float64_on(
    rounds: list[Recorded], start: str, setting: Setting, config: grpo.GRPOConfig, adam_eps: float
) -> Trace:
    """`ours_on` in float64, by the definitions in eager PyTorch: the judge of the other two."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with rlkern.use_backend("eager"):
            return ours_on(rounds, start, setting, config, adam_eps, torch.float64)
    finally:
        torch.set_default_dtype(before)


# ---- whole runs ---------------------------------------------------------------------------------


def both_train(options: dict[str, Any]) -> dict[str, Any]:
    """Our loop's run, which makes the warm-started weights, and then TRL's from the same weights.

    Returns:
        By "rlkern" and "trl": rewards (mean of each step's completions), accuracy (greedy, of
        held-out prompts, at the end) and seconds; and accuracy_before, which is of both.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = grpo.GRPOConfig(
            **options, output_dir=f"{folder}/rlkern", device="cpu", eval_every=options["steps"],
            save_every=0, samples_every=0, print_every=options["steps"],
        )  # fmt: skip
        result = grpo.train(config)
        lines = Path(config.output_dir, "metrics.jsonl").read_text().splitlines()
        steps = [record for record in map(json.loads, lines) if record["phase"] == "train"]
        ours = {
            "rewards": [record["rollout/reward"] for record in steps],
            "accuracy": result["accuracy_after"],
            "seconds": result["seconds"],
        }

        begin = time.perf_counter()
        config = replace(config, model=f"{config.output_dir}/warm_start")
        setting = prepare(config, "cpu")
        ends = setting.tokenizer.eos_token_id

        def reward(prompts, completions, completion_ids, answer, **_: Any) -> list[float]:
            finished = [ids[-1] == ends for ids in completion_ids]
            return setting.reward(prompts, completions, answer, finished).tolist()

        policy = model.load(config.model, config, "cpu")
        trainer = trl_trained(
            policy, setting.train, config, setting, folder, {"shuffle_dataset": True},
            reward_funcs=reward,
        )  # fmt: skip
        theirs = {
            # Logged with the first optimizer step of each round.
            "rewards": [e["reward"] for e in trainer.state.log_history if "reward" in e],
            "accuracy": setting.evaluate(policy, setting.held_out),
            "seconds": time.perf_counter() - begin,
        }
        return {"rlkern": ours, "trl": theirs, "accuracy_before": result["accuracy_before"]}


def main(request_file: str, reply_file: str) -> None:
    torch.set_num_threads(1)
    request = json.loads(Path(request_file).read_text())
    Path(reply_file).write_text(json.dumps(both_train(request)))


if __name__ == "__main__":
    main(*sys.argv[1:])

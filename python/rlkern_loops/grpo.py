"""GRPO from one file: a language model learns from the rewards of groups of its own completions.

    python -m rlkern_loops.grpo [--steps 400 --seed 1 ...]

For each prompt the model writes a group of completions, and each reward is normalised by its
group (Shao et al., 2024, https://arxiv.org/abs/2402.03300): what is better than its siblings
becomes more probable. The loss is any preset of rlkern's PolicyLoss, taken from hidden states.

Without options a tiny model learns to add: it is first shown a few right answers, until it is
right now and then; from there on it learns from rewards alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rlkern import Metrics, group_advantages
from rlkern_loops import learn, model
from rlkern_loops.data import Example, Sampler
from rlkern_loops.options import RunConfig, option
from rlkern_loops.prepare import Setting, prepare
from rlkern_loops.rollout import Completions, completion_hidden, exact_reference, join, logprobs_of
from rlkern_loops.run import Run

# cleanrl's names for the metrics of the loss.
LOGGED = {
    "losses/policy_loss": "policy_loss",
    "losses/approx_kl": "approx_kl",
    "losses/clipfrac": "clip_frac",
    "losses/entropy": "entropy",
    "losses/kl": "kl",
}


@dataclass(frozen=True)
class GRPOConfig(RunConfig):
    """Options of a GRPO run; `--help` prints them."""

    output_dir: str = option("runs/grpo", "Folder of everything that the run writes.")
    group_size: int = option(8, "Completions per prompt (G), at least 2.")
    baseline: Literal[
        "mean", "leave_one_out", "length_weighted", "pass_at_k", "batch_mean", "given", "none"
    ] = option(
        "mean",
        "What is subtracted from a reward (docs/advantages.md); given: the greedy completion's "
        "reward (ReMax).",
    )
    scale: Literal["std", "batch_std", "mean", "none"] = option(
        "std", "What the difference is divided by; none as in Dr. GRPO."
    )
    unbiased: bool = option(True, "Standard deviations divide by n - 1, else by n.")
    advantage_eps: float = option(1e-4, "Added to the standard deviation.")
    dynamic_sampling: int = option(
        0,
        "Groups whose rewards are all equal are dropped and others drawn in their place, at most "
        "this many times a round (DAPO).",
    )
    shuffle_rewards: bool = option(False, "Control: hand out each round's rewards at random.")

    LEAST = RunConfig.LEAST | {"group_size": 2, "advantage_eps": 0, "dynamic_sampling": 0}

    @property
    def completions_per_step(self) -> int:
        return self.prompts_per_step * self.group_size


class Round(NamedTuple):
    """A round's completions, B = groups * group_size, and what the loss compares them with.

    Attributes:
        completions: B of at most T tokens.
        advantages: [B] fp32.
        old_logprobs: [B, T] fp32 of the policy that wrote them; None where it is the one that
            learns, in a single step.
        ref_logprobs: [B, T] fp32 of the policy at the start; None without a KL, or an exact one.
    """

    completions: Completions
    advantages: Tensor
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None

    def select(self, rows: Tensor) -> Round:
        chosen = self.completions.select(rows)
        old, ref = (
            x if x is None else x[rows, : chosen.ids.shape[1]]
            for x in (self.old_logprobs, self.ref_logprobs)
        )
        return Round(chosen, self.advantages[rows], old, ref)


def with_signal(rewards: Tensor, group_size: int) -> Tensor:
    """Which groups have two different rewards, [groups] bool: the others teach nothing. NaN, no
    verdict, is no reward."""
    grouped = rewards.view(-1, group_size)
    lowest = grouped.nan_to_num(torch.inf).amin(1)
    return grouped.nan_to_num(-torch.inf).amax(1) > lowest


def write_and_judge(
    policy, setting: Setting, sampler: Sampler, config: GRPOConfig
) -> tuple[list[Example], Completions, Tensor, float]:
    """A round: examples [B], completions, rewards [B], and the share of groups without a signal.

    With dynamic sampling only groups with a signal are kept; if none is found in the rounds there
    are, the last one is handed back as it is.
    """
    asked: list[Example] = []
    written: list[Completions] = []
    rewards: list[Tensor] = []
    drawn = useful = 0
    for _ in range(1 + config.dynamic_sampling):
        fresh = sampler.next(config.prompts_per_step - useful)
        completions = setting.sample(policy, fresh, group_size=config.group_size)
        repeated = [example for example in fresh for _ in range(config.group_size)]
        judged = setting.judge(setting.reward, repeated, completions)
        signal = with_signal(judged, config.group_size)
        drawn, useful = drawn + len(fresh), useful + int(signal.sum())
        if config.dynamic_sampling and signal.any():
            rows = signal.repeat_interleave(config.group_size).nonzero().flatten()
            asked += [repeated[i] for i in rows.tolist()]
            written.append(completions.select(rows))
            rewards.append(judged[rows])
        if not config.dynamic_sampling or useful == config.prompts_per_step:
            break
    without = 1 - useful / drawn
    if not rewards:
        return repeated, completions, judged, without
    return asked, join(written, setting.tokenizer.pad_token_id), torch.cat(rewards), without


def advantages_of(
    policy, setting: Setting, asked: list[Example], completions: Completions, rewards: Tensor,
    config: GRPOConfig,
) -> Tensor:  # fmt: skip
    """The advantages [B] of a round's rewards, by the convention that the options name."""
    given = {}
    if config.baseline == "length_weighted":
        given["lengths"] = completions.mask.sum(1)
    if config.baseline == "given":
        prompts = asked[:: config.group_size]
        greedy = setting.sample(policy, prompts, temperature=0.0, top_p=1.0)
        reached = setting.judge(setting.reward, prompts, greedy)
        given["baseline_rewards"] = reached.repeat_interleave(config.group_size)
    return group_advantages(
        rewards, group_size=config.group_size, baseline=config.baseline, scale=config.scale,
        unbiased=config.unbiased, eps=config.advantage_eps, **given,
    )  # fmt: skip


def round_of(
    policy, reference, completions: Completions, advantages: Tensor, config: GRPOConfig
) -> Round:
    """A round with what its loss compares with: the policy before it learns, and the one at the
    start (None without a KL)."""
    if config.mask_truncated:
        whole = completions.mask & completions.finished[:, None]
        completions = completions._replace(mask=whole)
    old, ref = None, None
    if config.epochs * config.minibatches > 1:
        old = logprobs_of(policy, completions, config)
    if reference is not None and config.objective().kl_estimator != "exact":
        ref = logprobs_of(reference, completions, config)
    return Round(completions, advantages, old, ref)


def learn_from(
    policy, optimizer, batch: Round, max_new_tokens: int, config: GRPOConfig, reference=None
) -> tuple[list[Metrics], list[float]]:
    """All passes over a round, in mini-batches at random: what `update` returns, step by step."""
    found, norms = [], []
    for _ in range(config.epochs):
        order = torch.randperm(len(batch.advantages), device=batch.advantages.device)
        for rows in order.chunk(config.minibatches):
            metrics, norm = update(
                policy, optimizer, batch.select(rows), max_new_tokens, config, reference
            )
            found.append(metrics)
            norms.append(norm)
    return found, norms


def update(
    policy, optimizer, batch: Round, max_new_tokens: int, config: GRPOConfig, reference=None
) -> tuple[Metrics, float]:
    """One optimizer step on a mini-batch: the metrics of its loss, and the norm of its gradient.

    The reference is needed for an exact KL alone; others take the round's ref_logprobs.
    """
    objective = config.objective()
    counts = learn.denominators(objective, batch.completions.mask, max_new_tokens)

    def loss_of(rows: Tensor) -> tuple[Tensor, list[Metrics]]:
        part = batch.select(rows)
        with model.precision(config, policy.device.type):
            loss, metrics = objective.from_hidden(
                completion_hidden(policy, part.completions), token_ids=part.completions.ids,
                advantages=part.advantages, temperature=config.temperature, entropy=True,
                mask=part.completions.mask, old_logprobs=part.old_logprobs,
                ref_logprobs=part.ref_logprobs, **model.head(policy), **counts,
                **exact_reference(objective, reference, part.completions),
            )  # fmt: skip
        return loss, [metrics]

    rows = torch.arange(len(batch.advantages), device=batch.advantages.device)
    loss, (metrics,) = learn.accumulate(rows, config.micro_batch_size, loss_of)
    (norm,) = learn.step(optimizer, loss, config.max_grad_norm)
    return metrics, norm


def train(config: GRPOConfig) -> dict[str, float]:
    """Runs it all.

    Returns:
        accuracy_before, accuracy_after: of greedy completions of held-out prompts (mean rewards
        where no rule judges them), and the seconds it took.

    Raises:
        RunError: data, a model, a reward or a checkpoint that does not do, a loss that is no
            number; a checkpoint of the last whole step is left.
    """
    with learn.operators(config):
        return _train(config)


def _train(config: GRPOConfig) -> dict[str, float]:
    run = Run(config)
    setting = prepare(config, run.device, resumed=run.resumed)
    policy = model.load(setting.model, config, run.device)
    reference = None
    if config.objective().kl_coef:
        reference = model.load(setting.model, config, run.device, frozen=True)
    optimizer = learn.adamw(config, policy.parameters())
    sampler = Sampler(setting.train, config.seed)
    run.start(policy=policy, optimizer=optimizer, sampler=sampler)

    def score(examples: list[Example]) -> float:
        with model.precision(config, run.device):
            return setting.evaluate(policy, examples)

    run.begin(setting.eval_name, lambda: score(setting.held_out))
    with run.rescued():
        for step in run.steps():
            rate = learn.set_learning_rates(optimizer, (config.learning_rate,), step, config)

            # Write G completions of each prompt and judge them.
            with torch.no_grad(), model.precision(config, run.device):
                asked, completions, rewards, without = write_and_judge(
                    policy, setting, sampler, config
                )
                if config.shuffle_rewards:
                    rewards = rewards[torch.randperm(len(rewards), device=rewards.device)]
                advantages = advantages_of(policy, setting, asked, completions, rewards, config)
            metrics = {
                "charts/learning_rate": rate,
                "rollout/reward": rewards.nanmean().item(),
                "rollout/length": completions.mask.sum(1).float().mean().item(),
                "rollout/finished": completions.finished.float().mean().item(),
                "rollout/groups_without_signal": without,
                "rollout/no_verdict": rewards.isnan().float().mean().item(),
            }
            run.samples(step, asked, completions, setting.tokenizer, rewards)

            # Learn.
            batch = round_of(policy, reference, completions, advantages, config)
            found, norms = learn_from(
                policy, optimizer, batch, setting.max_new_tokens, config, reference
            )
            of_loss = sum(found).item_dict()
            metrics |= {name: of_loss[ours] for name, ours in LOGGED.items() if ours in of_loss}
            metrics["losses/grad_norm"] = sum(norms) / len(norms)
            if step % config.eval_every == 0 or step == config.steps:
                metrics[setting.eval_name] = score(setting.validation)
            run.record(step, metrics)
        run.save_model(policy, setting.tokenizer)  # the evaluation may fail
        after = score(setting.held_out)

    return run.finish(setting.eval_name, after, len(setting.held_out))


if __name__ == "__main__":
    import sys

    from rlkern_loops.cli import main

    sys.exit(main(["train", "grpo", *sys.argv[1:]]))

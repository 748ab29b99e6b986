"""PPO from one file: a language model learns from a reward model, token by token, with a critic.

    python -m rlkern_loops.ppo [--steps 100 --seed 1 ...]

Four models: the policy, which writes; the reference, the policy at the start, from which a KL
keeps it from straying; the reward model, which scores what is written; the critic, which expects
that score at every token (Schulman et al., 2017, https://arxiv.org/abs/1707.06347; Ziegler et al.,
2019, https://arxiv.org/abs/1909.08593).

Without options a tiny model learns to write words backwards. A reward model is trained for it
first; how often the policy is truly right is measured by the rule, which PPO does not see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rlkern import Metrics, PolicyLoss, ValueLoss, gae, kl_penalty, whiten
from rlkern_loops import learn, model
from rlkern_loops.critic import Critic, load_critic
from rlkern_loops.data import Example, Sampler
from rlkern_loops.kl import AdaptiveKL
from rlkern_loops.options import RunConfig, option
from rlkern_loops.prepare import prepare
from rlkern_loops.rollout import (
    Completions,
    completion_hidden,
    completion_logprobs,
    exact_reference,
    in_batches,
    logprobs_of,
)
from rlkern_loops.run import Run

# cleanrl's names for the metrics of the two losses.
LOGGED = {
    "losses/policy_loss": "policy_loss",
    "losses/approx_kl": "approx_kl",
    "losses/clipfrac": "clip_frac",
    "losses/entropy": "entropy",
    "losses/value_loss": "value_loss",
    "losses/value_clipfrac": "value_clip_frac",
    "losses/explained_variance": "explained_variance",
}


@dataclass(frozen=True)
class PPOConfig(RunConfig):
    """Options of a PPO run; `--help` prints them."""

    output_dir: str = option("runs/ppo", "Folder of everything that the run writes.")
    task: Literal["addition", "reversal"] = option(
        "reversal", "The built-in task, where no dataset is given."
    )
    steps: int = option(60, "Rounds of sampling and learning.")
    prompts_per_step: int = option(256, "Prompts per round, with one completion each.")
    epochs: int = option(2, "Passes over a round's completions.")

    loss: str = option("ppo", "A preset of rlkern.PolicyLoss.")
    kl_coef: float = option(
        0.05, "Weight of the KL to the policy at the start, at first; 0 leaves it out."
    )
    kl_estimator: str | None = option(
        None, "k1, k2, k3, abs; in the loss also a _st form or exact. Left out: k1 in the reward, "
        "k3 in the loss."
    )  # fmt: skip
    kl_in: Literal["reward", "loss"] = option(
        "reward", "Whether the KL is taken off each token's reward, or added to the loss."
    )
    target_kl: float | None = option(
        None, "Adapt kl_coef to this KL per completion (its tokens' sum, in nats). Left out: fixed."
    )
    kl_horizon: int = option(10_000, "Completions in which kl_coef adapts (Ziegler et al.).")

    gamma: float = option(1.0, "Discount per token.")
    lam: float = option(0.95, "Of generalised advantage estimation.")
    whiten_advantages: bool = option(True, "Mean 0 and variance 1 over a round's tokens.")
    whiten_rewards: bool = option(False, "Variance 1 over a round's token rewards; mean kept.")
    reward_clip: float | None = option(None, "Scores are clipped to plus or minus this.")
    missing_eos_penalty: float = option(0.0, "Taken off the score of a completion cut off.")

    critic: Literal["separate", "shared"] = option(
        "separate", "A backbone of its own, or a value head on the policy's."
    )
    critic_model: str | None = option(
        None, "What a separate critic starts from: policy, reward (the reward model's backbone), "
        "or a name or folder. Left out: reward in the built-in tasks, else policy."
    )  # fmt: skip
    critic_learning_rate: float | None = option(None, "Left out: twice the policy's.")
    value_coef: float = option(0.5, "Weight of the value loss; felt by a shared backbone.")
    value_clip: float | None = option(
        0.2, "How far a value may move from its old one; 0 leaves the clip out."
    )

    RANGES = RunConfig.RANGES | {"gamma": (0, 1), "lam": (0, 1)}
    LEAST = RunConfig.LEAST | {"missing_eos_penalty": 0, "kl_horizon": 1, "value_clip": 0}
    POSITIVE = (*RunConfig.POSITIVE, "critic_learning_rate", "value_coef", "reward_clip",
                "target_kl")  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.critic_learning_rate is None:
            object.__setattr__(self, "critic_learning_rate", 2 * self.learning_rate)
        if self.target_kl is not None and not self.kl_coef:
            raise ValueError("target_kl: expected None, as kl_coef is 0")
        if self.critic == "shared" and self.critic_model is not None:
            raise ValueError("critic_model: expected None with a shared critic")
        if self.kl_in == "reward" and self.kl_estimator not in (None, "k1", "k2", "k3", "abs"):
            raise ValueError(
                "kl_estimator: expected k1, k2, k3 or abs with kl_in reward, which has neither a "
                f"gradient nor logits, got {self.kl_estimator!r}"
            )

    def overrides(self) -> dict[str, Any]:
        given = super().overrides()
        if self.kl_in == "reward":
            given = {name: given[name] for name in given if name != "kl_estimator"}
            given["kl_coef"] = 0.0
        return given


class Round(NamedTuple):
    """A round's completions, B of at most T tokens, and what the losses compare them with.

    Attributes:
        completions: their mask leaves out what teaches nothing.
        old_logprobs, ref_logprobs, values: [B, T] fp32, of the policy that wrote them, of the
            reference (None without a KL) and of the critic before the update.
        advantages, returns: [B, T] fp32.
    """

    completions: Completions
    old_logprobs: Tensor
    values: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    returns: Tensor

    def select(self, rows: Tensor) -> Round:
        chosen = self.completions.select(rows)
        length = chosen.ids.shape[1]
        return Round(chosen, *(x if x is None else x[rows, :length] for x in self[1:]))


def completion_scores(scores: Tensor, finished: Tensor, config: PPOConfig) -> Tensor:
    """Scores [B] as PPO learns from them: clipped, and less the penalty for a missing end."""
    if config.reward_clip is not None:
        scores = scores.clamp(-config.reward_clip, config.reward_clip)
    return scores - config.missing_eos_penalty * ~finished


def token_rewards(scores: Tensor, kl: Tensor | None, kl_coef: float, mask: Tensor) -> Tensor:
    """Rewards [B, T]: -kl_coef * KL at every token, and the score at the last counting one.

    Args:
        scores: [B].
        kl: [B, T] estimates, or None.
        kl_coef: their weight.
        mask: [B, T]; a row without a counting token gets no score.
    """
    rewards = torch.zeros(mask.shape, device=mask.device) if kl is None else -kl_coef * kl
    last = (mask.sum(1, keepdim=True) - 1).clamp(min=0)
    counted = torch.where(mask.any(1), scores, 0.0)
    return rewards.scatter_add(1, last, counted[:, None])


def read(
    policy, critic: Critic, completions: Completions, config: PPOConfig
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and values [B, T] of the completions' tokens, without gradient."""

    def both(part: Completions) -> tuple[Tensor, Tensor]:
        hidden = completion_hidden(policy, part)
        logprobs = completion_logprobs(policy, part, temperature=config.temperature, hidden=hidden)
        return logprobs, critic(policy, part, hidden)

    with model.precision(config, policy.device.type):
        old, values = in_batches(both, completions, config.micro_batch_size)
    return old, values


def advantages_of(
    scores: Tensor, completions: Completions, old: Tensor, values: Tensor, ref: Tensor | None,
    kl_coef: float, config: PPOConfig,
) -> tuple[Round, Tensor]:  # fmt: skip
    """A round ready to learn from, and the KL [B, T] to the reference (0 without one)."""
    mask = completions.mask
    kl = torch.zeros_like(old)
    if ref is not None:
        # An exact KL needs all logits, which only the loss makes: k1 estimates the same.
        estimator = "k1" if config.kl_estimator in (None, "exact") else config.kl_estimator
        kl = kl_penalty(old, ref, estimator=estimator, mask=mask)
    in_reward = kl if config.kl_in == "reward" else None
    rewards = token_rewards(scores, in_reward, kl_coef, mask)
    several = mask.sum() > 1  # of one value, or none, there is no variance
    if config.whiten_rewards and several:
        rewards = whiten(rewards, mask, shift_mean=False)
    advantages, returns = gae(rewards, values, gamma=config.gamma, lam=config.lam, mask=mask)
    if config.whiten_advantages and several:
        advantages = whiten(advantages, mask)
    return Round(completions, old, values, ref, advantages, returns), kl


def update(
    policy, critic: Critic, optimizer, batch: Round, objective: PolicyLoss, max_new_tokens: int,
    config: PPOConfig, reference=None,
) -> tuple[list[Metrics], list[float]]:  # fmt: skip
    """One optimizer step of policy and critic on a mini-batch: the metrics of their losses, and
    the norms of their gradients. The reference is needed for an exact KL in the loss alone."""
    value_loss = ValueLoss(clip=config.value_clip or None)
    mask = batch.completions.mask
    policy_counts = learn.denominators(objective, mask, max_new_tokens)
    value_counts = learn.denominators(value_loss, mask, 0)

    def loss_of(rows: Tensor) -> tuple[Tensor, list[Metrics]]:
        part = batch.select(rows)
        with model.precision(config, policy.device.type):
            hidden = completion_hidden(policy, part.completions)
            exact = exact_reference(objective, reference, part.completions)
            of_policy = objective.from_hidden(
                hidden, token_ids=part.completions.ids, advantages=part.advantages,
                temperature=config.temperature, entropy=True, mask=part.completions.mask,
                old_logprobs=part.old_logprobs,
                ref_logprobs=part.ref_logprobs if config.kl_in == "loss" and not exact else None,
                **model.head(policy), **policy_counts, **exact,
            )  # fmt: skip
            of_critic = value_loss(
                critic(policy, part.completions, hidden), part.returns,
                old_values=part.values if value_loss.clip else None,
                mask=part.completions.mask, **value_counts,
            )  # fmt: skip
        loss = of_policy.loss + config.value_coef * of_critic.loss
        return loss, [of_policy.metrics, of_critic.metrics]

    rows = torch.arange(len(mask), device=mask.device)
    loss, metrics = learn.accumulate(rows, config.micro_batch_size, loss_of)
    return metrics, learn.step(optimizer, loss, config.max_grad_norm)


def train(config: PPOConfig) -> dict[str, float]:
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


def _train(config: PPOConfig) -> dict[str, float]:
    run = Run(config)
    setting = prepare(config, run.device, learned_reward=True, resumed=run.resumed)
    policy = model.load(setting.model, config, run.device)
    reference = None
    if config.kl_coef:
        reference = model.load(setting.model, config, run.device, frozen=True)
    critic = load_critic(config, policy, setting.model, setting.reward_model, run.device)
    optimizer = learn.adamw(config, policy.parameters(), critic.parameters())
    controller = AdaptiveKL(config.kl_coef, config.target_kl, config.kl_horizon)
    sampler = Sampler(setting.train, config.seed)
    run.start(
        policy=policy, critic=critic, optimizer=optimizer, controller=controller, sampler=sampler
    )
    peaks = (config.learning_rate, config.critic_learning_rate)

    def score(examples: list[Example]) -> float:
        with model.precision(config, run.device):
            return setting.evaluate(policy, examples)

    run.begin(setting.eval_name, lambda: score(setting.held_out))
    with run.rescued():
        for step in run.steps():
            rate = learn.set_learning_rates(optimizer, peaks, step, config)

            # Write completions and score them.
            asked = sampler.next(config.prompts_per_step)
            with torch.no_grad(), model.precision(config, run.device):
                completions = setting.sample(policy, asked)
            judged = setting.judge(setting.reward, asked, completions)
            metrics = {
                "charts/learning_rate": rate,
                "rollout/reward": judged.nanmean().item(),
                "rollout/length": completions.mask.sum(1).float().mean().item(),
                "rollout/finished": completions.finished.float().mean().item(),
                "rollout/no_verdict": judged.isnan().float().mean().item(),
            }
            run.samples(step, asked, completions, setting.tokenizer, judged)

            # What is expected of every token, and what came: advantages and returns.
            counts = ~judged.isnan()  # a completion without a verdict teaches nothing
            if config.mask_truncated:
                counts &= completions.finished
            completions = completions._replace(mask=completions.mask & counts[:, None])
            old, values = read(policy, critic, completions, config)
            ref = logprobs_of(reference, completions, config) if reference is not None else None
            scores = completion_scores(judged, completions.finished, config)
            batch, kl = advantages_of(
                scores, completions, old, values, ref, controller.kl_coef, config
            )

            # Learn.
            objective = config.objective()
            if config.kl_in == "loss":
                objective = objective.replace(kl_coef=controller.kl_coef)
            found, norms = [], []
            for _ in range(config.epochs):
                order = torch.randperm(len(judged), device=judged.device)
                for rows in order.chunk(config.minibatches):
                    of_both, norm = update(
                        policy, critic, optimizer, batch.select(rows), objective,
                        setting.max_new_tokens, config, reference,
                    )  # fmt: skip
                    found.append(of_both)
                    norms.append(norm)
            for part in zip(*found, strict=True):
                of_loss = sum(part).item_dict()
                metrics |= {n: of_loss[ours] for n, ours in LOGGED.items() if ours in of_loss}
            metrics["losses/grad_norm"] = sum(norm[0] for norm in norms) / len(norms)
            metrics["losses/critic_grad_norm"] = sum(norm[1] for norm in norms) / len(norms)
            if reference is not None:
                metrics["losses/kl"] = (kl.sum() / completions.mask.sum().clamp(min=1)).item()
                metrics["losses/kl_coef"] = controller.kl_coef
                controller.update(kl.sum(1).mean().item(), len(kl))
            if step % config.eval_every == 0 or step == config.steps:
                metrics[setting.eval_name] = score(setting.validation)
            run.record(step, metrics)
        run.save_model(policy, setting.tokenizer)  # the evaluation may fail
        after = score(setting.held_out)

    return run.finish(setting.eval_name, after, len(setting.held_out))


if __name__ == "__main__":
    import sys

    from rlkern_loops.cli import main

    sys.exit(main(["train", "ppo", *sys.argv[1:]]))

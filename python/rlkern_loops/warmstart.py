"""The supervised phase before reinforcement learning: enough to be rewarded now and then."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlkern_loops.data import Example
from rlkern_loops.rollout import Completions, completion_logprobs


def demonstrations(tokenizer: Any, examples: Sequence[Example], device: str) -> Completions:
    """The right answers, each with its end token, as if the model had written them."""
    prompts = tokenizer([e.prompt for e in examples], padding=True, return_tensors="pt")
    answers = tokenizer(
        [e.answer + tokenizer.eos_token for e in examples],
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    mask = answers["attention_mask"].bool()
    written = Completions(
        prompts["input_ids"],
        prompts["attention_mask"],
        answers["input_ids"],
        mask,
        torch.ones(len(mask), dtype=torch.bool),
    )
    return Completions(*(tensor.to(device) for tensor in written))


def warm_start(
    model,
    tokenizer,
    examples: Sequence[Example],
    options,
    accuracy: Callable[[], float],
    every: int,
) -> list[dict[str, float]]:
    """Trains on demonstrations until the model is right now and then.

    Args:
        model: a causal LM of transformers.
        tokenizer: its tokenizer.
        examples: what demonstrations are drawn from.
        options: has seed, warm_start_steps, warm_start_batch_size, warm_start_learning_rate and
            warm_start_accuracy.
        accuracy: of the model on examples that are not trained on.
        every: steps between asking for it.

    Returns:
        A record of step, loss and accuracy for every time it was asked.
    """
    rng = random.Random(options.seed)

    def batch_loss() -> Tensor:
        batch = rng.choices(examples, k=options.warm_start_batch_size)
        shown = demonstrations(tokenizer, batch, str(model.device))
        return -completion_logprobs(model, shown).sum() / shown.mask.sum()

    records = []
    fit = supervised_steps(
        model, batch_loss, options.warm_start_steps, options.warm_start_learning_rate
    )
    for step, loss in fit:
        if step % every == 0:
            records.append({"step": step, "loss": loss, "eval/accuracy": accuracy()})
            if records[-1]["eval/accuracy"] >= options.warm_start_accuracy:
                break
    return records


def supervised_steps(model, batch_loss: Callable[[], Tensor], steps: int, learning_rate: float):
    """Steps of AdamW on fresh batches; yields (step, loss) after each until the caller stops."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, step / 20)
        loss = batch_loss()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield step, loss.item()

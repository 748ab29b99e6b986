"""The supervised phase before reinforcement learning: enough to be rewarded now and then."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch

from rlkern_loops.rollout import Completions, completion_logprobs
from rlkern_loops.tasks import Problem


def demonstrations(tokenizer, problems: list[Problem], device: str) -> Completions:
    """The right answers, each with its end token, as if the model had written them."""
    prompts = tokenizer([p.prompt for p in problems], padding=True, return_tensors="pt")
    answers = tokenizer(
        [p.answer + tokenizer.eos_token for p in problems],
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
        torch.zeros(mask.shape),
        torch.ones(len(mask), dtype=torch.bool),
    )
    return Completions(*(tensor.to(device) for tensor in written))


def warm_start(
    model, tokenizer, problems: list[Problem], options, rng: random.Random, device: str
) -> Iterator[tuple[int, float]]:
    """Trains on demonstrations, and yields (step, loss) after each step until the caller stops.

    Args:
        model: a causal LM of transformers.
        tokenizer: its tokenizer.
        problems: what demonstrations are drawn from.
        options: has warm_start_steps, warm_start_batch_size and warm_start_learning_rate.
        rng: draws the problems.
        device: where the model is.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=options.warm_start_learning_rate,
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    for step in range(1, options.warm_start_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = options.warm_start_learning_rate * min(1, step / 20)
        batch = rng.choices(problems, k=options.warm_start_batch_size)
        shown = demonstrations(tokenizer, batch, device)
        logprobs = completion_logprobs(model, shown)
        loss = -logprobs.sum() / shown.mask.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield step, loss.item()

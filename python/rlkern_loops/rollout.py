"""Completions: drawing them from a model, and reading their log-probabilities back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache

import rlkern
from rlkern_loops.model import (
    backbone,
    evaluating,
    forward_arguments,
    head,
    hidden_states,
    positions,
    precision,
)


class Completions(NamedTuple):
    """B prompts of at most P tokens with one completion of at most T tokens each.

    Attributes:
        prompt_ids: [B, P] int64, padded on the left.
        prompt_mask: [B, P] int64, 1 where a prompt token stands.
        ids: [B, T] int64, the completion, padded on the right.
        mask: [B, T] bool, true up to and including the end token.
        finished: [B] bool, whether the completion ended before the length limit.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    ids: Tensor
    mask: Tensor
    finished: Tensor

    def select(self, rows: Tensor) -> Completions:
        """Some of them, without the columns that are padding in all of those."""
        chosen = Completions(*(x[rows] for x in self))
        first = int(chosen.prompt_mask.sum(1).max())
        last = max(1, int(chosen.mask.sum(1).max()))
        return Completions(
            chosen.prompt_ids[:, -first:],
            chosen.prompt_mask[:, -first:],
            chosen.ids[:, :last],
            chosen.mask[:, :last],
            chosen.finished,
        )

    def sequences(self) -> tuple[Tensor, Tensor]:
        """Prompts with their completions: ids and attention mask, [B, P + T] int64 each."""
        ids = torch.cat([self.prompt_ids, self.ids], 1)
        return ids, torch.cat([self.prompt_mask, self.mask.long()], 1)

    def texts(self, tokenizer: Any) -> list[str]:
        return tokenizer.batch_decode(
            self.ids.masked_fill(~self.mask, tokenizer.pad_token_id), skip_special_tokens=True
        )


def join(parts: Sequence[Completions], pad_token_id: int) -> Completions:
    """Several batches as one, padded to the longest prompt and completion."""
    width = max(p.prompt_ids.shape[1] for p in parts)
    length = max(p.ids.shape[1] for p in parts)
    columns = zip(
        *(
            (
                pad(p.prompt_ids, (width - p.prompt_ids.shape[1], 0), value=pad_token_id),
                pad(p.prompt_mask, (width - p.prompt_ids.shape[1], 0)),
                pad(p.ids, (0, length - p.ids.shape[1]), value=pad_token_id),
                pad(p.mask, (0, length - p.ids.shape[1])),
                p.finished,
            )
            for p in parts
        ),
        strict=True,
    )
    return Completions(*map(torch.cat, columns))


def end_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """Tokens that end a completion; a chat model has the end of a turn beside that of a text."""
    ends = model.generation_config.eos_token_id if model.can_generate() else None
    ends = ends if isinstance(ends, list) else [ends]
    return sorted({tokenizer.eos_token_id, *(end for end in ends if end is not None)})


def keep_top_p(probs: Tensor, top_p: float) -> Tensor:
    """Probabilities [B, V] outside the smallest set that holds `top_p` together set to 0 (nucleus
    sampling, Holtzman et al., 2020, https://arxiv.org/abs/1904.09751)."""
    ordered, order = probs.sort(-1, descending=True)
    # A token stays while those before it have less than top_p: the first always does.
    ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)
    return torch.zeros_like(probs).scatter(-1, order, ordered)


@torch.no_grad()
def sample(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    group_size: int = 1,
    batch_size: int = 0,
    add_special_tokens: bool = True,
) -> Completions:
    """Draws `group_size` completions of each prompt; those of one prompt are neighbours.

    Random numbers are those of torch's generator of the model's device.

    Args:
        model: a causal LM of transformers.
        tokenizer: its tokenizer, padding on the left.
        prompts: B / group_size prompts.
        max_new_tokens: completions without an end token stop here.
        temperature: of the softmax tokens are drawn from; 0 takes the most probable token.
        top_p: draw from the fewest tokens that have this probability together.
        group_size: completions per prompt; the prompt itself is read once.
        batch_size: completions drawn at a time, in whole groups; 0: all.
        add_special_tokens: what the tokenizer puts before a prompt; a chat template has it already.
    """
    count = max(1, batch_size // group_size) if batch_size else max(1, len(prompts))
    parts = []
    with evaluating(model):
        for start in range(0, len(prompts), count):
            encoded = tokenizer(
                list(prompts[start : start + count]),
                padding=True,
                add_special_tokens=add_special_tokens,
                return_tensors="pt",
            ).to(model.device)
            parts.append(
                _sample_batch(
                    model, encoded["input_ids"], encoded["attention_mask"],
                    end_tokens(model, tokenizer), tokenizer.pad_token_id, max_new_tokens,
                    temperature, top_p, group_size,
                )
            )  # fmt: skip
    return join(parts, tokenizer.pad_token_id)


def _sample_batch(
    model, prompt_ids, prompt_mask, ends, pad_token_id, max_new_tokens, temperature, top_p,
    group_size,
) -> Completions:  # fmt: skip
    accepted = forward_arguments(model)
    # transformers 5.24 renames the argument, and warns of the old name.
    cache_name = "cache" if "cache" in accepted else "past_key_values"
    cache = DynamicCache(config=model.config.get_text_config())
    ends = torch.tensor(ends, device=prompt_ids.device)
    # A prompt is read once for its group, but for models whose state cannot be repeated.
    once = all(hasattr(layer, "batch_repeat_interleave") for layer in cache.layers)
    if not once:
        prompt_ids = prompt_ids.repeat_interleave(group_size, 0)
        prompt_mask = prompt_mask.repeat_interleave(group_size, 0)

    def last_logits(ids: Tensor, attention_mask: Tensor) -> Tensor:
        arguments = {cache_name: cache, "attention_mask": attention_mask, "use_cache": True}
        if "position_ids" in accepted:
            arguments["position_ids"] = positions(attention_mask)[:, -ids.shape[1] :]
        if "logits_to_keep" in accepted:
            arguments["logits_to_keep"] = 1
        return model(ids, **arguments).logits[:, -1]

    logits = last_logits(prompt_ids, prompt_mask)  # [B, V]
    if once:
        cache.batch_repeat_interleave(group_size)
        logits, prompt_ids, prompt_mask = (
            x.repeat_interleave(group_size, 0) for x in (logits, prompt_ids, prompt_mask)
        )

    attention_mask = prompt_mask
    alive = torch.ones(len(prompt_ids), dtype=torch.bool, device=prompt_ids.device)
    ids, mask = [], []
    for i in range(max_new_tokens):
        if temperature == 0:
            token = logits.argmax(-1)
        else:
            probs = torch.softmax(logits.float() / temperature, -1)
            if top_p < 1:
                probs = keep_top_p(probs, top_p)
            token = torch.multinomial(probs, 1)[:, 0]
        token = token.where(alive, pad_token_id)
        ids.append(token)
        mask.append(alive)
        alive = alive & ~torch.isin(token, ends)
        if i + 1 == max_new_tokens or not alive.any():
            break
        attention_mask = torch.cat([attention_mask, mask[-1][:, None].long()], 1)
        logits = last_logits(token[:, None], attention_mask)
    return Completions(prompt_ids, prompt_mask, torch.stack(ids, 1), torch.stack(mask, 1), ~alive)


def completion_hidden(
    model: nn.Module, completions: Completions, trunk: nn.Module | None = None
) -> Tensor:
    """The hidden states [B, T, D] whose logits predict the completion tokens.

    Args:
        model: a causal LM of transformers.
        completions: B of at most T tokens.
        trunk: another backbone to read them with, as a critic's.
    """
    hidden = hidden_states(trunk or backbone(model), *completions.sequences())
    return hidden[:, completions.prompt_ids.shape[1] - 1 : -1]


def completion_logprobs(
    model: nn.Module,
    completions: Completions,
    *,
    temperature: float = 1.0,
    hidden: Tensor | None = None,
) -> Tensor:
    """Log-probability of every completion token, [B, T] fp32, 0 where masked.

    Args:
        model: a causal LM of transformers.
        completions: B of at most T tokens.
        temperature: of the softmax.
        hidden: completion_hidden of the same, where it is at hand.
    """
    return rlkern.linear_token_logprobs(
        completion_hidden(model, completions) if hidden is None else hidden,
        token_ids=completions.ids,
        mask=completions.mask,
        temperature=temperature,
        **head(model),
    )


@torch.no_grad()
def exact_reference(
    loss: rlkern.PolicyLoss, reference: nn.Module | None, completions: Completions
) -> dict[str, Tensor | None]:
    """The reference as arguments of PolicyLoss.from_hidden, where the loss has an exact KL: that
    takes the reference's whole distributions, and not its log-probabilities."""
    if reference is None or not loss.kl_coef or loss.kl_estimator != "exact":
        return {}
    of_head = head(reference)
    return {
        "ref_hidden": completion_hidden(reference, completions),
        "ref_weight": of_head["weight"],
        "ref_bias": of_head["bias"],
    }


@torch.no_grad()
def logprobs_of(model: nn.Module, completions: Completions, config: Any) -> Tensor:
    """completion_logprobs as a run's options have it (temperature, precision, micro-batches),
    without gradient."""

    def read(part: Completions) -> tuple[Tensor]:
        return (completion_logprobs(model, part, temperature=config.temperature),)

    with precision(config, model.device.type):
        return in_batches(read, completions, config.micro_batch_size)[0]


@torch.no_grad()
def in_batches(
    read: Callable[[Completions], tuple[Tensor, ...]], completions: Completions, batch_size: int
) -> tuple[Tensor, ...]:
    """What a function says of every completion token, without gradient.

    Args:
        read: gives tensors [b, t] fp32 of b completions of at most t tokens.
        completions: B of at most T tokens.
        batch_size: completions at a time; 0: all.

    Returns:
        As many tensors [B, T] fp32, 0 beyond a batch's longest completion.
    """
    everyone = torch.arange(len(completions.ids), device=completions.ids.device)
    out: tuple[Tensor, ...] = ()
    for rows in everyone.split(batch_size or len(everyone)):
        found = read(completions.select(rows))
        if not out:
            shape, device = completions.ids.shape, completions.ids.device
            out = tuple(torch.zeros(shape, device=device) for _ in found)
        for whole, part in zip(out, found, strict=True):
            whole[rows, : part.shape[1]] = part
    return out

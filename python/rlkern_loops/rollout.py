"""Completions: drawing them from a model, and reading their log-probabilities back."""

from __future__ import annotations

from typing import NamedTuple

import torch

import rlkern


class Completions(NamedTuple):
    """B prompts of at most P tokens with one completion of at most T tokens each.

    Attributes:
        prompt_ids: [B, P] int64, padded on the left.
        prompt_mask: [B, P] int64, 1 where a prompt token stands.
        ids: [B, T] int64, the completion, padded on the right.
        mask: [B, T] bool, true up to and including the end token.
        logprobs: [B, T] fp32, the log-probability each token was drawn with, 0 where masked.
        finished: [B] bool, whether the completion ended before the length limit.
    """

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    ids: torch.Tensor
    mask: torch.Tensor
    logprobs: torch.Tensor
    finished: torch.Tensor

    def select(self, rows: torch.Tensor) -> Completions:
        return Completions(*(x[rows] for x in self))

    def texts(self, tokenizer) -> list[str]:
        return tokenizer.batch_decode(self.ids, skip_special_tokens=True)


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position ids [B, L] that count tokens, so that left padding shifts nothing."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def sample(
    model,
    tokenizer,
    prompts: list[str],
    *,
    max_new_tokens: int,
    temperature: float,
    group_size: int = 1,
    generator: torch.Generator | None = None,
) -> Completions:
    """Draws `group_size` completions of each prompt; those of one prompt are neighbours.

    Args:
        model: a causal LM of transformers.
        tokenizer: its tokenizer, padding on the left.
        prompts: B / group_size prompts.
        max_new_tokens: completions without an end token stop here.
        temperature: of the softmax tokens are drawn from; 0 takes the most probable token.
        group_size: completions per prompt; the prompt itself is read once.
        generator: the random numbers to draw with, on the model's device.
    """
    encoded = tokenizer(prompts, padding=True, return_tensors="pt").to(model.device)
    prompt_ids, prompt_mask = encoded["input_ids"], encoded["attention_mask"]
    output = model(
        prompt_ids,
        attention_mask=prompt_mask,
        position_ids=positions(prompt_mask),
        use_cache=True,
        logits_to_keep=1,
    )
    cache = output.past_key_values
    cache.batch_repeat_interleave(group_size)
    logits = output.logits[:, -1].repeat_interleave(group_size, 0)  # [B, V]
    prompt_ids = prompt_ids.repeat_interleave(group_size, 0)
    prompt_mask = prompt_mask.repeat_interleave(group_size, 0)

    attention_mask = prompt_mask
    alive = torch.ones(len(prompt_ids), dtype=torch.bool, device=model.device)
    ids, mask, logprobs = [], [], []
    for i in range(max_new_tokens):
        if temperature == 0:
            token = logits.argmax(-1)
        else:
            probs = torch.softmax(logits.float() / temperature, -1)
            token = torch.multinomial(probs, 1, generator=generator)[:, 0]
        token = token.where(alive, tokenizer.pad_token_id)
        ids.append(token)
        mask.append(alive)
        logprobs.append(
            rlkern.token_logprobs(logits, token, mask=alive, temperature=temperature or 1.0)
        )
        alive = alive & (token != tokenizer.eos_token_id)
        if i + 1 == max_new_tokens or not alive.any():
            break
        attention_mask = torch.cat([attention_mask, mask[-1][:, None].long()], 1)
        output = model(
            token[:, None],
            attention_mask=attention_mask,
            position_ids=positions(attention_mask)[:, -1:],
            past_key_values=cache,
            use_cache=True,
        )
        logits = output.logits[:, -1]
    return Completions(
        prompt_ids,
        prompt_mask,
        torch.stack(ids, 1),
        torch.stack(mask, 1),
        torch.stack(logprobs, 1),
        ~alive,
    )


def completion_hidden(model, completions: Completions) -> torch.Tensor:
    """The hidden states [B, T, D] whose logits predict the completion tokens."""
    ids = torch.cat([completions.prompt_ids, completions.ids], 1)
    attention_mask = torch.cat([completions.prompt_mask, completions.mask.long()], 1)
    hidden = model.base_model(
        ids,
        attention_mask=attention_mask,
        position_ids=positions(attention_mask),
        use_cache=False,
    ).last_hidden_state
    return hidden[:, completions.prompt_ids.shape[1] - 1 : -1]


def completion_logprobs(
    model, completions: Completions, *, temperature: float = 1.0
) -> torch.Tensor:
    """Log-probability of every completion token, [B, T] fp32, 0 where masked."""
    head = model.get_output_embeddings()
    return rlkern.linear_token_logprobs(
        completion_hidden(model, completions),
        head.weight,
        completions.ids,
        bias=head.bias,
        mask=completions.mask,
        temperature=temperature,
    )

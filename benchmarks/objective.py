"""dapo as trainers write it, and log-probabilities that tell whether its clip is there.

What the benchmarks of all entry points share: from logits, from hidden states, a training step.
"""

from __future__ import annotations

import torch

CLIP_LOW, CLIP_HIGH = 0.2, 0.28


def draw_ratios(shape, generator):
    """Ratios of which a fifth lie far beyond either clip bound and none within 0.09 of one.

    Two roundings of a log-probability near -11 to bf16, 1/16 at most, then carry none of them
    across a bound, with its whole gradient, and yet a loss without its clip is far off. The sign of
    the advantage says which of those beyond a bound are clipped.
    """

    def uniform(low, high):
        drawn = torch.rand(shape, generator=generator, device=generator.device)
        return low + (high - low) * drawn

    low, high = 1 - CLIP_LOW, 1 + CLIP_HIGH
    place = uniform(0, 1)
    outside = torch.where(place < 0.2, uniform(0.5, low - 0.09), uniform(high + 0.09, 1.7))
    return torch.where((place < 0.2) | (place > 0.8), outside, uniform(low + 0.09, high - 0.09))


def learns(ratio, advantages):
    """Whether a token's log-probability has a gradient: some advantage, and no clip in force."""
    above, below = ratio > 1 + CLIP_HIGH, ratio < 1 - CLIP_LOW
    return (advantages != 0) & ~((advantages > 0) & above) & ~((advantages < 0) & below)


def surrogate(logprobs, old_logprobs, advantages):
    """Of each token; what is in bf16 meets the old log-probabilities' fp32 here."""
    ratio = (logprobs - old_logprobs).exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantages)


def objective(logprobs, old_logprobs, advantages):
    """Of sequences, each with one advantage."""
    return surrogate(logprobs, old_logprobs, advantages[:, None]).mean()

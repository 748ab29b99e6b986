"""The divergences as literal lines, in float64."""

from __future__ import annotations

import torch

KINDS = ("kl", "reverse_kl", "js")


def literal(logits, ref_logits, *, divergence="kl", beta=0.5, temperature=1.0, softcap=None,
            mask=None):  # fmt: skip
    """sum p log p / q; p = 0 and q = 0 by the limit of x log x."""
    tokens = logits.shape[:-1]
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.expand(tokens)[..., None]

    def log_softmax(x):
        z = x if softcap is None else softcap * torch.tanh(x / softcap)
        return (z / temperature).log_softmax(-1)

    a, b = log_softmax(logits), log_softmax(ref_logits)
    p, q = a.exp(), b.exp()
    if divergence == "kl":
        value = torch.where(p == 0, 0.0, p * (a - b)).sum(-1)
    elif divergence == "reverse_kl":
        value = torch.where(q == 0, 0.0, q * (b - a)).sum(-1)
    else:
        m = (beta * p + (1 - beta) * q).log()
        of_p = torch.where(p == 0, 0.0, p * (a - m))
        of_q = torch.where(q == 0, 0.0, q * (b - m))
        value = (beta * of_p + (1 - beta) * of_q).sum(-1)
    return value if mask is None else value.where(mask, 0.0)

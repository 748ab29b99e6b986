"""Log-probability and entropy of chosen tokens, and their gradient, as formulas.

Computes in float64 for float64 logits, in float32 otherwise. Every function takes flat rows:
logits [N, V], the rest [N].
"""

from __future__ import annotations

import torch
from torch import Tensor


def capped(logits: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """y = c tanh(x / c) and dy/dx = 1 - tanh^2; x itself and None without a cap."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is None:
        return x, None
    tanh = torch.tanh(x / softcap)
    return softcap * tanh, 1 - tanh**2


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """What is computed in, and comes out: fp64 for fp64, fp32 for all else."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def per_row(logits: Tensor, value: Tensor | None, otherwise: bool | float) -> Tensor:
    """One value per row of logits [..., V], [N], so that the formulas need no special case."""
    rows = logits.shape[:-1].numel()
    if value is not None:
        return value.reshape(rows)
    dtype = torch.bool if otherwise is True else wide_dtype(logits)
    return torch.full((rows,), otherwise, dtype=dtype, device=logits.device)


def relative(y: Tensor, temperature: Tensor, top: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """z - max(z) per row for z = y / temperature, and the maximum of y, if it is not given.

    The difference is taken before the division, so that it is exact for large logits. A row of
    nothing but -inf stays so.
    """
    top = y.amax(-1, keepdim=True) if top is None else top
    shifted = torch.where(top == -torch.inf, y, y - top) / temperature[:, None]
    return shifted, top


def forward(
    logits: Tensor,
    token_ids: Tensor,
    counts: Tensor,
    temperature: Tensor,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns logprobs [N], entropy [N] and state [N, 2]: max of y, log sum exp(z - max z).

    logp = -log1p(sum_{j != y} exp(z_j - z_y)) where the target is the maximum, which stays exact
    when it carries nearly all the mass; z_y - max - log(sum) elsewhere. H = log_sum - E[z - max].
    """
    counts = counts.bool()
    token_ids = token_ids.where(counts, 0)
    inside = (token_ids >= 0) & (token_ids < logits.shape[-1])
    ids = token_ids.where(inside, 0)[:, None]
    y, _ = capped(logits, softcap)
    z, top = relative(y, temperature)
    e = z.exp()
    others = e.scatter(1, ids, 0.0).sum(-1)
    target = z.gather(1, ids).squeeze(1)
    log_sum = torch.where(target == 0, torch.log1p(others), torch.log(others + target.exp()))
    logprobs = target - log_sum
    total = others + target.exp()
    weighted = torch.where(e == 0, 0.0, z * e).sum(-1) / total
    entropy = log_sum - weighted

    dead = top.squeeze(1) == -torch.inf
    logprobs = torch.where(dead, -torch.inf, logprobs).where(inside, torch.nan)
    entropy = torch.where(dead, 0.0, entropy)
    log_sum = torch.where(dead, 0.0, log_sum)
    state = torch.stack([top.squeeze(1), log_sum], -1)
    return (
        logprobs.where(counts, 0.0),
        entropy.where(counts, 0.0),
        state.where(counts[:, None], 0.0),
    )


def outputs(
    logits: Tensor,
    token_ids: Tensor,
    counts: Tensor,
    temperature: Tensor,
    softcap: float | None,
    state: Tensor,
) -> Tensor:
    """[N, 3]: the mean of z, log sum_j p_j^2, and 1 where the token is the argmax of z."""
    counts = counts.bool()
    y, _ = capped(logits, softcap)
    z, top = relative(y, temperature)
    squares = torch.logsumexp(2 * z, -1) - 2 * state[:, 1]
    best = (y == top).to(torch.uint8).argmax(-1)
    is_best = (best == token_ids) & (top.squeeze(1) != -torch.inf) & ~state[:, 1].isnan()
    mean = (y / temperature[:, None]).mean(-1)
    found = torch.stack([mean, squares, is_best.to(y.dtype)], -1)
    return found.where(counts[:, None], 0.0)


def backward(
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    logits: Tensor,
    token_ids: Tensor,
    counts: Tensor,
    temperature: Tensor,
    softcap: float | None,
    logprobs: Tensor,
    entropy: Tensor,
    state: Tensor,
) -> Tensor:
    """d logp / d z_j = [j = y] - p_j, the target's as -expm1(logp); d H / d z_j = p_j (E[z] - z_j).

    Then through temperature, softcap and rounding, once, to the logits' dtype.
    """
    counts = counts.bool()
    token_ids = token_ids.where(counts, 0)
    inside = (token_ids >= 0) & (token_ids < logits.shape[-1])
    ids = token_ids.where(inside, 0)[:, None]
    y, slope = capped(logits, softcap)
    z, top = relative(y, temperature, state[:, :1])
    log_sum = state[:, 1:]
    p = (z - log_sum).exp()
    g = grad_logprobs.where(logprobs != -torch.inf, 0.0)[:, None]
    h = grad_entropy[:, None]
    mean = log_sum - (entropy[:, None] if entropy.numel() else 0.0)
    from_entropy = torch.where(h == 0, 0.0, torch.where(p == 0, 0.0, h * p * (mean - z)))
    grad = -g * p + from_entropy
    target = g * -torch.expm1(logprobs[:, None]).where(g != 0, 0.0) + from_entropy.gather(1, ids)
    grad = grad.scatter(1, ids, target.where(inside[:, None], grad.gather(1, ids)))
    grad = grad / temperature[:, None]
    if slope is not None:
        grad = torch.where(grad == 0, 0.0, grad * slope)

    broken = torch.isnan(log_sum) | torch.isnan(logprobs[:, None])
    silent = ((g == 0) & (h == 0)) | (top == -torch.inf)
    grad = torch.where(silent, 0.0, grad)
    grad = torch.where(broken, torch.nan, grad)
    return grad.where(counts[:, None], 0.0).to(logits.dtype)

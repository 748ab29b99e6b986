"""GAE, discounted returns and V-trace as a loop over time, from the last token to the first.

    delta_t = rho_t (r_t + gamma V_{t+1} - V_t)
    x_t     = delta_t + gamma lam c_t x_{t+1}

GAE (Schulman et al., 2016, arXiv 1506.02438) has rho = c = 1, and x is the advantage; discounted
returns have V = 0 and lam = 1, too; in V-trace (Espeholt et al., 2018, arXiv 1802.01561) x is what
is added to the values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MASK_MODES = ("carry", "break")


class ScanBatch(NamedTuple):
    """One value per token, [B, T], or [total] with offsets [B + 1]; floats all of one dtype."""

    rewards: Tensor
    values: Tensor | None = None  # none: discounted returns
    log_ratios: Tensor | None = None  # given: V-trace
    mask: Tensor | None = None  # bool
    dones: Tensor | None = None  # bool
    bootstrap_value: Tensor | None = None  # [B]
    lam: Tensor | None = None  # [B]
    offsets: Tensor | None = None


class ScanOptions(NamedTuple):
    """In the order of csrc/common/return_scan.h."""

    gamma: float
    lam: float  # where the batch has none per sequence
    breaks: bool  # a masked token enters as value 0 and reward 0
    rho_bar: float = float("inf")
    c_bar: float = float("inf")
    rho_pg_bar: float = float("inf")


def return_scan(batch: ScanBatch, options: ScanOptions) -> tuple[Tensor, Tensor]:
    """GAE: advantages, returns. Discounted returns: these, and an empty tensor. V-trace: the
    corrected values, the policy gradient's advantages. All are 0 at masked tokens.

    In float64, rounded once: what is 6e-8 off in gamma lam is 1e-4 off after ten thousand tokens.
    At a done what follows is left out, also where it is NaN.
    """
    if batch.offsets is not None:
        places, padded = _padded(batch)
        first, second = return_scan(padded, options)
        return first[places], second if batch.values is None else second[places]

    dtype = batch.rewards.dtype
    given = {name: x for name, x in batch._asdict().items() if x is not None}
    batch = ScanBatch(**{n: x.double() if x.is_floating_point() else x for n, x in given.items()})
    rewards = batch.rewards
    rows, steps = rewards.shape
    counts = torch.ones_like(rewards, dtype=torch.bool) if batch.mask is None else batch.mask
    rewards = rewards.where(counts, 0.0)
    values = torch.zeros_like(rewards) if batch.values is None else batch.values.where(counts, 0.0)
    ends = torch.zeros_like(counts) if batch.dones is None else batch.dones & counts
    rho, c, rho_pg = (torch.ones_like(rewards) for _ in range(3))
    if batch.log_ratios is not None:
        ratio = batch.log_ratios.where(counts, 0.0).exp()
        rho, c = ratio.clamp(max=options.rho_bar), ratio.clamp(max=options.c_bar)
        rho_pg = ratio.clamp(max=options.rho_pg_bar)
    lam = rewards.new_full((rows,), options.lam) if batch.lam is None else batch.lam

    x = rewards.new_zeros(rows)
    next_value = x if batch.bootstrap_value is None else batch.bootstrap_value
    begun = counts.new_zeros(rows)  # from the end, whether a token has counted
    of_step = []
    for t in reversed(range(steps)):
        begun = begun | counts[:, t]
        enters = begun if options.breaks else counts[:, t]
        goes_on = ~ends[:, t]
        onward = options.gamma * lam * x
        target = rewards[:, t] + (options.gamma * next_value).where(goes_on, 0.0) - values[:, t]
        advantage = rho_pg[:, t] * (target + onward.where(goes_on, 0.0))
        here = rho[:, t] * target + (c[:, t] * onward).where(goes_on, 0.0)
        x = here.where(enters, x)
        next_value = values[:, t].where(enters, next_value)
        of_step.append(torch.stack([here, advantage]))
    if steps == 0:
        scanned, advantages = rewards, values
    else:
        scanned, advantages = torch.stack(of_step[::-1], -1).where(counts, 0.0)
    if batch.values is None:
        first, second = scanned, scanned.new_zeros(0)
    elif batch.log_ratios is None:
        first, second = scanned, scanned + values
    else:
        first, second = scanned + values, advantages
    return first.to(dtype), second.to(dtype)


def _padded(batch: ScanBatch) -> tuple[tuple[Tensor, Tensor], ScanBatch]:
    """Where each packed token lies in the padded layout, and the batch in that layout."""
    offsets = batch.offsets
    assert offsets is not None
    places = torch.arange(batch.rewards.shape[0], device=offsets.device)
    row = torch.searchsorted(offsets[1:], places, right=True)
    column = places - offsets[row]
    shape = (offsets.shape[0] - 1, int(offsets.diff().max()) if offsets.shape[0] > 1 else 0)

    def spread(packed: Tensor | None) -> Tensor | None:
        return None if packed is None else packed.new_zeros(shape).index_put((row, column), packed)

    mask = torch.ones_like(places, dtype=torch.bool) if batch.mask is None else batch.mask
    return (row, column), ScanBatch(
        rewards=batch.rewards.new_zeros(shape).index_put((row, column), batch.rewards),
        values=spread(batch.values),
        log_ratios=spread(batch.log_ratios),
        mask=spread(mask),
        dones=spread(batch.dones),
        bootstrap_value=batch.bootstrap_value,
        lam=batch.lam,
    )

"""Inputs of the advantages' kernels, and how far results may be from float64."""

from __future__ import annotations

import torch

from rlkern.reference.group_advantages import GroupBatch
from rlkern.reference.return_scan import ScanBatch, ScanOptions

KINDS = ("gae", "returns", "vtrace")
LENGTHS = (70, 0, 1, 600, 9)  # a tile of one warp has 288 tokens
NAN = float("nan")
U = 2.0**-24


def scan_batch(kind, lengths=LENGTHS, packed=False, seed=0, plain=False):
    """With masked tokens at the ends of sequences, within them, and a sequence of them alone;
    `plain` leaves out what may be left out."""
    g = torch.Generator().manual_seed(seed)
    shape = (sum(lengths),) if packed else (len(lengths), max(lengths, default=0))

    def normal(*size):
        return torch.randn(*size, generator=g)

    rewards, values, log_ratios = normal(*shape), normal(*shape), 0.3 * normal(*shape)
    batch = ScanBatch(
        rewards,
        None if kind == "returns" else values,
        log_ratios if kind == "vtrace" else None,
        offsets=torch.tensor((0, *lengths)).cumsum(0) if packed else None,
    )
    if plain:
        return batch
    mask = torch.rand(shape, generator=g) < 0.7
    if packed:
        ends = batch.offsets[1:]
        for begin, end in zip(batch.offsets[:-1].tolist(), ends.tolist(), strict=True):
            mask[max(begin, end - (end - begin) // 3) : end] = False
    else:
        mask &= torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    return batch._replace(
        mask=mask,
        dones=torch.rand(shape, generator=g) < 0.02,
        bootstrap_value=normal(len(lengths)),
        lam=None if kind == "returns" else 0.9 + 0.1 * torch.rand(len(lengths), generator=g),
    )


def mapped(batch, function):
    """A batch of tensors with each that it has replaced by function(tensor)."""
    return type(batch)(*(function(x) if isinstance(x, torch.Tensor) else x for x in batch))


def in_double(batch):
    return mapped(batch, lambda x: x.double() if x.is_floating_point() else x)


def with_garbage(batch, value):
    """The batch with `value` wherever a token does not count."""
    masked = ~batch.mask
    changed = {
        name: getattr(batch, name).masked_fill(masked, value)
        for name in ("rewards", "values", "log_ratios")
        if getattr(batch, name) is not None
    }
    return batch._replace(**changed, dones=batch.dones | masked)


def options_of(kind, breaks=False):
    bars = {"rho_bar": 1.1, "c_bar": 1.0, "rho_pg_bar": 1.2} if kind == "vtrace" else {}
    return ScanOptions(0.99, 1.0 if kind == "returns" else 0.95, breaks, **bars)


def numbers(options):
    return [float(x) for x in options]


def close(found, exact, terms):
    """`terms`: the sum of the sizes of what is added up, and their number."""
    total, count = terms
    allowed = U * (1 + U) * exact.abs() + count * 2.0**-52 * total
    error = (found.double() - exact).abs()
    assert error.shape == exact.shape and (error <= allowed).all(), (error - allowed).max()


def terms_of(batch):
    """Of a scan, NaN under the mask counting as 0."""
    # A ratio of vtrace is at most 1.2, and a value stands in two deltas and in the result.
    parts = [1.2 * batch.rewards.nan_to_num(0.0).abs().sum()]
    for x in (batch.values, batch.bootstrap_value):
        if x is not None:
            parts.append(3.6 * x.nan_to_num(0.0).abs().sum())
    return float(sum(parts)), batch.rewards.shape[-1]


def group_batch(baseline, columns=1, group_size=0, sizes=(1, 4, 9, 2, 33, 70, 1), seed=0):
    """Rewards with ties and NaN cells; where there is no group_size, groups of any sizes in any
    order, one of them of NaN alone, under ids of any size and sign."""
    g = torch.Generator().manual_seed(seed)
    count = 12 * group_size if group_size else sum(sizes)
    rewards = (2 * torch.randn(count, columns, generator=g)).round(decimals=1)
    rewards[torch.rand(count, columns, generator=g) < 0.1] = NAN
    ids = None
    if not group_size:
        names = torch.randint(-(2**62), 2**62, (len(sizes),), generator=g)
        names[:2] = torch.tensor([0, -1])
        ids = names.repeat_interleave(torch.tensor(sizes))[torch.randperm(count, generator=g)]
        rewards[ids == names[3]] = NAN
    else:
        rewards[:group_size] = 0.1  # equal ones
        rewards[group_size : 2 * group_size] = NAN
    return GroupBatch(
        rewards,
        group_size,
        ids,
        torch.randint(0, 900, (count,), generator=g).float()
        if baseline == "length_weighted"
        else None,
        torch.randn(count, columns, generator=g) if baseline == "given" else None,
        torch.rand(columns, generator=g) if columns > 1 else None,
    )

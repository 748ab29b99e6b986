"""whiten over the values of two processes, which import this by its name."""

from __future__ import annotations

import torch
import torch.distributed as dist

import rlkern

OPTIONS = ({}, {"unbiased": False, "eps_mode": "clamp", "shift_mean": False}, {"scale": False})


def joined():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(11, 7, generator=generator) * 3 + 40
    return x, torch.rand(11, 7, generator=generator) < 0.6


def process(rank, file, cut, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    x, mask = joined()
    rows = slice(0, cut) if rank == 0 else slice(cut, len(x))
    parts = [rlkern.whiten(x[rows], mask[rows], group=dist.group.WORLD, **o) for o in OPTIONS]
    # Together the two have one value that counts.
    lone = torch.zeros_like(mask)
    lone[10, 3] = True
    try:
        rlkern.whiten(x[rows], lone[rows], group=dist.group.WORLD)
    except ValueError as error:
        parts.append(str(error))
    torch.save(parts, f"{folder}/{rank}.pt")
    dist.destroy_process_group()

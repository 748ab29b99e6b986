"""Metrics of a part of a batch, also in a process of its own, which imports this by its name."""

from __future__ import annotations

import torch
import torch.distributed as dist
from batches import call, random_batch, used_by

from rlkern import PolicyLoss
from rlkern.losses import RolloutCorrection


def loss_of(preset):
    return PolicyLoss.preset(
        preset,
        kl_coef=0.1,
        entropy_coef=0.1,
        off_policy_threshold=0.05,
        correction=RolloutCorrection(high=1.5),
    )


def needed(loss):
    return {"normalizer": 37.0} if loss.aggregation == "seq_mean_token_sum_norm" else {}


def metrics_of(loss, batch, dtype=torch.float32, rows=slice(None), **given):
    batch = {name: x[rows] for name, x in used_by(loss, batch).items()}
    return call(loss, batch, dtype, **needed(loss) | given).metrics


def process(rank, file, preset, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    loss, batch = loss_of(preset), random_batch(8, 9)
    mine = metrics_of(loss, batch, rows=slice(0, 3) if rank == 0 else slice(3, 8))
    torch.save(mine.all_reduce().item_dict(), f"{folder}/{preset}-{rank}.pt")
    dist.destroy_process_group()

"""Metrics merged over micro-batches and processes are those of the joined batch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.multiprocessing as mp
from batches import RTOL, call, random_batch
from metrics_of_parts import loss_of, metrics_of, process

from rlkern import PolicyLoss, ValueLoss
from rlkern.losses import PRESETS

PARTS = (slice(0, 3), slice(3, 4), slice(4, 8))


def assert_same(merged, joined, rtol):
    merged, joined = merged.item_dict(), joined.item_dict()
    assert merged.keys() == joined.keys()
    for name, value in joined.items():
        if math.isnan(value):
            assert math.isnan(merged[name]), name
        else:
            assert merged[name] == pytest.approx(value, rel=rtol, abs=rtol), name


@pytest.mark.parametrize("per_token", [False, True], ids=["A[B]", "A[B,T]"])
@pytest.mark.parametrize("preset", PRESETS)
def test_of_micro_batches_added(backend, preset, per_token):
    loss, batch = loss_of(preset), random_batch(8, 9, per_token=per_token)
    parts = [metrics_of(loss, batch, backend.dtype, rows) for rows in PARTS]
    joined = metrics_of(loss, batch, backend.dtype)
    # A sum over a part is rounded on its own: ten times the bound of one.
    assert_same(parts[0] + parts[1] + parts[2], joined, 10 * RTOL[backend.dtype])
    assert_same(sum(parts), joined, 10 * RTOL[backend.dtype])


def test_with_a_global_normalizer_policy_losses_add_up(backend):
    loss, batch = loss_of("dapo"), random_batch(8, 9)
    parts = [metrics_of(loss, batch, backend.dtype, rows, normalizer=50.0) for rows in PARTS]
    added = sum(part["policy_loss"] for part in parts)
    assert float(sum(parts)["policy_loss"]) == pytest.approx(float(added))
    joined = metrics_of(loss, batch, backend.dtype, normalizer=50.0)
    assert_same(sum(parts), joined, 10 * RTOL[backend.dtype])


def test_a_part_in_which_nothing_counts_changes_nothing(backend):
    loss, batch = loss_of("ppo"), random_batch(4, 5)
    joined = metrics_of(loss, batch, backend.dtype)
    nothing = metrics_of(loss, batch | {"mask": torch.zeros(4, 5, dtype=torch.bool)}, backend.dtype)
    assert math.isnan(nothing["ratio_min"]) and math.isnan(nothing["ratio_max"])
    assert nothing["approx_kl"] == 0 and nothing["clip_frac"] == 0
    merged, alone = (joined + nothing).item_dict(), joined.item_dict()
    assert merged.pop("sequences") == 8 and alone.pop("sequences") == 4
    assert merged == pytest.approx(alone)


@pytest.mark.parametrize("preset", ["grpo", "gspo", "cispo"])
def test_over_two_processes(tmp_path, preset):
    mp.spawn(process, (str(tmp_path / "store"), preset, str(tmp_path)), nprocs=2)
    joined = metrics_of(loss_of(preset), random_batch(8, 9)).item_dict()
    for rank in (0, 1):
        merged = torch.load(tmp_path / f"{preset}-{rank}.pt")
        assert merged == pytest.approx(joined, rel=4e-5, abs=4e-5, nan_ok=True)


# ---- reading --------------------------------------------------------------------------------


def test_each_is_a_tensor_without_dimensions_or_gradient(backend):
    metrics = metrics_of(loss_of("grpo"), random_batch(), backend.dtype)
    assert len(metrics) == len(list(metrics)) and "clip_frac" in metrics
    for name, value in metrics.items():
        assert value.shape == () and value.dtype == torch.float64, name
        assert not value.requires_grad
    numbers = metrics.item_dict()
    assert list(numbers) == list(metrics)
    assert all(type(value) is float for value in numbers.values())
    assert numbers["kl"] == float(metrics["kl"])
    assert "kl" in repr(metrics)


@pytest.mark.parametrize("nothing", [False, True], ids=["some", "nothing counts"])
@pytest.mark.parametrize("preset", PRESETS)
def test_numbers_are_the_tensors_own(preset, nothing):
    """item_dict reads Python numbers, and not each tensor: to the bit."""
    batch = random_batch(4, 5)
    if nothing:
        batch |= {"mask": torch.zeros(4, 5, dtype=torch.bool)}
    metrics = metrics_of(loss_of(preset), batch)
    read = torch.tensor(list(metrics.item_dict().values()), dtype=torch.float64)
    torch.testing.assert_close(
        read, torch.stack(list(metrics.values())), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("returns", ["vary", "equal", "equal to the values", "not a number"])
def test_numbers_of_values_are_the_tensors_own(returns):
    """Where explained_variance divides by 0, too."""
    values = torch.randn(3, 4)
    target = {"vary": torch.randn(3, 4), "equal": torch.ones(3, 4)}.get(returns, values.clone())
    if returns == "equal to the values":
        values = target = torch.ones(3, 4)
    if returns == "not a number":
        target = torch.full((3, 4), torch.nan)
    metrics = ValueLoss(clip=None)(values, target).metrics
    read = torch.tensor(list(metrics.item_dict().values()), dtype=torch.float64)
    torch.testing.assert_close(
        read, torch.stack(list(metrics.values())), rtol=0, atol=0, equal_nan=True
    )


def test_what_a_loss_measures_depends_on_it():
    batch = random_batch()
    plain = {n: batch[n] for n in ("logprobs", "advantages", "mask")}
    ppo = call(PolicyLoss.preset("ppo"), plain).metrics
    assert not {"kl", "entropy", "dual_clip_frac", "rollout_ess", "kept_frac"} & set(ppo)
    both = {n: batch[n] for n in ("entropy", "ref_logprobs")}
    more = PolicyLoss(dual_clip=3.0)(batch["logprobs"], batch["advantages"], **both).metrics
    assert {"kl", "entropy", "dual_clip_frac"} <= set(more)
    assert {"rollout_ess", "rollout_weight_mean", "kept_frac"} <= set(
        metrics_of(loss_of("ppo"), batch)
    )
    assert "clip_frac" not in metrics_of(loss_of("reinforce"), batch)
    assert "vespo_phi_mean" in metrics_of(loss_of("vespo"), batch)
    assert "cispo_clip_ratio" in metrics_of(loss_of("cispo"), batch)


def test_one_that_is_not_there_says_why():
    batch = random_batch()
    metrics = call(PolicyLoss(), {n: batch[n] for n in ("logprobs", "advantages", "mask")}).metrics
    with pytest.raises(KeyError, match="'kl': this loss or call does not have it; there are pol"):
        metrics["kl"]
    with pytest.raises(KeyError, match="'clipfrac': there is no such metric; there are policy"):
        metrics["clipfrac"]


def test_kinds_do_not_mix():
    batch = random_batch()
    ppo, cispo = (metrics_of(PolicyLoss.preset(name), batch) for name in ("ppo", "cispo"))
    with pytest.raises(ValueError, match="metrics: expected those of the same loss and arguments"):
        ppo + cispo
    with pytest.raises(TypeError):
        ppo + 1
    with pytest.raises(TypeError):
        1 + ppo

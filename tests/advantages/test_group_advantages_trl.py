"""group_advantages against the code of TRL's GRPO trainer itself."""

from __future__ import annotations

import ast
import inspect
import textwrap
from types import SimpleNamespace

import pytest
import torch

import rlkern

trainer = pytest.importorskip("trl.trainer.grpo_trainer")


def advantage_block():
    """The statements of the trainer from the sum of the rewards to the zeroing of NaN."""
    branch = 'self.multi_objective_aggregation == "sum_then_normalize"'
    for _, method in inspect.getmembers(trainer.GRPOTrainer, inspect.isfunction):
        source = textwrap.dedent(inspect.getsource(method))
        if f"if {branch}" not in source:
            continue
        statements = ast.parse(source).body[0].body
        texts = [ast.unparse(s) for s in statements]
        branch = ast.unparse(ast.parse(branch))
        (first,) = [i for i, t in enumerate(texts) if t.startswith("unscorable_mask =")]
        (last,) = [i for i, t in enumerate(texts) if "nan_to_num(advantages" in t]
        assert any(t.startswith(f"if {branch}") for t in texts[first:last])
        return compile("\n".join(texts[first : last + 1]), "trl", "exec")
    raise AssertionError("no method of GRPOTrainer holds the block")


BLOCK = advantage_block()


def of_trl(rewards, generations, weights, aggregation, scale="group"):
    names = {
        "self": SimpleNamespace(
            multi_objective_aggregation=aggregation,
            reward_weights=weights,
            reward_funcs=[None] * rewards.shape[1],
            scale_rewards=scale,
        ),
        "torch": torch,
        "nanstd": trainer.nanstd,
        "rewards_per_func": rewards,
        "num_generations": generations,
        "device": rewards.device,
    }
    # TRL's deviation divides whole numbers, which gives the default dtype.
    default = torch.get_default_dtype()
    torch.set_default_dtype(rewards.dtype)
    try:
        exec(BLOCK, names)
    finally:
        torch.set_default_dtype(default)
    return names["advantages"]


def batch(seed, dtype, generations=4, functions=3):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(6 * generations, functions, generator=generator).to(dtype)
    if seed % 2:
        rewards = rewards.round()  # ties, and groups in which all are alike
    rewards[torch.rand(rewards.shape, generator=generator) < 0.2] = torch.nan
    rewards[:generations] = rewards[:1]
    rewards[2 * generations + 1] = torch.nan
    return rewards, torch.rand(functions, generator=generator).to(dtype) * 2


def close(actual, expected):
    single = actual.dtype == torch.float32
    # TRL ran in float64: ours rounds once. Its mean of equal rewards may be an ulp off, over 1e-4.
    torch.testing.assert_close(
        actual.double(), expected, rtol=2**-23 if single else 1e-11, atol=1e-7 if single else 1e-11
    )


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("seed", range(6))
def test_sum_then_normalize(group_backend, seed, scale):
    rewards, weights = batch(seed, group_backend.dtype)
    # What TRL sums before it normalises, its callers sum: one reward per completion. A NaN there
    # is a completion without any.
    summed = (rewards * weights).nansum(1)
    summed[rewards.isnan().all(1)] = torch.nan
    theirs = of_trl(
        summed.double()[:, None], 4, torch.ones(1).double(), "sum_then_normalize", scale
    )
    ours = rlkern.group_advantages(
        summed, group_size=4, scale={"group": "std", "batch": "batch_std", "none": "none"}[scale]
    )
    scored = summed.view(-1, 4).isnan().logical_not().sum(1) != 1
    several = scored.repeat_interleave(4)
    close(ours[several], theirs[several])
    # Of a group with one scored completion TRL has no deviation either: NaN, and so 0.
    assert (ours[~several] == 0).all()
    if scale == "group":
        assert (theirs[~several] == 0).all()


@pytest.mark.parametrize("seed", range(6))
def test_normalize_then_sum(group_backend, seed):
    rewards, weights = batch(seed, group_backend.dtype)
    # One scored completion in a column of a group: NaN there, which TRL's sum then leaves out.
    theirs = of_trl(rewards.double(), 4, weights.double(), "normalize_then_sum")
    ours = rlkern.group_advantages(rewards, group_size=4, reward_weights=weights)
    close(ours, theirs)


def test_generations_of_one(group_backend):
    rewards, weights = batch(0, group_backend.dtype)
    theirs = of_trl(rewards.double(), 1, weights.double(), "normalize_then_sum")
    ours = rlkern.group_advantages(rewards, group_size=1, reward_weights=weights)
    assert (ours == 0).all() and (theirs == 0).all()

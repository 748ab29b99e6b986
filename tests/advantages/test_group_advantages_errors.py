"""What group_advantages refuses, and with which words."""

from __future__ import annotations

import re

import pytest
import torch

import rlkern
from rlkern import _backend
from rlkern.ops import _register

R = torch.zeros(6)
ROWS = torch.zeros(6, 2)
IDS = torch.zeros(6, dtype=torch.int64)
MASK = torch.ones(6, 3, dtype=torch.bool)
TOKENS = {"rewards": ROWS, "batch": "tokens"}


def needs_grad(x):
    return x.clone().requires_grad_()


REFUSED = [
    ({"rewards": [0.0]}, TypeError, "rewards: expected a torch.Tensor, got list"),
    ({"rewards": R.to_sparse()}, TypeError, "rewards: expected a dense tensor, got the layout"),
    ({"rewards": R.long()}, TypeError, "rewards: expected float32, bfloat16, float16 or float64"),
    ({"rewards": R[0]}, ValueError, "rewards: expected shape [N] or [N, K], got []"),
    ({"rewards": R.view(1, 2, 3)}, ValueError, "rewards: expected shape [N] or [N, K], got [1, "),
    ({"rewards": ROWS[:, :0]}, ValueError, "rewards: expected shape [N] or [N, K], got [6, 0]"),
    ({"rewards": needs_grad(R)}, ValueError, "rewards: expected a tensor that needs no gradient"),
    ({"group_size": None}, ValueError, "group_size, group_ids: expected one of them, got neither"),
    ({"group_ids": IDS}, ValueError, "group_size, group_ids: expected one of them, got both"),
    ({"group_size": 2.0}, TypeError, "group_size: expected an int, got float"),
    ({"group_size": True}, TypeError, "group_size: expected an int, got bool"),
    ({"group_size": 0}, ValueError, "group_size: expected a number of at least 1 that divides"),
    ({"group_size": 4}, ValueError, "that divides the 6 rewards, got 4"),
    ({"group_size": None, "group_ids": [0] * 6}, TypeError, "group_ids: expected a torch.Tensor"),
    ({"group_size": None, "group_ids": R}, TypeError, "group_ids: expected int32 or int64, got "),
    (
        {"group_size": None, "group_ids": IDS[:5]},
        ValueError,
        "group_ids: expected shape [6] (rewards'), got [5]",
    ),
    (
        {"group_size": None, "group_ids": IDS.to("meta")},
        ValueError,
        "group_ids: expected device cpu (rewards'), got meta",
    ),
    ({"baseline": "median"}, ValueError, "baseline: expected one of mean, leave_one_out"),
    ({"baseline": "means"}, ValueError, "got 'means'; did you mean 'mean'?"),
    ({"baseline": None}, TypeError, "baseline: expected a str, got NoneType"),
    ({"baseline": ["mean"]}, TypeError, "baseline: expected a str, got list"),
    ({"scale": "var"}, ValueError, "scale: expected one of std, batch_std, mean, none, got 'var'"),
    ({"singleton": "keep"}, ValueError, "singleton: expected one of zero, raw, got 'keep'"),
    ({"batch": "token"}, ValueError, "batch: expected one of sequences, tokens, got 'token'"),
    ({"unbiased": 1}, TypeError, "unbiased: expected a bool, got 1"),
    ({"eps": -1e-4}, ValueError, "eps: expected a finite number of at least 0, got -0.0001"),
    ({"eps": float("inf")}, ValueError, "eps: expected a finite number of at least 0, got inf"),
    ({"eps": True}, TypeError, "eps: expected a number, got bool"),
    ({"eps": "1e-4"}, TypeError, "eps: expected a number, got str"),
    ({"scale": "none", "unbiased": False}, ValueError, "unbiased: expected its default with scale"),
    ({"scale": "mean", "unbiased": False}, ValueError, "which is no standard deviation, got False"),
    ({"scale": "none", "eps": 1e-6}, ValueError, "eps: expected its default with scale 'none'"),
    (
        TOKENS | {"scale": "none", "eps": 1e-6, "mask": MASK},
        ValueError,
        "eps: expected its default with scale 'none', got 1e-06",
    ),
    ({"lengths": IDS}, ValueError, "lengths: expected None, since baseline is 'mean'"),
    (
        {"baseline": "length_weighted"},
        ValueError,
        "lengths: expected a tensor, since baseline is 'length_weighted'",
    ),
    ({"baseline_rewards": R}, ValueError, "baseline_rewards: expected None, since baseline is 'm"),
    ({"baseline": "given"}, ValueError, "baseline_rewards: expected a tensor, since baseline is"),
    ({"reward_weights": [1.0]}, ValueError, "reward_weights: expected None, since rewards are [N]"),
    ({"mask": MASK}, ValueError, "mask: expected None, since only batch 'tokens'"),
    (
        {"mask": MASK, "batch": "tokens"},
        ValueError,
        "batch: expected its default with rewards [N], whose advantages are not normalised over "
        "the batch, got 'tokens'",
    ),
    ({"batch": "tokens"}, ValueError, "batch: expected its default with rewards [N]"),
    ({"rewards": ROWS, "mask": MASK}, ValueError, "mask: expected None, since only batch 'tokens'"),
    (
        {"baseline": "none", "scale": "none", "singleton": "raw"},
        ValueError,
        "singleton: expected its default with baseline 'none' and scale 'none', which take no "
        "statistic, got 'raw'",
    ),
    (
        {"baseline": "given", "baseline_rewards": R, "scale": "none", "singleton": "raw"},
        ValueError,
        "singleton: expected its default with baseline 'given' and scale 'none'",
    ),
    (TOKENS, ValueError, "mask: expected a tensor, since batch is 'tokens', got None"),
    (TOKENS | {"mask": MASK.tolist()}, TypeError, "mask: expected a torch.Tensor, got list"),
    (TOKENS | {"mask": MASK[:5]}, ValueError, "mask: expected shape [6, T], got [5, 3]"),
    (TOKENS | {"mask": MASK[:, 0]}, ValueError, "mask: expected shape [6, T], got [6]"),
    (TOKENS | {"mask": MASK.float()}, TypeError, "mask: expected bool or an integer type, got "),
    (TOKENS | {"mask": MASK.to("meta")}, ValueError, "mask: expected device cpu (rewards'), got"),
]

LENGTHS = [
    ([1] * 6, TypeError, "lengths: expected a torch.Tensor, got list"),
    (IDS[:3], ValueError, "lengths: expected shape [6], got [3]"),
    (IDS > 0, TypeError, "lengths: expected integers or floats, got torch.bool"),
    (IDS.to("meta"), ValueError, "lengths: expected device cpu (rewards'), got meta"),
    (needs_grad(R), ValueError, "lengths: expected a tensor that needs no gradient"),
    (IDS - 1, ValueError, "lengths: expected finite values of at least 0, got -1.0 at [0]"),
    (R + torch.inf, ValueError, "lengths: expected finite values of at least 0, got inf at [0]"),
    (R + torch.nan, ValueError, "lengths: expected finite values of at least 0, got nan at [0]"),
]
GIVEN = [
    (0.0, TypeError, "baseline_rewards: expected a torch.Tensor, got float"),
    (IDS, TypeError, "baseline_rewards: expected float32, bfloat16, float16 or float64, got"),
    (R[:3], ValueError, "baseline_rewards: expected shape [6] (rewards'), got [3]"),
    (R.to("meta"), ValueError, "baseline_rewards: expected device cpu (rewards'), got meta"),
    (needs_grad(R), ValueError, "baseline_rewards: expected a tensor that needs no gradient"),
    (R + torch.nan, ValueError, "baseline_rewards: expected finite values, got nan at [0]"),
    (R.double() + 1e39, ValueError, "baseline_rewards: expected finite values, got inf at [0]"),
]
WEIGHTS = [
    (1.0, TypeError, "reward_weights: expected a tensor or a sequence, got float"),
    ("11", TypeError, "reward_weights: expected a tensor or a sequence, got str"),
    ([1.0, "1"], TypeError, "reward_weights: expected a number, got str"),
    ([1.0], ValueError, "reward_weights: expected shape [2], got [1]"),
    (torch.ones(2).long(), TypeError, "reward_weights: expected a floating-point tensor, got"),
    (torch.ones(2, device="meta"), ValueError, "reward_weights: expected device cpu (rewards'),"),
    (needs_grad(torch.ones(2)), ValueError, "reward_weights: expected a tensor that needs no g"),
    (
        torch.tensor([1.0, torch.nan]),
        ValueError,
        "reward_weights: expected finite values, got nan at [1]",
    ),
    ([torch.inf, 1.0], ValueError, "reward_weights: expected a finite number, got inf"),
    ([1e39, 1.0], ValueError, "reward_weights: expected finite values, got inf at [0]"),
]
REFUSED += [({"baseline": "length_weighted", "lengths": x}, *rest) for x, *rest in LENGTHS]
REFUSED += [({"baseline": "given", "baseline_rewards": x}, *rest) for x, *rest in GIVEN]
REFUSED += [({"rewards": ROWS, "reward_weights": x}, *rest) for x, *rest in WEIGHTS]


@pytest.mark.parametrize(
    ("arguments", "error", "message"), REFUSED, ids=[str(r[-1])[:50] for r in REFUSED]
)
def test_refuses(arguments, error, message):
    given = {"rewards": R, "group_size": 3} | arguments
    # Options are remembered: the second call says the same.
    for _ in range(2):
        with pytest.raises(error, match=re.escape(message)):
            rlkern.group_advantages(
                given["rewards"], **{k: given[k] for k in given if k != "rewards"}
            )


def test_what_is_refused_of_one_type_is_not_remembered_of_another():
    ok = rlkern.group_advantages(R, group_size=3, unbiased=True, eps=0.0)
    assert ok.tolist() == [0] * 6
    with pytest.raises(TypeError, match="unbiased: expected a bool, got 1"):
        rlkern.group_advantages(R, group_size=3, unbiased=1, eps=0.0)
    with pytest.raises(TypeError, match="eps: expected a number, got bool"):
        rlkern.group_advantages(R, group_size=3, unbiased=True, eps=False)


def test_options_are_not_shared_between_calls(monkeypatch):
    """What an operator does to its list of options does not reach the next call."""
    seen = []

    def keep(op, backend, *arguments):
        seen.append(arguments[-1])
        return arguments[0][:, 0]

    monkeypatch.setattr(_backend, "choose", lambda *_: "native")
    monkeypatch.setattr(_register, "constant", keep)
    rlkern.group_advantages(R, group_size=3, eps=0.25)
    before = list(seen[0])
    seen[0].clear()
    rlkern.group_advantages(R, group_size=3, eps=0.25)
    assert seen[1] == before


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_a_given_baseline_may_be_anything_where_there_is_no_reward(backend):
    if _backend.why_not("group_advantages", backend, "cpu", torch.float32):
        pytest.skip(f"no {backend} kernels")
    rewards, given = torch.tensor([2.0, torch.nan]), torch.tensor([0.5, torch.nan])
    with rlkern.use_backend(backend):
        out = rlkern.group_advantages(
            rewards, group_size=2, baseline="given", baseline_rewards=given, scale="none"
        )
    assert out.tolist() == [1.5, 0]


def test_a_backend_that_cannot_serve():
    with (
        rlkern.use_backend("native"),
        pytest.raises(RuntimeError, match="backend 'native' was asked for, but cannot serve group"),
    ):
        rlkern.group_advantages(R.double(), group_size=3)

"""PolicyLoss against literal.py: loss, gradients and every metric, both layouts, every backend."""

from __future__ import annotations

import functools
import math
import random

import pytest
import torch
from batches import PER_TOKEN, assert_equal, call, call_packed, close, random_batch, used_by
from literal import literal

from rlkern import PolicyLoss
from rlkern.losses import PRESETS, RolloutCorrection

LAYOUTS = {"padded": call, "packed": call_packed}
OPTION_CASES = 150


def needed(loss, number=37.0):
    return {"normalizer": number} if loss.aggregation == "seq_mean_token_sum_norm" else {}


def as_double(batch):
    return {n: x.double() if x.is_floating_point() else x for n, x in batch.items()}


def check(loss, batch, backend, layout, message="", expected=None, **given):
    batch = used_by(loss, batch)
    expected = expected or literal(loss, as_double(batch), **given)
    called = LAYOUTS[layout](loss, batch, backend.dtype, **given)
    assert_equal(called, expected, backend.dtype, message=message)


# ---- presets --------------------------------------------------------------------------------


@functools.cache
def preset_case(preset, per_token):
    loss = PolicyLoss.preset(preset)
    batch = random_batch(6, 7, per_token=per_token, seed=len(preset))
    for name in ("token_weights", "rollout_logprobs"):
        del batch[name]
    batch = used_by(loss, batch)
    return loss, batch, literal(loss, as_double(batch), **needed(loss))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per_token", [False, True], ids=["A[B]", "A[B,T]"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_equals_its_formula(backend, preset, per_token, layout):
    loss, batch, expected = preset_case(preset, per_token)
    check(loss, batch, backend, layout, expected=expected, **needed(loss))


# ---- options --------------------------------------------------------------------------------


@functools.cache
def option_cases(surrogate):
    """Random combinations of what the surrogate allows, each with a batch and the literal result:
    (loss, batch, denominators, expected)."""
    rng = random.Random(surrogate)
    return [option_case(surrogate, rng, seed) for seed in range(OPTION_CASES // 6)]


def option_case(surrogate, rng, seed):
    options = {"surrogate": surrogate}
    if surrogate in ("clip", "cispo", "sapo"):
        options["ratio_level"] = rng.choice(["token", "sequence", "sequence_token", "sequence_sum"])
    if surrogate == "clip":
        options |= rng.choice([{}, {"clip_low": 0.1, "clip_high": 0.3}])
        options["dual_clip"] = rng.choice([None, 1.2, 3.0])
        options["ratio_cap"] = rng.choice([None, 1.1, 2.0])
    elif surrogate == "cispo":
        options |= rng.choice([{}, {"clip_low": 0.2, "clip_high": 0.3}, {"clip_high": 0.5}])
    elif surrogate == "gmpo":
        options |= rng.choice([{}, {"clip_low": 0.1, "clip_high": 0.2}])
    elif surrogate.startswith("dppo"):
        options |= {"clip_low": 0.03, "clip_high": 0.02, "ratio_cap": rng.choice([None, 1.1])}
    elif surrogate == "sapo":
        options |= rng.choice([{}, {"sapo_tau_pos": 2.0, "sapo_tau_neg": 0.5}])
    elif surrogate == "vespo":
        options |= rng.choice([{}, {"vespo_k_pos": 1.0, "vespo_lambda_neg": 1.5}])
    token_level = options.get("ratio_level", "token") == "token" and surrogate != "gmpo"
    options["log_ratio_clamp"] = rng.choice([None, 20.0] + [0.3] * token_level)
    estimator = rng.choice(["k1", "abs", "k2", "k3", "k1_st", "abs_st", "k3_st"])
    options |= {
        "kl_coef": rng.choice([0.0, 0.1, 1.0]),
        "kl_estimator": estimator,
        "kl_clamp": rng.choice([None, "openrlhf"] + ["verl"] * estimator.startswith("k3")),
        "kl_ratio_weighted": rng.random() < 0.3,
        "entropy_coef": rng.choice([0.0, 0.01, -0.3]),
        "off_policy_threshold": rng.choice([None, 0.05, -0.05]),
        "correction": rng.choice([None, correction(rng, surrogate)]),
    }
    if options["entropy_coef"]:
        options["entropy_aggregation"] = rng.choice(["token_mean", "same"])
    aggregations = ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum"]
    aggregations += ["seq_mean_token_sum_norm", "token_sum"]
    aggregation = "seq_mean_token_mean" if surrogate == "gmpo" else rng.choice(aggregations)
    options["aggregation"] = aggregation
    given = {}
    if aggregation == "seq_mean_token_sum_norm" or (
        aggregation == "token_mean" and rng.random() < 0.5
    ):
        given["normalizer"] = 12.5
    if aggregation.startswith("seq_mean"):
        if rng.random() < 0.5:
            options["skip_empty"] = True
        elif rng.random() < 0.5:
            given["num_sequences"] = 7.5
    if options["entropy_coef"] and options["entropy_aggregation"] == "token_mean":
        if rng.random() < 0.5:
            given["entropy_normalizer"] = 9.0
    loss = PolicyLoss(**options)
    # x beyond 20 and values beyond 10, so that the KL's bounds are met.
    batch = random_batch(4, 5, per_token=rng.random() < 0.5, seed=seed)
    if loss.kl_clamp and not loss.kl_ratio_weighted:
        batch["ref_logprobs"] = batch["ref_logprobs"] * torch.tensor([0.5, 1.0, 3.0, 20.0])[:, None]
    for name in (*PER_TOKEN, "mask", "entropy_mask"):
        required = {"ref_logprobs": loss.kl_coef, "entropy": loss.entropy_coef}
        required["rollout_logprobs"] = loss.correction
        if not required.get(name) and rng.random() < 0.15:
            del batch[name]
    batch = used_by(loss, batch)
    return loss, batch, given, literal(loss, as_double(batch), **given)


def correction(rng, surrogate):
    level = "token" if surrogate == "vespo" else rng.choice(["token", "sequence", "geometric"])
    low, high = rng.choice([(None, 1.5), (0.7, None), (0.8, 1.3)])
    mode = rng.choice(["truncate", "mask"])
    return RolloutCorrection(level=level, mode=mode, low=low, high=high)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "surrogate",
    ["clip", "cispo", "sapo", "gmpo", "vespo", "dppo_tv", "dppo_kl", "reinforce"],
)
def test_random_options_equal_their_formulas(backend, surrogate, layout):
    for loss, batch, given, expected in option_cases(surrogate):
        check(loss, batch, backend, layout, f"{loss} {given}: ", expected, **given)


def test_denominators_may_be_tensors(backend):
    batch = random_batch(seed=3)
    for aggregation in ("token_mean", "seq_mean_token_sum_norm"):
        loss = PolicyLoss(aggregation=aggregation, entropy_coef=0.1)
        numbers = {"normalizer": 5.0, "entropy_normalizer": 3.0}
        if aggregation != "token_mean":
            numbers["num_sequences"] = 2.5
        expected = literal(loss, as_double(used_by(loss, batch)), **numbers)
        tensors = {name: torch.tensor(x) for name, x in numbers.items()}
        assert_equal(call(loss, used_by(loss, batch), backend.dtype, **tensors), expected,
                     backend.dtype)  # fmt: skip


# ---- shapes ---------------------------------------------------------------------------------


SHAPES = {"one token": (1, 1), "T = 1": (5, 1), "B = 1": (1, 70), "long": (3, 150)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("preset", ["grpo", "gspo", "gmpo", "vespo", "rloo"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(backend, preset, shape, layout):
    loss = PolicyLoss.preset(preset, entropy_coef=0.1, kl_coef=0.1)
    # Sums over a sequence stay within what a ratio can hold.
    batch = random_batch(*shape, spread=0.4 if shape[1] < 50 else 0.05, empty=False)
    if shape == (1, 1):
        batch["mask"][:] = True
    check(loss, batch, backend, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (3, 0), (0, 0)], ids=str)
def test_nothing_counts(backend, preset, shape, layout):
    loss = PolicyLoss.preset(preset, entropy_coef=0.1, kl_coef=0.1)
    batch = random_batch(3, 4)
    batch = {n: x[: shape[0]] if x.dim() == 1 else x[: shape[0], : shape[1]]
             for n, x in batch.items()}  # fmt: skip
    batch["mask"] = torch.zeros(shape, dtype=torch.bool)
    check(loss, batch, backend, layout, **needed(loss))
    called = LAYOUTS[layout](loss, used_by(loss, batch), backend.dtype, **needed(loss))
    assert called.loss == 0 and not called.grad.any() and not called.entropy_grad.any()


# ---- places where a formula's form matters ----------------------------------------------------


def one_token(backend, loss, *, logp, old=None, A=1.0, **more):
    x = torch.tensor([[logp]], dtype=backend.dtype, requires_grad=True)
    given = {n: torch.tensor([[v]], dtype=backend.dtype) for n, v in more.items()}
    if old is not None:
        given["old_logprobs"] = torch.tensor([[old]], dtype=backend.dtype)
    loss(x, torch.tensor([A], dtype=backend.dtype), **given).loss.backward()
    return x.grad.item()


@pytest.mark.parametrize("A", [1.0, -1.0])
@pytest.mark.parametrize("preset", ["ppo", "gspo", "gspo_token", "rloo"])
def test_on_policy_the_gradient_is_the_plain_policy_gradient(backend, preset, A):
    for more in ({"old": -1.0}, {}):
        assert one_token(backend, PolicyLoss.preset(preset), logp=-1.0, A=A, **more) == -A


@pytest.mark.parametrize("A", [1.0, -1.0])
def test_at_a_clip_bound_the_gradient_is_full(backend, A):
    # exp(0) = 1 is the bound itself where the range is empty on that side.
    loss = PolicyLoss(clip_low=0.0, clip_high=0.0)
    assert one_token(backend, loss, logp=-1.0, old=-1.0, A=A) == -A


@pytest.mark.parametrize("x", [1e-9, -1e-9, 1e-4, 0.3])
def test_k3_is_exact_near_zero(backend, x):
    logp = torch.zeros(1, 1, dtype=backend.dtype, requires_grad=True)
    ref = torch.full((1, 1), x, dtype=backend.dtype)
    loss = PolicyLoss(surrogate="reinforce", kl_coef=1.0)
    out = loss(logp, torch.zeros(1, dtype=backend.dtype), ref_logprobs=ref)
    out.loss.backward()
    exact = ref.double()
    close(logp.grad, -torch.expm1(exact), 1e-6)
    if abs(x) >= 1e-4:
        # The value is of the size of expm1 - x, whose terms are x: 5.0e-9 at 1e-4, and not 0.
        assert out.loss.item() == pytest.approx(float(torch.expm1(exact) - exact), rel=2e-3)


@pytest.mark.parametrize(("A", "expected"), [(1.0, 0.0), (-1.0, 1.15)])
def test_a_cap_inside_the_clip_range_stops_only_the_capped_branch(backend, A, expected):
    """1.1 < r = 1.15 < 1.2: with A > 0 the capped branch is the smaller and constant; with A < 0
    the clipped one is, whose bounds are not reached."""
    old = -1.0
    logp = old + math.log(1.15)
    grad = one_token(backend, PolicyLoss(ratio_cap=1.1), logp=logp, old=old, A=A)
    assert grad == pytest.approx(expected, rel=1e-6)

"""gae, discounted_returns and vtrace against a literal reading of their formulas."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from literal_scan import literal
from scan_batches import (
    FUNCTIONS,
    PACKED_LENGTHS,
    assert_near,
    call,
    cast,
    expected,
    random_batch,
)
from serving import Served

import rlkern
from rlkern import _backend

functions = pytest.mark.parametrize("function", FUNCTIONS)
modes = pytest.mark.parametrize("mask_mode", ["carry", "break"])
layouts = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])


def check(backend, function, batch, steps, poisoned=lambda *sizes: None, lam=0.95, **options):
    if function != "discounted_returns":
        options["lam"] = lam
    truth, scales = expected(function, batch, **options)
    # Four times the outputs' size: whatever block they get has been NaN.
    poisoned(4 * batch["rewards"].numel())
    assert_near(backend, call(function, batch, backend.dtype, **options), truth, scales, steps)


# ---- against the literal reading --------------------------------------------------------------


@functions
@modes
@layouts
@pytest.mark.parametrize("given", ["mask, dones", "mask", "dones", "nothing"])
def test_equals_its_formula(scan_backend, poisoned, function, mask_mode, packed, given):
    batch = random_batch(packed, mask="mask" in given, dones="dones" in given)
    for name in batch:
        if name != "cu_seqlens" and batch[name].is_floating_point():
            # Exact in every type, so that all backends get the same numbers.
            batch[name] = (batch[name] * 64).round() / 64
    check(
        scan_backend, function, batch, 70, poisoned, gamma=0.96875, lam=0.9375, mask_mode=mask_mode
    )
    del batch["bootstrap_value"]
    check(scan_backend, function, batch, 70, gamma=0.96875, lam=0.9375, mask_mode=mask_mode)


@pytest.mark.parametrize("function", ["gae", "vtrace"])
@layouts
def test_lam_per_sequence(scan_backend, function, packed):
    batch = random_batch(packed)
    count = batch["bootstrap_value"].shape[0]
    lam = torch.linspace(0, 1, count)
    check(scan_backend, function, batch, 70, gamma=0.9, lam=lam, mask_mode="break")


@functions
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.0, 0.5), (0.5, 0.0), (1, 1)])
def test_ends_of_the_ranges(scan_backend, function, gamma, lam):
    check(scan_backend, function, random_batch(False), 50, gamma=gamma, lam=lam)


@functions
@modes
@pytest.mark.parametrize("T", [0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 33])
def test_every_short_length(scan_backend, function, mask_mode, T):
    check(scan_backend, function, random_batch(False, T=T), T, gamma=0.9, mask_mode=mask_mode)


@functions
def test_no_sequences(scan_backend, function):
    batch = {name: torch.zeros(0, 5) for name in ("rewards", "values", "log_ratios")}
    assert all(x.shape == (0, 5) for x in call(function, batch, scan_backend.dtype))
    batch = {name: torch.zeros(0) for name in ("rewards", "values", "log_ratios")}
    for ends in ([0], [0, 0, 0]):
        batch["cu_seqlens"] = torch.tensor(ends)
        assert all(x.shape == (0,) for x in call(function, batch, scan_backend.dtype))


@modes
def test_extreme_ratios(scan_backend, mask_mode):
    """Also those whose products over a vector would overflow; the bars bound them all."""
    batch = random_batch(False)
    extremes = torch.tensor([0.0, 79, 81, -79, -81, 700, -700, 1000, -1000, torch.inf, -torch.inf])
    batch["log_ratios"][:2] = 79 * (torch.rand(2, 45) * 2 - 1)
    batch["log_ratios"][2:] = extremes[torch.randint(11, (5, 45))]
    check(scan_backend, "vtrace", batch, 50, gamma=0.9, mask_mode=mask_mode)


def test_ratios_without_bars(scan_backend):
    batch = random_batch(False)
    given = cast(batch, scan_backend.dtype)
    found = rlkern.vtrace(**given, gamma=0.9, lam=0.8, rho_bar=None, c_bar=None, rho_pg_bar=None)
    bars = (float("inf"),) * 3
    exact = literal(cast(batch, torch.float64), gamma=0.9, lam=0.8, bars=bars)
    assert_near(scan_backend, found, exact[:2], exact[2:], 45)


# ---- the two conventions for masked tokens ----------------------------------------------------

# One sequence with a hole, every number exact in binary.
HOLE = {
    "rewards": torch.tensor([[1.0, 2.0, 64.0, 64.0, 3.0, 4.0]]),
    "values": torch.tensor([[0.5, 1.0, 32.0, 32.0, 1.5, 2.0]]),
    "mask": torch.tensor([[1, 1, 0, 0, 1, 1]]),
    "bootstrap_value": torch.tensor([8.0]),
}
# gamma = lam = 1/2. Last token: delta = 4 + 4 - 2 = 6, A = 6. Before it: 3 + 1 - 1.5 = 2.5,
# A = 2.5 + 6 / 4 = 4. Carry: 2 + 0.75 - 1 = 1.75, A = 1.75 + 4 / 4 = 2.75; 1 + 0.5 - 0.5 = 1,
# A = 1 + 2.75 / 4 = 1.6875. Break: the hole's last token has delta = 0 + 0.75 - 0, A = 0.75 + 4 / 4
# = 1.75, its first A = 1.75 / 4 = 0.4375; then 2 + 0 - 1 = 1, A = 1 + 0.4375 / 4 = 1.109375;
# 1 + 0.5 - 0.5 = 1, A = 1 + 1.109375 / 4 = 1.27734375.
HOLE_ADVANTAGES = {
    "carry": [1.6875, 2.75, 0, 0, 4.0, 6.0],
    "break": [1.27734375, 1.109375, 0, 0, 4.0, 6.0],
}
# R: 4 + 4 = 8; 3 + 4 = 7; carry: 2 + 3.5 = 5.5; 1 + 2.75 = 3.75; break: 7 is halved twice more,
# 2 + 7 / 8 = 2.875; 1 + 1.4375 = 2.4375.
HOLE_RETURNS = {"carry": [3.75, 5.5, 0, 0, 7, 8], "break": [2.4375, 2.875, 0, 0, 7, 8]}


@modes
def test_a_hole_by_hand(scan_backend, mask_mode):
    options = {"gamma": 0.5, "mask_mode": mask_mode}
    advantages, returns = call("gae", HOLE, scan_backend.dtype, lam=0.5, **options)
    truth = torch.tensor([HOLE_ADVANTAGES[mask_mode]], dtype=scan_backend.dtype)
    assert torch.equal(advantages, truth)
    assert torch.equal(returns, truth + HOLE["values"].to(scan_backend.dtype) * HOLE["mask"])
    (sums,) = call("discounted_returns", HOLE, scan_backend.dtype, **options)
    assert torch.equal(sums, torch.tensor([HOLE_RETURNS[mask_mode]], dtype=scan_backend.dtype))


def verl_gae(rewards, values, mask, gamma, lam):
    """As verl's loop goes: a masked step keeps the two numbers that the loop carries."""
    next_value = last = torch.zeros(rewards.shape[0], dtype=rewards.dtype)
    reversed_advantages = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        candidate = delta + gamma * lam * last
        next_value = values[:, t] * mask[:, t] + (1 - mask[:, t]) * next_value
        last = candidate * mask[:, t] + (1 - mask[:, t]) * last
        reversed_advantages.append(last)
    advantages = torch.stack(reversed_advantages[::-1], 1)
    return advantages * mask, (advantages + values) * mask


def openrlhf_gae(rewards, values, mask, gamma, lam):
    """As OpenRLHF's loop goes: what is masked is set to 0, and the loop does not look again."""
    rewards, values = rewards * mask, values * mask
    last = torch.zeros(rewards.shape[0], dtype=rewards.dtype)
    reversed_advantages = []
    for t in reversed(range(rewards.shape[1])):
        following = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        last = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * last
        reversed_advantages.append(last)
    advantages = torch.stack(reversed_advantages[::-1], 1)
    return advantages * mask, (advantages + values) * mask


@pytest.mark.parametrize(
    ("mask_mode", "loop"), [("carry", verl_gae), ("break", openrlhf_gae)], ids=["verl", "openrlhf"]
)
def test_the_frameworks_loops(scan_backend, mask_mode, loop):
    batch = random_batch(False, dones=False)
    del batch["bootstrap_value"]
    mask = batch["mask"].double()
    truth = loop(batch["rewards"].double(), batch["values"].double(), mask, 0.97, 0.9)
    _, scales = expected("gae", batch, gamma=0.97, lam=0.9, mask_mode=mask_mode)
    found = call("gae", batch, scan_backend.dtype, gamma=0.97, lam=0.9, mask_mode=mask_mode)
    assert_near(scan_backend, found, truth, scales, 45)


# ---- long sequences ---------------------------------------------------------------------------


@functions
@pytest.mark.parametrize("steps", [1 << 16, 1 << 20], ids=["64K", "1M"])
def test_long_sequences(scan_backend, function, steps):
    if scan_backend.name != "native" and (steps > 1 << 16 or scan_backend.name == "triton"):
        pytest.skip("a loop of PyTorch's, or Triton's interpreter, takes minutes")
    batch = {name: torch.randn(1, steps) for name in ("rewards", "values")}
    batch["log_ratios"] = 0.1 * torch.randn(1, steps)
    batch["bootstrap_value"] = torch.ones(1)
    check(scan_backend, function, batch, steps, gamma=0.99999, lam=0.99999)


@pytest.mark.parametrize("function", ["gae", "discounted_returns"])
def test_a_reward_reaches_ten_thousand_tokens_back(scan_backend, function):
    """In fp32 gamma^10000 is 1.6e-4 of itself off, half of it gamma's own rounding."""
    steps = 10_000
    batch = {name: torch.zeros(1, steps) for name in ("rewards", "values")}
    batch["rewards"][0, -1] = 1.0
    # Triton gets gamma in two floats, 2^-48 of itself off: 32 roundings a step beside the 10.
    check(scan_backend, function, batch, 5 * steps, gamma=0.9999, lam=1.0)

    bootstrap = torch.zeros(1, dtype=scan_backend.dtype, requires_grad=True)
    out = call(function, batch | {"bootstrap_value": bootstrap}, scan_backend.dtype, gamma=0.9999,
               **({"lam": 1.0} if function == "gae" else {}))  # fmt: skip
    (slope,) = torch.autograd.grad(out[0][0, 0], bootstrap)
    unit = 2.0**-24 if scan_backend.dtype == torch.float32 else 0.0
    assert slope.item() == pytest.approx(0.9999**steps, rel=unit + 50 * steps * 2.0**-53, abs=0)


# ---- random shapes ----------------------------------------------------------------------------


@st.composite
def batches(draw):
    packed = draw(st.booleans())
    lengths = draw(st.lists(st.integers(0, 40), min_size=1, max_size=6))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    batch = {"bootstrap_value": torch.randn(len(lengths))}
    shape = (sum(lengths),) if packed else (len(lengths), max(lengths))
    for name in ("rewards", "values", "log_ratios"):
        batch[name] = torch.randn(shape)
    if packed:
        batch["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
    if draw(st.booleans()):
        batch["mask"] = torch.rand(shape) < draw(st.sampled_from([0.2, 0.8, 0.98]))
    if draw(st.booleans()):
        batch["dones"] = torch.rand(shape) < draw(st.sampled_from([0.02, 0.5]))
    ratios = st.floats(0, 1, width=32)
    lam = draw(ratios) if draw(st.booleans()) else torch.rand(len(lengths))
    return batch, {
        "gamma": draw(ratios), "lam": lam, "mask_mode": draw(st.sampled_from(["carry", "break"]))
    }  # fmt: skip


@functions
@pytest.mark.skipif(
    _backend.why_not("return_scan", "native", "cpu", torch.float32) != "", reason="not built"
)
def test_random_batches(function):
    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(batches())
    def holds(drawn):
        batch, options = drawn
        with rlkern.use_backend("native"):
            check(Served("native", torch.float32), function, batch, 40, **options)

    holds()


assert max(PACKED_LENGTHS) <= 70  # the steps of test_equals_its_formula

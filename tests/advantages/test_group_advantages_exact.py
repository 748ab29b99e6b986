"""What holds exactly, the trainers' conventions, sizes, dtypes and torch's own checks."""

from __future__ import annotations

import math

import pytest
import torch

import rlkern
from rlkern import _backend
from rlkern.reference.group_advantages import BASELINES, SCALES

NAN = math.nan
ULP = 2**-24


def needed(baseline, rewards):
    if baseline == "length_weighted":
        return {"lengths": torch.arange(len(rewards)) % 5}
    return {"baseline_rewards": rewards * 0.5} if baseline == "given" else {}


def make(values, backend):
    return torch.tensor(values, dtype=backend.dtype)


# ---- exactly ------------------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", [b for b in BASELINES if b != "none"])
def test_equal_rewards_give_exactly_0(group_backend, baseline):
    # 0.1 has no finite binary form, and 1 / 3 is no mean of floats.
    for value in (0.1, 1 / 3, -7.3e5, 1e30):
        for size in (2, 3, 7, 100):
            rewards = torch.full((3 * size,), value, dtype=group_backend.dtype)
            more = needed(baseline, rewards)
            for scale in ("std", "batch_std"):
                out = rlkern.group_advantages(
                    rewards, group_size=size, baseline=baseline, scale=scale, eps=0.0, **more
                )
                assert torch.equal(out, torch.zeros_like(out))
            if baseline != "given":
                ids = torch.arange(3 * size) % 3
                out = rlkern.group_advantages(
                    rewards, group_ids=ids, baseline=baseline, scale="none", **more
                )
                assert torch.equal(out, torch.zeros_like(out))


def test_equal_rewards_give_exactly_0_in_many_parts(group_backend):
    """Groups that reach over the whole batch, whose parts the kernels sum up on their own."""
    rows = 2000 if group_backend.name == "triton" else 150_000
    ids = torch.randint(40, (rows,))
    rewards = ((torch.arange(40) + 1) * 0.1).to(group_backend.dtype)[ids]
    out = rlkern.group_advantages(rewards, group_ids=ids, eps=0.0)
    assert torch.equal(out, torch.zeros_like(out))
    rewards = torch.full_like(rewards, 0.1)
    for baseline in ("batch_mean", "leave_one_out"):
        out = rlkern.group_advantages(
            rewards, group_ids=ids, baseline=baseline, scale="batch_std", eps=0.0
        )
        assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("offset", [0.0, 1e6, -1e6, 2.0**23])
def test_a_large_mean_costs_nothing(group_backend, offset):
    rewards = make([offset, offset + 1, offset + 1, offset], group_backend)
    out = rlkern.group_advantages(rewards, group_size=2, eps=0.0)
    half = 0.5**0.5
    expected = torch.tensor([-half, half, half, -half], dtype=group_backend.dtype)
    torch.testing.assert_close(out, expected, rtol=2 * ULP, atol=0)
    shuffled = rlkern.group_advantages(rewards, group_ids=torch.tensor([4, 4, 0, 0]), eps=0.0)
    assert torch.equal(out, shuffled)


def test_nan_is_left_out_and_gets_0(group_backend):
    rewards = make([1.0, NAN, 3.0, NAN, NAN, NAN, 2.0, 2.5, NAN], group_backend)
    for how in ({"group_size": 3}, {"group_ids": torch.tensor([1, 1, 1, 0, 0, 0, 2, 2, 2])}):
        for scale in SCALES:
            out = rlkern.group_advantages(rewards, **how, scale=scale)
            alone = rlkern.group_advantages(rewards[[0, 2, 6, 7]], group_size=2, scale=scale)
            assert torch.equal(out[[0, 2, 6, 7]], alone)
            assert torch.equal(out[[1, 3, 4, 5, 8]], torch.zeros(5, dtype=out.dtype))


def test_a_single_reward(group_backend):
    rewards = make([3.0, NAN, NAN, -2.0], group_backend)
    ids = torch.tensor([0, 0, 1, 2])
    zero = rlkern.group_advantages(rewards, group_ids=ids)
    assert zero.tolist() == [0, 0, 0, 0]
    # verl keeps it: mean 0, deviation 1.
    raw = rlkern.group_advantages(rewards, group_ids=ids, singleton="raw", eps=1e-6)
    expected = make([3 / (1 + 1e-6), 0, 0, -2 / (1 + 1e-6)], group_backend)
    torch.testing.assert_close(raw, expected, rtol=ULP, atol=0)
    kept = rlkern.group_advantages(rewards, group_ids=ids, singleton="raw", scale="none")
    assert kept.tolist() == [3, 0, 0, -2]


# ---- as trainers and papers have it --------------------------------------------------------------


def test_grpo_of_verl_and_openrlhf(group_backend):
    """Mean 0.5 and unbiased deviation sqrt(1 / 3) of 0, 1, 1, 0."""
    rewards = make([0, 1, 1, 0, 5], group_backend)
    ids = torch.tensor([7, 7, 7, 7, 8])
    for eps in (1e-6, 1e-9):
        for singleton, last in (("raw", 5 / (1 + eps)), ("zero", 0.0)):
            out = rlkern.group_advantages(rewards, group_ids=ids, eps=eps, singleton=singleton)
            a = 0.5 / (math.sqrt(1 / 3) + eps)
            expected = make([-a, a, a, -a, last], group_backend)
            torch.testing.assert_close(out, expected, rtol=2 * ULP, atol=0)


def test_dr_grpo_rloo_opo_remax_maxrl(group_backend):
    rewards = make([1, 0, 0, 3], group_backend)

    def of(**options):
        return rlkern.group_advantages(rewards, group_size=4, **options).tolist()

    assert of(scale="none") == [0, -1, -1, 2]
    # The others' means: 1, 4/3, 4/3, 1/3.
    expected = [0, -4 / 3, -4 / 3, 8 / 3]
    assert of(baseline="leave_one_out", scale="none") == pytest.approx(expected, rel=1e-7)
    # (1 * 2 + 3 * 1) / 10
    lengths = torch.tensor([2, 3, 4, 1])
    opo = of(baseline="length_weighted", lengths=lengths, scale="none")
    assert opo == pytest.approx([0.5, -0.5, -0.5, 2.5], rel=1e-7)
    none = of(baseline="length_weighted", lengths=lengths * 0, scale="none")
    assert none == [0, -1, -1, 2]
    greedy = torch.full_like(rewards, 1.5)
    remax = of(baseline="given", baseline_rewards=greedy, scale="none")
    assert remax == [-0.5, -1.5, -1.5, 1.5]
    maxrl = of(scale="mean", eps=0.0)
    assert maxrl == [0, -1, -1, 2]
    for worthless in (-rewards, rewards * 0):
        out = rlkern.group_advantages(worthless, group_size=4, scale="mean")
        assert out.tolist() == [0, 0, 0, 0]


def test_pass_at_k(group_backend):
    values = [0.5, 2.0, 1.0, 2.0, 0.0, 1.0, 0.25, NAN]
    rewards = make(values, group_backend)
    ids = torch.tensor([3, 3, 3, 9, 9, 9, 9, 3])
    out = rlkern.group_advantages(rewards, group_ids=ids, baseline="pass_at_k", scale="none")
    assert out.tolist() == [0, 1, 0, 1, 0, 0, 0, 0]
    # Of two best ones neither leads, whichever stands first.
    twins = make([1, 4, 4, 0], group_backend)
    out = rlkern.group_advantages(twins, group_size=4, baseline="pass_at_k", scale="none")
    assert out.tolist() == [0, 0, 0, 0]


# ---- groups and batches --------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", BASELINES)
def test_order_neighbours_and_numbers_of_groups_do_not_matter(group_backend, baseline):
    generator = torch.Generator().manual_seed(2)
    sizes = torch.tensor([1, 2, 4, 8, 16, 32, 64, 4, 1])
    ids = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    # Sums of eighths over powers of two are exact in any order.
    rewards = torch.randint(-40, 40, (len(ids),), generator=generator).to(group_backend.dtype) / 8
    more = needed(baseline, rewards)
    if baseline == "length_weighted":
        more = {"lengths": torch.full((len(ids),), 4)}
    out = rlkern.group_advantages(rewards, group_ids=ids, baseline=baseline, **more)
    order = torch.randperm(len(ids), generator=generator)
    if baseline != "pass_at_k":  # which one of two best ones is first may change
        moved = {k: v[order] for k, v in more.items()}
        shuffled = rlkern.group_advantages(
            rewards[order], group_ids=ids[order], baseline=baseline, **moved
        )
        assert torch.equal(shuffled, out[order])
    for names in (ids * 3 - 5, -ids, ids * (1 << 59) - (1 << 62), ids.int()):
        renamed = rlkern.group_advantages(rewards, group_ids=names, baseline=baseline, **more)
        assert torch.equal(renamed, out)
    if baseline != "batch_mean":
        other = rewards.clone()
        other[ids != 5] = other[ids != 5] * 9 - 1000
        given = {"baseline_rewards": more["baseline_rewards"]} if baseline == "given" else more
        changed = rlkern.group_advantages(other, group_ids=ids, baseline=baseline, **given)
        assert torch.equal(changed[ids == 5], out[ids == 5])


@pytest.mark.parametrize("kind", ["equal", "sorted", "shuffled", "far apart"])
def test_repeats_on_any_number_of_threads(group_backend, kind):
    generator = torch.Generator().manual_seed(3)
    rows = 96 if group_backend.name == "triton" else 100_000
    rewards = torch.randn(rows, generator=generator).to(group_backend.dtype)
    ids = torch.randint(rows // 6, (rows,), generator=generator)
    if kind == "sorted":
        ids = ids.sort().values
    elif kind == "far apart":
        ids = ids * 0x9E3779B97F4A7C15 % (1 << 62)
    how = {"group_size": 8} if kind == "equal" else {"group_ids": ids}
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(
                [
                    rlkern.group_advantages(rewards, **how),
                    rlkern.group_advantages(rewards, **how, baseline="pass_at_k", scale="none"),
                    rlkern.group_advantages(rewards, **how, scale="batch_std"),
                    rlkern.group_advantages(rewards.view(-1, 1).expand(-1, 2), **how),
                ]
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("rows", [0, 1])
def test_no_reward_and_one(group_backend, rows):
    rewards = torch.full((rows,), 2.5, dtype=group_backend.dtype)
    ids = torch.zeros(rows, dtype=torch.int64)
    for baseline in BASELINES:
        more = needed(baseline, rewards)
        for scale in SCALES:
            for how in ({"group_size": 1}, {"group_ids": ids}):
                out = rlkern.group_advantages(
                    rewards, **how, baseline=baseline, scale=scale, **more
                )
                assert out.shape == (rows,) and out.dtype == group_backend.dtype
                if baseline not in ("given", "none") or scale != "none":
                    assert out.tolist() == [0] * rows
    assert rlkern.group_advantages(rewards[:, None], group_size=1).tolist() == [0] * rows


def native():
    return not _backend.why_not("group_advantages", "native", "cpu", torch.float32)


@pytest.mark.skipif(not native(), reason="no native kernels")
@pytest.mark.parametrize("kind", ["one group", "a group each", "colliding", "far apart", "equal"])
def test_a_million_rewards(kind):
    rows = 1 << 20
    rewards = torch.randn(rows) + 1e3
    ids = {
        "one group": torch.zeros(rows, dtype=torch.int64),
        "a group each": torch.randperm(rows),
        # Multiples of a power of two are what a weak hash lets fall together.
        "colliding": torch.randint(rows // 8, (rows,)) << 43,
        "far apart": torch.randint(-(2**63), 2**63 - 1, (rows // 8,))[
            torch.randint(rows // 8, (rows,))
        ],
        "equal": None,
    }[kind]
    how = {"group_size": 8} if ids is None else {"group_ids": ids}
    with rlkern.use_backend("native"):
        out = rlkern.group_advantages(rewards, **how)
    with rlkern.use_backend("eager"):
        exact = rlkern.group_advantages(rewards.double(), **how)
    # Squares about a member of the group, up to 5 deviations from the mean: 1e6 sums of 25 in
    # double are good to 1e-10, far below the result's rounding.
    torch.testing.assert_close(out.double(), exact, rtol=1.1 * ULP, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_rewards_are_widened(group_backend, dtype):
    if group_backend.dtype == torch.float64:
        pytest.skip("narrow rewards compute as float32")
    rewards, given = torch.randn(24).to(dtype), torch.randn(24).to(dtype)
    options = {"group_size": 4, "baseline": "given"}
    out = rlkern.group_advantages(rewards, **options, baseline_rewards=given)
    wide = rlkern.group_advantages(rewards.float(), **options, baseline_rewards=given.float())
    assert out.dtype == torch.float32 and torch.equal(out, wide)


def test_strides(group_backend):
    dtype = group_backend.dtype
    rewards, ids = torch.randn(24, 6).to(dtype), torch.randint(5, (24, 3))
    strided = rlkern.group_advantages(rewards[::2, 1], group_ids=ids[::2, 2])
    packed = rlkern.group_advantages(rewards[::2, 1].clone(), group_ids=ids[::2, 2].clone())
    assert torch.equal(strided, packed)
    assert torch.equal(
        rlkern.group_advantages(rewards[:, ::2], group_size=3),
        rlkern.group_advantages(rewards[:, ::2].clone(), group_size=3),
    )


# ---- torch ---------------------------------------------------------------------------------------


@pytest.mark.skipif(not native(), reason="no native kernels")
def test_opcheck():
    numbers = [0.0, 0.0, 1.0, 1e-4, 0.0, 0.0, 0.0]
    ids = torch.tensor([4, 4, 1, 1, 4, 1])
    op = torch.ops.rlkern.group_advantages.default
    torch.library.opcheck(op, (torch.randn(6, 1), 0, ids, None, None, None, numbers))
    joined = [6.0, 3.0, 1.0, 1e-4, 0.0, 1.0, 1.0]
    weights = torch.tensor([1.0, 2.0])
    torch.library.opcheck(op, (torch.randn(6, 2), 3, None, None, None, weights, joined))


@pytest.mark.skipif(not native(), reason="no native kernels")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({0: torch.randn(6)}, r"rewards: expected \[N, K\]"),
        ({0: torch.randn(6, 2)}, "rewards: expected one column, got 2"),
        ({0: torch.randn(6, 1).double()}, "rewards: expected a contiguous tensor of 6 values"),
        ({1: 2}, "group_size: expected a number that divides the 6 rewards, got 2"),
        ({1: 4, 2: None}, "group_size: expected a number that divides the 6 rewards, got 4"),
        ({2: None}, "group_size: expected a number that divides the 6 rewards, got 0"),
        ({2: torch.zeros(5, dtype=torch.int64)}, "group_ids: expected a contiguous tensor of 6"),
        ({3: torch.zeros(6)}, "lengths: expected with the length-weighted baseline alone"),
        ({4: torch.zeros(6, 1)}, "given: expected with the given baseline alone"),
        ({5: torch.zeros(2)}, "weights: expected a contiguous tensor of 1 values"),
        ({6: [0.0] * 6}, "options: expected 7 numbers, got 6"),
        ({6: [9.0] + [0.0] * 6}, "options: unknown number 9 at place 0"),
    ],
)
def test_the_operator_checks_its_tensors(changed, message):
    arguments = [
        torch.randn(6, 1), 0, torch.zeros(6, dtype=torch.int64), None, None, None, [0.0] * 7
    ]  # fmt: skip
    for place, value in changed.items():
        arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.rlkern.group_advantages(*arguments)


def test_compiles(group_backend):
    dtype = group_backend.dtype
    ids = torch.tensor([4, 4, 1, 1, 4, 1, 2, 2])

    def run(rewards):
        one = rlkern.group_advantages(rewards[:, 0], group_ids=ids, eps=1e-6, singleton="raw")
        return one + rlkern.group_advantages(rewards, group_size=4, reward_weights=[1.0, 0.5])

    rewards = torch.randn(8, 2).to(dtype)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(rewards), run(rewards))


def test_no_derivative(group_backend):
    rewards = torch.randn(8, dtype=group_backend.dtype, requires_grad=True)
    with pytest.raises(ValueError, match="rewards: expected a tensor that needs no gradient"):
        rlkern.group_advantages(rewards, group_size=4)
    with pytest.raises(RuntimeError, match="rewards: expected a tensor without a forward-mode"):
        torch.func.jvp(
            lambda r: rlkern.group_advantages(r, group_size=4),
            (rewards.detach(),),
            (rewards.detach(),),
        )
    with torch.no_grad():
        out = rlkern.group_advantages(rewards, group_size=4)
    assert torch.equal(out, rlkern.group_advantages(rewards.detach(), group_size=4))
    if native():
        direct = torch.ops.rlkern.group_advantages(
            rewards.float()[:, None], 4, None, None, None, None, [0, 0, 1, 1e-4, 0, 0, 0]
        )
        with pytest.raises(RuntimeError, match="group_advantages cannot be differentiated"):
            direct.sum().backward()

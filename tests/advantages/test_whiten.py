"""whiten against its formula written out, the trainers' own lines, and what it refuses."""

from __future__ import annotations

import itertools
import re

import literal_groups as literal
import pytest
import torch
import torch.multiprocessing as mp
from whiten_of_parts import OPTIONS, joined, process

import rlkern
from rlkern import _backend

# Moments and arithmetic in double, one rounding to float; what cancels is at most 10 deviations.
RTOL = {torch.float32: 1.01 * 2**-24, torch.float64: 1e-12}
ATOL = 1e-12

SHAPES = [(1, 2), (7,), (5, 13), (3, 1, 40), (2, 301)]


def batch(shape, dtype):
    generator = torch.Generator().manual_seed(len(shape) + shape[-1])
    x = (torch.randn(shape, generator=generator) * 2 + 0.5).to(dtype)
    mask = torch.rand(shape, generator=generator) < 0.7
    mask.view(-1)[:2] = True
    return x, mask


def close(actual, expected):
    torch.testing.assert_close(
        actual.double(),
        torch.tensor(expected, dtype=torch.float64).view(actual.shape),
        rtol=RTOL[actual.dtype],
        atol=ATOL,
    )


@pytest.mark.parametrize("eps_mode", ["add", "clamp"])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_its_formula(whiten_backend, poisoned, masked, unbiased, eps_mode):
    for shape, shift_mean, eps in itertools.product(SHAPES, (True, False), (1e-8, 0.0, 9.0)):
        x, mask = batch(shape, whiten_backend.dtype)
        counts = mask if masked else torch.ones_like(mask)
        options = {"shift_mean": shift_mean, "unbiased": unbiased, "eps": eps}
        options["eps_mode"] = eps_mode
        expected = literal.whitened(x.flatten().tolist(), counts.flatten().tolist(), **options)
        # Masked values may be anything.
        held = x.where(counts, torch.where(x > 0, torch.nan, torch.inf))
        poisoned(x.numel() * 4)
        out = rlkern.whiten(held, mask.long() * 3 if masked else None, **options)
        assert out.dtype == whiten_backend.dtype
        close(out, expected)
        again = rlkern.whiten(held, mask if masked else None, **options)
        assert torch.equal(out, again)


@pytest.mark.parametrize("masked", [False, True])
def test_shifts_alone(whiten_backend, masked):
    x, mask = batch((5, 13), whiten_backend.dtype)
    counts = mask if masked else torch.ones_like(mask)
    out = rlkern.whiten(x, mask if masked else None, scale=False)
    close(out, literal.whitened(x.flatten().tolist(), counts.flatten().tolist(), scale=False))


def verl_masked_whiten(values, mask, shift_mean):
    """As verl's torch_functional writes it."""
    count = mask.sum()
    mean = (values * mask).sum() / count
    variance = ((values - mean) ** 2 * mask).sum() / count * (count / (count - 1))
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean) * mask


def openrlhf_normalization(values, mask):
    """As OpenRLHF's experience maker writes it: biased, clamped."""
    count = mask.sum()
    mean = (values * mask).sum() / count
    variance = ((values - mean).pow(2) * mask).sum() / count
    return (values - mean) * variance.clamp(min=1e-8).rsqrt() * mask


@pytest.mark.parametrize("spread", [2.0, 1e-5])
def test_as_trainers_have_it(whiten_backend, spread):
    x, mask = batch((5, 13), whiten_backend.dtype)
    x = x * spread
    # A difference of two values near 1 e-5 is a double's all the same: 1e-11 of the largest.
    bound = {"rtol": max(RTOL[x.dtype], 1e-11), "atol": 1e-10}
    wide, counts = x.double(), mask.double()
    for shift_mean in (True, False):
        out = rlkern.whiten(x, mask, shift_mean=shift_mean)
        expected = verl_masked_whiten(wide, counts, shift_mean)
        torch.testing.assert_close(out.double(), expected, **bound)
    out = rlkern.whiten(x, mask, unbiased=False, eps_mode="clamp")
    torch.testing.assert_close(out.double(), openrlhf_normalization(wide, counts), **bound)


def test_a_large_mean_costs_nothing(whiten_backend):
    """Values a sixteenth apart around 1e6, which float32 holds exactly."""
    rows = 2000 if whiten_backend.name == "triton" else 100_000
    steps = torch.randint(-40, 41, (rows,)) / 16
    near, far = steps.to(whiten_backend.dtype), (steps.double() + 1e6).to(whiten_backend.dtype)
    torch.testing.assert_close(
        rlkern.whiten(far), rlkern.whiten(near), rtol=2 * RTOL[near.dtype], atol=2e-9
    )


def test_values_alike_give_0(whiten_backend):
    x = torch.full((40_000,), 0.1, dtype=whiten_backend.dtype)
    # A mean rounded to double is 1e-17 off, which rsqrt(1e-8) makes 1e-13 of.
    assert rlkern.whiten(x).abs().max() < 1e-12
    assert rlkern.whiten(x, shift_mean=False).sub(0.1).abs().max() < 1e-8


def test_equal_values_without_eps_give_nan(whiten_backend):
    x = torch.full((40,), 0.5, dtype=whiten_backend.dtype)
    for eps_mode in ("add", "clamp"):
        assert rlkern.whiten(x, eps=0.0, eps_mode=eps_mode).isnan().all()


def test_repeats_on_any_number_of_threads(whiten_backend):
    if not whiten_backend.is_kernel:
        pytest.skip("the sums of PyTorch itself follow the number of threads")
    rows = 3 if whiten_backend.name == "triton" else 90
    x, mask = torch.randn(rows, 1111).to(whiten_backend.dtype), torch.rand(rows, 1111) < 0.5
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append((rlkern.whiten(x, mask), rlkern.whiten(x), rlkern.whiten(x[:, ::2])))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_few_values(whiten_backend):
    dtype = whiten_backend.dtype
    x = torch.tensor([3.0, -1.0], dtype=dtype)
    one = torch.tensor([True, False])
    with pytest.raises(ValueError, match="mask: expected at least two counting values.* got 1"):
        rlkern.whiten(x, one)
    with pytest.raises(ValueError, match="mask: expected at least two counting values.* got 0"):
        rlkern.whiten(x[:0])
    assert rlkern.whiten(x, one, unbiased=False).tolist() == [0, 0]
    assert rlkern.whiten(x, one, unbiased=False, shift_mean=False).tolist() == [3, 0]
    assert rlkern.whiten(x, one, scale=False).tolist() == [0, 0]
    assert rlkern.whiten(x[:0], unbiased=False).shape == (0,)
    assert rlkern.whiten(x, one & False, unbiased=False).tolist() == [0, 0]


def test_strides_dtypes_and_none(whiten_backend):
    x, mask = batch((5, 13), whiten_backend.dtype)
    assert torch.equal(rlkern.whiten(x.T, mask.T), rlkern.whiten(x.T.clone(), mask.T.clone()))
    assert torch.equal(rlkern.whiten(x[::2, ::3]), rlkern.whiten(x[::2, ::3].clone()))
    assert torch.equal(rlkern.whiten(x), rlkern.whiten(x, torch.ones_like(mask)))
    if whiten_backend.dtype == torch.float32:
        for dtype in (torch.bfloat16, torch.float16):
            narrow = rlkern.whiten(x.to(dtype), mask)
            assert torch.equal(narrow, rlkern.whiten(x.to(dtype).float(), mask))


# ---- over processes ------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [4, 1, 0, 11], ids=["ragged", "one row", "empty", "all"])
def test_two_processes_whiten_as_one(tmp_path, cut):
    mp.spawn(process, (str(tmp_path / "store"), cut, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    x, mask = joined()
    for one, two, options in zip(first, second, OPTIONS, strict=False):
        both = torch.cat([one, two])
        # Means of about 40 in double: 1e-14 off, and rounded to float once.
        torch.testing.assert_close(both, rlkern.whiten(x, mask, **options), rtol=2e-7, atol=1e-12)
    assert first[-1] == second[-1]
    assert first[-1].startswith("mask: expected at least two counting values")


def test_moments_of_parts_are_those_of_all():
    x, mask = joined()
    parts = [
        rlkern.reference.whiten.masked_moments(x[rows].double(), mask[rows])
        for rows in (slice(0, 0), slice(0, 3), slice(3, 4), slice(4, 11))
    ]
    merged = rlkern.reference.whiten.merged_moments(torch.stack(parts))
    whole = rlkern.reference.whiten.masked_moments(x.double(), mask)
    torch.testing.assert_close(merged, whole, rtol=1e-13, atol=0)


# ---- torch ---------------------------------------------------------------------------------------

native = pytest.mark.skipif(
    bool(_backend.why_not("whiten", "native", "cpu", torch.float32)), reason="no native kernels"
)


@native
def test_opcheck():
    x, mask = batch((5, 13), torch.float32)
    moments = torch.ops.rlkern.masked_moments(x, mask)
    exact = rlkern.reference.whiten.masked_moments(x, mask)
    torch.testing.assert_close(moments, exact, rtol=1e-13, atol=0)
    for m in (mask, None):
        torch.library.opcheck(torch.ops.rlkern.masked_moments.default, (x, m))
        numbers = [1.0, 1.0, 1.0, 1e-8, 0.0]
        torch.library.opcheck(torch.ops.rlkern.whiten.default, (x, m, moments, numbers))


@native
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({0: torch.randn(3, 2).T}, "x: expected a contiguous tensor of 6 values"),
        ({0: torch.randn(6).double()}, "x: expected a contiguous tensor of 6 values"),
        ({1: torch.ones(5) > 0}, "mask: expected a contiguous tensor of 6 values"),
        ({1: torch.ones(6)}, "mask: expected a contiguous tensor of 6 values"),
        ({2: torch.zeros(2).double()}, "moments: expected a contiguous tensor of 3 values"),
        ({2: torch.zeros(3)}, "moments: expected a contiguous tensor of 3 values"),
        ({3: [1.0] * 4}, "options: expected 5 numbers, got 4"),
    ],
)
def test_the_operators_check_their_tensors(changed, message):
    arguments = [torch.randn(6), None, torch.ones(3).double(), [1.0, 1.0, 1.0, 1e-8, 0.0]]
    for place, value in changed.items():
        arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.rlkern.whiten(*arguments)
    if not {2, 3} & set(changed):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.rlkern.masked_moments(*arguments[:2])


def test_compiles(whiten_backend):
    x, mask = batch((5, 13), whiten_backend.dtype)

    def run(values):
        return rlkern.whiten(values, mask) + rlkern.whiten(values, scale=False)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), run(x))


def test_no_derivative(whiten_backend):
    x = torch.randn(8, dtype=whiten_backend.dtype, requires_grad=True)
    with pytest.raises(ValueError, match="x: expected a tensor that needs no gradient"):
        rlkern.whiten(x)
    with torch.no_grad():
        out = rlkern.whiten(x)
    assert not out.requires_grad and torch.equal(out, rlkern.whiten(x.detach()))


@native
def test_the_operators_have_no_derivative():
    x = torch.randn(8, requires_grad=True)
    with pytest.raises(RuntimeError, match="masked_moments cannot be differentiated"):
        torch.ops.rlkern.masked_moments(x, None).sum().backward()
    moments = torch.ops.rlkern.masked_moments(x.detach(), None)
    out = torch.ops.rlkern.whiten(x, None, moments, [1.0, 1.0, 1.0, 1e-8, 0.0])
    with pytest.raises(RuntimeError, match="whiten cannot be differentiated"):
        out.sum().backward()


X = torch.zeros(2, 3)
REFUSED = [
    ({"x": [0.0]}, TypeError, "x: expected a torch.Tensor, got list"),
    (
        {"x": X.long()},
        TypeError,
        "x: expected float32, bfloat16, float16 or float64, got torch.int",
    ),
    ({"x": X.to_sparse()}, TypeError, "x: expected a dense tensor"),
    ({"mask": X.tolist()}, TypeError, "mask: expected a torch.Tensor, got list"),
    ({"mask": X}, TypeError, "mask: expected bool or an integer type, got torch.float32"),
    ({"mask": X[:1] > 0}, ValueError, "mask: expected shape [2, 3] (x's), got [1, 3]"),
    ({"mask": (X > 0).to("meta")}, ValueError, "mask: expected device cpu (x's), got meta"),
    ({"shift_mean": 1}, TypeError, "shift_mean: expected a bool, got 1"),
    ({"scale": None}, TypeError, "scale: expected a bool, got None"),
    ({"unbiased": "no"}, TypeError, "unbiased: expected a bool, got 'no'"),
    ({"eps": -1.0}, ValueError, "eps: expected a finite number of at least 0, got -1.0"),
    ({"eps": "0"}, TypeError, "eps: expected a number, got str"),
    ({"eps_mode": "max"}, ValueError, "eps_mode: expected one of add, clamp, got 'max'"),
    (
        {"shift_mean": False, "scale": False},
        ValueError,
        "shift_mean, scale: expected at least one of them, got False for both",
    ),
    (
        {"scale": False, "unbiased": False},
        ValueError,
        "unbiased: expected its default with scale=False, got False",
    ),
    ({"scale": False, "eps": 1e-6}, ValueError, "eps: expected its default with scale=False"),
    ({"scale": False, "eps_mode": "clamp"}, ValueError, "eps_mode: expected its default with s"),
]


@pytest.mark.parametrize(
    ("arguments", "error", "message"), REFUSED, ids=[str(r[-1])[:50] for r in REFUSED]
)
def test_refuses(arguments, error, message):
    given = {"x": X} | arguments
    with pytest.raises(error, match=re.escape(message)):
        rlkern.whiten(given.pop("x"), **given)


def test_refuses_what_is_no_process_group():
    with pytest.raises(
        TypeError, match="group: expected a torch.distributed process group, got str"
    ):
        rlkern.whiten(torch.randn(4), group="world")

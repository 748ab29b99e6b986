"""ValueLoss against a literal reading of its formula, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from rlkern import ValueLoss
from rlkern.reference.aggregation import AGGREGATIONS

LENGTHS = (5, 0, 17, 1, 64)
# Terms and slopes round a few times each, sums run in floats over at most 32 additions: 40 ulp.
RTOL = 40 * 2**-24


def batch(packed, generator=None):
    generator = torch.Generator().manual_seed(3)
    shape = (sum(LENGTHS),) if packed else (len(LENGTHS), max(LENGTHS))

    def normal():
        return torch.randn(shape, generator=generator)

    values = normal()
    given = {"old_values": values + 0.3 * normal(), "mask": normal() > -0.5}
    if packed:
        given["cu_seqlens"] = torch.tensor((0, *LENGTHS), dtype=torch.int32).cumsum(0).int()
    else:
        given["mask"] &= torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return values, values + normal(), given


def sequences(mask, cu_seqlens):
    if cu_seqlens is None:
        return [(i, t) for i in range(mask.shape[0]) for t in range(mask.shape[1])], mask.shape[0]
    ends = cu_seqlens.tolist()
    pairs = zip(ends, ends[1:], strict=False)
    return [(i, t) for i, (a, b) in enumerate(pairs) for t in range(a, b)], len(ends) - 1


def literal(loss, values, returns, old_values=None, mask=None, cu_seqlens=None, **given):
    """The loss and the counts, token by token, in float64."""
    places, count = sequences(mask, cu_seqlens)
    sums, lengths, clipped = [values.new_zeros(())] * count, [0] * count, 0
    for i, t in places:
        at = t if cu_seqlens is not None else (i, t)
        if not mask[at]:
            continue
        v, target = values[at], returns[at]
        square = (v - target) ** 2
        if loss.clip is not None:
            old = old_values[at]
            other = (torch.clamp(v, old - loss.clip, old + loss.clip) - target) ** 2
            clipped += bool(other > square)
            square = torch.maximum(square, other)
        sums[i] = sums[i] + square
        lengths[i] += 1
    total, tokens = sum(sums), sum(lengths)
    if loss.skip_empty:
        count = sum(n > 0 for n in lengths)
    count = given.get("num_sequences", count)
    if loss.aggregation == "token_mean":
        total = total / given.get("normalizer", max(tokens, 1))
    elif loss.aggregation == "seq_mean_token_mean":
        total = sum(s / max(n, 1) for s, n in zip(sums, lengths, strict=True)) / count
    elif loss.aggregation == "seq_mean_token_sum":
        total = total / count
    elif loss.aggregation == "seq_mean_token_sum_norm":
        total = total / (count * given["normalizer"])
    return 0.5 * total, clipped / max(tokens, 1)


def double(given):
    return {k: v.double() if k == "old_values" else v for k, v in given.items()}


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_equals_its_formula(value_backend, aggregation, clip, packed):
    values, returns, given = batch(packed)
    if clip is None:
        del given["old_values"]
    if aggregation == "seq_mean_token_sum_norm":
        given["normalizer"] = 40.0
    loss = ValueLoss(
        clip=clip, aggregation=aggregation, skip_empty=aggregation == "seq_mean_token_sum"
    )
    exact = values.double().requires_grad_()
    expected, clip_frac = literal(loss, exact, returns.double(), **double(given))
    (slope,) = torch.autograd.grad(1.5 * expected, exact)
    mask = given["mask"]
    # What masked positions hold must not matter.
    held = {
        name: torch.where(mask, x, float("nan"))
        for name, x in (("values", values), ("returns", returns))
    }
    if clip is not None:
        given["old_values"] = torch.where(mask, given["old_values"], float("inf"))
    dtype = value_backend
    leaf = held["values"].to(dtype).requires_grad_()
    arguments = {k: v.to(dtype) if k == "old_values" else v for k, v in given.items()}
    out = loss(leaf, held["returns"].to(dtype), **arguments)
    (1.5 * out.loss).backward()
    rtol = 1e-12 if dtype == torch.float64 else RTOL
    torch.testing.assert_close(out.loss.double(), expected.detach(), rtol=rtol, atol=0)
    torch.testing.assert_close(leaf.grad.double(), slope, rtol=rtol, atol=rtol)
    metrics = out.metrics.item_dict()
    assert metrics["value_clip_frac"] == pytest.approx(clip_frac)
    assert metrics["value_loss"] == pytest.approx(float(expected.detach()), rel=rtol)
    target, error = returns[mask].double(), (returns - values)[mask].double()
    variance = 1 - error.var(unbiased=False) / target.var(unbiased=False)
    assert metrics["explained_variance"] == pytest.approx(float(variance), rel=1e-5)
    assert metrics["value_mean"] == pytest.approx(float(values[mask].double().mean()), rel=1e-5)
    assert metrics["return_mean"] == pytest.approx(float(target.mean()), rel=1e-5)


def test_parts_and_repeats(value_backend):
    values, returns, given = batch(packed=False)
    dtype = value_backend
    loss = ValueLoss()

    def metrics(rows):
        some = {k: v[rows].to(dtype) if k == "old_values" else v[rows] for k, v in given.items()}
        return loss(values[rows].to(dtype), returns[rows].to(dtype), **some).metrics

    joined, parts = metrics(slice(None)), metrics(slice(0, 2)) + metrics(slice(2, None))
    assert parts.item_dict() == pytest.approx(joined.item_dict(), rel=1e-5)
    assert torch.equal(joined.vector, metrics(slice(None)).vector)


def test_nothing_counts(value_backend):
    out = ValueLoss(clip=None)(
        torch.ones(2, 3, dtype=value_backend, requires_grad=True),
        torch.zeros(2, 3),
        mask=torch.zeros(2, 3, dtype=torch.bool),
    )
    out.loss.backward()
    assert out.loss == 0 and out.metrics["value_clip_frac"] == 0
    assert math.isnan(out.metrics["explained_variance"])


def test_gradcheck_and_one_derivative_only():
    values, returns, given = batch(packed=False)
    values = values[:2, :6].double().requires_grad_()
    rest = {k: v[:2, :6].double() if k == "old_values" else v[:2, :6] for k, v in given.items()}
    returns = returns[:2, :6].double()
    assert torch.autograd.gradcheck(lambda v: ValueLoss()(v, returns, **rest).loss, values)
    single = values.detach().float().requires_grad_()
    out = ValueLoss(clip=None)(single, returns.float())
    if "value_loss" in type(out.loss.grad_fn).__name__:  # a kernel, not eager PyTorch
        with pytest.raises(RuntimeError, match="first derivatives only"):
            torch.autograd.grad(out.loss, single, create_graph=True)


def test_compiles(value_backend):
    values, returns, given = batch(packed=True)
    dtype = value_backend
    values, returns = values.to(dtype), returns.to(dtype)
    given["old_values"] = given["old_values"].to(dtype)

    def run(v):
        return ValueLoss()(v, returns, **given).loss

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    a, b = (values.clone().requires_grad_() for _ in range(2))
    compiled(a).backward()
    run(b).backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=RTOL, atol=0)


X = torch.zeros(2, 3)
REFUSED = [
    ({"clip": 0}, {}, ValueError, "clip: expected a finite number above 0, got 0"),
    ({"clip": True}, {}, TypeError, "clip: expected a number, got bool"),
    ({"aggregation": "mean"}, {}, ValueError, "aggregation: expected one of"),
    ({"skip_empty": 1}, {}, TypeError, "skip_empty: expected a bool"),
    ({"skip_empty": True}, {}, ValueError, "skip_empty: expected False with aggregation"),
    ({}, {}, ValueError, "old_values: expected a tensor, since clip is 0.2"),
    ({"clip": None}, {"old_values": X}, ValueError, "old_values: expected None"),
    ({"clip": None}, {"returns": None}, TypeError, "returns: expected a torch.Tensor, got None"),
    ({"clip": None}, {"returns": X[:1]}, ValueError, r"returns: expected shape \[2, 3\]"),
    ({"clip": None}, {"values": X.long()}, TypeError, "values: expected float32"),
    ({"clip": None}, {"values": X[0]}, ValueError, r"values: expected \[B, T\], or \[total\]"),
    ({"clip": None}, {"mask": X}, TypeError, "mask: expected bool or an integer type"),
    ({"clip": None}, {"num_sequences": 3}, ValueError, "num_sequences: expected None"),
    ({"clip": None, "aggregation": "token_sum"}, {"normalizer": 3}, ValueError, "normalizer: exp"),
    ({"clip": None}, {"cu_seqlens": torch.tensor([0, 3])}, ValueError, "cu_seqlens: expected None"),
    (
        {"clip": None},
        {"returns": X.clone().requires_grad_()},
        ValueError,
        "returns: expected a tensor that needs no gradient",
    ),
]


@pytest.mark.parametrize(
    ("fields", "arguments", "error", "message"), REFUSED, ids=[str(r[-1])[:40] for r in REFUSED]
)
def test_refuses(fields, arguments, error, message):
    given = {"values": X, "returns": X} | arguments
    with pytest.raises(error, match=message):
        ValueLoss(**fields)(given.pop("values"), given.pop("returns"), **given)

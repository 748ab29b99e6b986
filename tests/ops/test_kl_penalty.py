"""kl_penalty against float64 formulas, value and derivative, and what it refuses."""

from __future__ import annotations

import pytest
import torch

import rlkern
from rlkern import _backend, _native
from rlkern.reference.kl_penalty import ESTIMATORS

X = torch.tensor(
    [0.0, 1e-9, -1e-4, 3e-4, 0.05, -0.3, 0.36, 1.0, -2.5, 9.0, 15.0, -19.0, 30.0, -50.0]
)
# x is exact in fp32; exp rounds to 1.3e-7 and what is made of it a few times more.
RTOL = 1e-6


@pytest.fixture(
    params=["eager-float64", "eager", "native-avx512", "native-avx2", "native-portable"]
)
def dtype(request, monkeypatch):
    """The dtype of the computation, served by one backend."""
    name, _, detail = request.param.partition("-")
    dtype = torch.float64 if detail == "float64" else torch.float32
    reason = _backend.why_not("kl_penalty", name, "cpu", dtype)
    if reason:
        pytest.skip(reason)
    if name == "native":
        if detail not in _native.cpu_isas():
            pytest.skip(f"this machine cannot run {detail}")
        monkeypatch.setenv("RLKERN_CPU_ISA", detail)
    with rlkern.use_backend(name):
        yield dtype


def literal(x, estimator, clamp):
    """(value, d value / d logprob) in float64."""
    kind = estimator.removesuffix("_st")
    bounded = clamp == "openrlhf" or (clamp == "verl" and kind == "k3")
    leaf = x.clone().requires_grad_()
    y = leaf.clamp(-20, 20) if bounded else leaf
    value = {
        "k1": -y, "abs": y.abs(), "k2": y**2 / 2, "k3": torch.expm1(y) - y
    }[kind]  # fmt: skip
    if bounded:
        value = value.clamp(-10, 10)
    (slope,) = torch.autograd.grad(value.sum(), leaf)
    if kind == "k3":
        # expm1(x) - x cancels even in float64 near 0, and its derivative with it.
        near = x.abs() < 1e-3
        series = x**2 / 2 + x**3 / 6 + x**4 / 24
        value = torch.where(near, series, value)
        slope = torch.where(near, torch.expm1(x), slope)
    return value.detach(), -x if estimator.endswith("_st") else -slope


@pytest.mark.parametrize("clamp", [None, "verl", "openrlhf"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equals_its_formula(dtype, estimator, clamp):
    if clamp == "verl" and not estimator.startswith("k3"):
        pytest.skip("verl clamps k3 alone")
    logprobs = torch.zeros_like(X).to(dtype).requires_grad_()
    value = rlkern.kl_penalty(logprobs, X.to(dtype), estimator=estimator, clamp=clamp)
    upstream = torch.linspace(-2, 3, len(X)).to(dtype)
    value.backward(upstream)
    expected, slope = literal(X.double(), estimator, clamp)
    # Eager's fp32 expm1(x) - x is good to an ulp of x, not of the difference.
    atol = 2**-24 * X.abs().max().item() if dtype == torch.float32 else 0
    atol = 2e-11 if estimator.startswith("k3") else atol
    torch.testing.assert_close(value.double(), expected, rtol=RTOL, atol=atol)
    torch.testing.assert_close(logprobs.grad.double(), slope * upstream.double(), rtol=RTOL, atol=0)
    assert value.dtype == dtype


def test_native_k3_does_not_cancel():
    if _backend.why_not("kl_penalty", "native", "cpu", torch.float32):
        pytest.skip("no native kernels")
    x = torch.logspace(-9, 1.2, 400)
    with rlkern.use_backend("native"):
        value = rlkern.kl_penalty(torch.zeros_like(x), x)
    y = x.double()
    exact = torch.where(y < 1e-2, y**2 * (1 / 2 + y / 6 + y**2 / 24 + y**3 / 120), y.expm1() - y)
    torch.testing.assert_close(value.double(), exact, rtol=2e-6, atol=0)


def test_masked_tokens_hold_anything(dtype):
    shape = (3, 5, 7)
    logprobs, ref = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    mask = torch.rand(shape) < 0.5
    leaf = logprobs.where(mask, float("nan")).requires_grad_()
    value = rlkern.kl_penalty(leaf, ref.where(mask, float("inf")), mask=mask.long())
    value.sum().backward()
    clean = logprobs.clone().requires_grad_()
    expected = rlkern.kl_penalty(clean, ref)
    expected.sum().backward()
    assert torch.equal(value, expected.where(mask, 0.0))
    assert torch.equal(leaf.grad, clean.grad.where(mask, 0.0))


def test_strides_sizes_and_dtypes(dtype):
    logprobs, ref = torch.randn(6, 40).to(dtype), torch.randn(40, 6).to(dtype)
    strided = rlkern.kl_penalty(logprobs[::2, ::3], ref.T[::2, ::3])
    assert torch.equal(strided, rlkern.kl_penalty(logprobs, ref.T)[::2, ::3])
    assert rlkern.kl_penalty(logprobs[:0], ref.T[:0]).shape == (0, 40)
    assert rlkern.kl_penalty(logprobs[0, 0], ref[0, 0]).shape == ()
    low = rlkern.kl_penalty(logprobs.bfloat16(), ref.T.bfloat16())
    if dtype == torch.float32:
        wide = rlkern.kl_penalty(logprobs.bfloat16().float(), ref.T.bfloat16().float())
        assert torch.equal(low, wide)


def test_opcheck_and_one_derivative_only():
    if _backend.why_not("kl_penalty", "native", "cpu", torch.float32):
        pytest.skip("no native kernels")
    x = torch.randn(9, requires_grad=True)
    torch.library.opcheck(torch.ops.rlkern.kl_penalty.default, (x, torch.randn(9), None, 3, 0))
    value = rlkern.kl_penalty(x, torch.randn(9))
    (grad,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()


def test_gradcheck():
    x = torch.randn(9, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(9, dtype=torch.float64)
    for estimator in ("k1", "abs", "k2", "k3"):
        assert torch.autograd.gradcheck(
            lambda logprobs, e=estimator: rlkern.kl_penalty(logprobs, ref, estimator=e), x
        )


T = torch.zeros(4)
REFUSED = [
    ({"logprobs": [0.0]}, TypeError, "logprobs: expected a torch.Tensor"),
    ({"logprobs": T.long()}, TypeError, "logprobs: expected float32"),
    ({"ref_logprobs": T[:3]}, ValueError, r"ref_logprobs: expected shape \[4\]"),
    ({"ref_logprobs": T.to("meta")}, ValueError, "ref_logprobs: expected device cpu"),
    (
        {"ref_logprobs": T.clone().requires_grad_()},
        ValueError,
        "ref_logprobs: expected a tensor th",
    ),
    ({"mask": T}, TypeError, "mask: expected bool or an integer type"),
    ({"mask": T[:1] > 0}, ValueError, "mask: expected shape"),
    ({"estimator": "k4"}, ValueError, "estimator: expected one of k1, .*got 'k4'"),
    ({"clamp": "trl"}, ValueError, "clamp: expected one of verl, openrlhf"),
    ({"estimator": "k1", "clamp": "verl"}, ValueError, "clamp: expected None or 'openrlhf'"),
]


@pytest.mark.parametrize(
    ("arguments", "error", "message"), REFUSED, ids=[str(r[-1])[:40] for r in REFUSED]
)
def test_refuses(arguments, error, message):
    given = {"logprobs": T, "ref_logprobs": T} | arguments
    with pytest.raises(error, match=message):
        rlkern.kl_penalty(given.pop("logprobs"), given.pop("ref_logprobs"), **given)

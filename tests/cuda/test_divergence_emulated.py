"""The CUDA kernels of vocab_divergence, run on the CPU, against the reference in float64.

Tolerances: as in tests/ops/test_kl_divergence.py, of the same formulas, and of a sum of fp32 terms
8 at a time; the approximate exponential adds 2 ulp to a probability. Where t is not made of exact
differences, by a cap or a temperature, each |z| of up to 15 brings 2^-24 of itself to a |t| of 1.
"""

from __future__ import annotations

import pytest
import torch
from emulated_kernels import DTYPES, build, poisoned, why_not

from rlkern.reference import vocab_divergence as reference

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())
RTOL = 1e-5
KINDS = reference.DIVERGENCES


@pytest.fixture(scope="module")
def module():
    return build("_emulated_divergence", "emulated_divergence.cpp")


class Call:
    """One call's tensors: logits and ref [N, V], any alignment and row stride."""

    def __init__(
        self, module, logits, ref, kind="kl", *, mask=None, per_token=None, temperature=1.0,
        softcap=None, beta=0.3, threads=32, max_blocks=2**31 - 1,
    ):  # fmt: skip
        self.module, self.logits, self.ref, self.mask = module, logits, ref, mask
        n, vocab = logits.shape
        self.per_token, self.softcap, self.kind, self.beta = per_token, softcap, kind, beta
        self.temperature = temperature
        self.pairs = module.Pairs(
            DTYPES[logits.dtype], self.rows(logits), self.rows(ref), n, vocab,
            0 if mask is None else mask.data_ptr(),
            0 if per_token is None else per_token.data_ptr(),
            temperature, softcap or 0.0, KINDS.index(kind), beta, threads, max_blocks,
        )  # fmt: skip

    @staticmethod
    def rows(x):
        return x.data_ptr(), x.stride(0)

    def forward(self):
        n = self.logits.shape[0]
        value, state = poisoned(n), poisoned(n, reference.STATE)
        self.module.forward(self.pairs, value.data_ptr(), state.data_ptr())
        return value, state

    def backward(self, upstream, state, grad=None):
        if grad is None:
            grad = poisoned(*self.logits.shape, dtype=self.logits.dtype)
        self.module.backward(self.pairs, upstream.data_ptr(), state.data_ptr(), self.rows(grad))
        return grad

    def exact(self, upstream):
        n = self.logits.shape[0]
        counts = torch.ones(n, dtype=torch.bool) if self.mask is None else self.mask
        temperature = torch.full((n,), self.temperature, dtype=torch.float64)
        if self.per_token is not None:
            temperature = self.per_token.double()
        given = (
            self.logits.double(), self.ref.double(), counts, temperature, self.softcap, self.kind,
            self.beta,
        )  # fmt: skip
        value, state = reference.forward(*given)
        return value, reference.backward(upstream.double(), *given, state)

    def check(self):
        upstream = torch.randn(self.logits.shape[0])
        expected, slope = self.exact(upstream)
        value, state = self.forward()
        grad = self.backward(upstream, state)
        torch.testing.assert_close(value.double(), expected, rtol=RTOL, atol=1e-12)
        rounding = torch.finfo(self.logits.dtype).eps / 2
        error = (grad.double() - slope).norm()
        assert error <= (RTOL + rounding) * slope.norm(), (error, slope.norm())
        return value, grad


def rows_of(n, vocab, dtype, *, offset=0, scale=3.0):
    """[n, vocab] whose first element lies `offset` elements into its memory."""
    memory = torch.randn(n * (vocab + 3) + offset) * scale
    return memory.to(dtype)[offset:].view(n, -1)[:, :vocab]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_equals_float64(module, kind, dtype, softcap):
    # Odd rows at odd places: every alignment of each of the three tensors.
    x, ref = rows_of(9, 517, dtype, offset=1), rows_of(9, 517, dtype, offset=2)
    per_token = torch.rand(9) + 0.5
    mask = torch.tensor([True] * 7 + [False, True])
    Call(module, x, ref, kind, mask=mask, per_token=per_token, softcap=softcap).check()


@pytest.mark.parametrize("vocab", [1, 2, 8, 2049])
@pytest.mark.parametrize("kind", KINDS)
def test_vocabularies_blocks_and_grids(module, kind, vocab):
    x, ref = rows_of(5, vocab, torch.float32), rows_of(5, vocab, torch.float32)
    plain = Call(module, x, ref, kind, temperature=0.7, threads=64).check()
    again = Call(module, x, ref, kind, temperature=0.7, threads=64, max_blocks=2).forward()
    assert torch.equal(plain[0], again[0])


@pytest.mark.parametrize("apart", [1e-3, 1e-5])
@pytest.mark.parametrize("kind", KINDS)
def test_nearly_equal_and_shifted(module, kind, apart):
    x = rows_of(4, 517, torch.float32)
    ref = x + apart * torch.randn_like(x)
    value, _ = Call(module, x, ref, kind).forward()
    expected, _ = Call(module, x, ref, kind).exact(torch.ones(4))
    # The error of the normalisations enters squared.
    torch.testing.assert_close(value.double(), expected, rtol=RTOL, atol=5e-13)
    coarse = (64 * x).round() / 64
    Call(module, coarse + 1e4, (64 * ref).round() / 64 + torch.randn(4, 1).round(), kind).check()


@pytest.mark.parametrize("over", ["logits", "ref"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_over_either_row(module, over, dtype):
    x, ref = rows_of(6, 517, dtype, offset=1), rows_of(6, 517, dtype, offset=2)
    call, upstream = Call(module, x, ref, "js", softcap=4.0), torch.randn(6)
    _, state = call.forward()
    expected = call.backward(upstream, state)
    grad = call.backward(upstream, state, x if over == "logits" else ref)
    assert torch.equal(grad, expected)


def test_rows_apart(module):
    """Masked garbage, NaN, +inf, -inf on either side, no upstream."""
    inf, nan = float("inf"), float("nan")
    x, ref = rows_of(9, 37, torch.float32), rows_of(9, 37, torch.float32)
    x[0], ref[0] = nan, inf  # masked
    x[1, 3] = nan
    ref[2, 3] = inf
    x[3, 5] = -inf
    ref[4, 5] = -inf
    x[5, 5] = ref[5, 5] = -inf
    x[6] = -inf
    ref[7] = -inf
    mask = torch.tensor([False] + [True] * 8)
    upstream = torch.tensor([nan, 0.0, 1, 1, 1, 1, 1, 1, 0])
    for kind in KINDS:
        call = Call(module, x, ref, kind, mask=mask)
        expected, slope = call.exact(upstream)
        value, state = call.forward()
        grad = call.backward(upstream, state)
        torch.testing.assert_close(value.double(), expected, rtol=RTOL, atol=1e-12, equal_nan=True)
        torch.testing.assert_close(grad.double(), slope, rtol=1e-4, atol=1e-6, equal_nan=True)
        assert (grad[0] == 0).all() and grad[1].isnan().all() and (grad[8] == 0).all()


def test_a_temperature_that_is_none_makes_its_row_nan(module):
    x, ref = rows_of(3, 37, torch.float32), rows_of(3, 37, torch.float32)
    value, _ = Call(module, x, ref, per_token=torch.tensor([1.0, 0.0, -1.0])).forward()
    assert value.isnan().tolist() == [False, True, True]

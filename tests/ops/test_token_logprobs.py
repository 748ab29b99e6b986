"""token_logprobs on the CPU against float64, on every backend and instruction set.

Tolerances. With eps = 2^-23 (fp32): the exponential is good to 2 eps relative plus eps |d| for its
argument d = z - max; sums of them add at most 2 eps, since partial sums are short and joined in
double. So a log-probability is off by at most eps (|logp| + 8), the entropy, whose weights d e^d
are at most 1/e each, by eps (2 H + 16), and p_j by a factor of 1 + eps (|d| + log V + 8). A softcap
c adds 4 eps c / temperature to each z. Rounding to the logits' dtype adds half an ulp to gradients.
"""

from __future__ import annotations

import math

import pytest
import torch

import rlkern
from rlkern.reference import token_logprobs as reference

INF = float("inf")
EPS = 2.0**-23
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
TINY = {torch.float32: 1e-37, torch.bfloat16: 1e-37, torch.float16: 2.0**-24}
DTYPES = tuple(HALF_ULP)


def truth(logits, ids, g, h, mask=None, temperature=1.0, softcap=None):
    """logp, entropy and gradient by the float64 reference (tested on its own below)."""
    vocab = logits.shape[-1]
    flat = logits.detach().double().reshape(-1, vocab)
    n = flat.shape[0]
    counts = torch.ones(n, dtype=torch.bool) if mask is None else mask.reshape(-1)
    t = torch.as_tensor(temperature, dtype=torch.float64).expand(ids.shape).reshape(-1)
    fwd = reference.forward(flat, ids.reshape(-1), counts, t, softcap)
    grad = reference.backward(
        g.reshape(-1).double(), h.reshape(-1).double(), flat, ids.reshape(-1), counts, t, softcap,
        *fwd,
    )  # fmt: skip
    return fwd[0].view(ids.shape), fwd[1].view(ids.shape), grad.view(logits.shape)


def run(logits, ids, g, h, **options):
    leaf = logits.detach().requires_grad_()
    out = rlkern.token_logprobs(leaf, ids, return_entropy=True, **options)
    (grad,) = torch.autograd.grad([out.logprobs, out.entropy], leaf, [g, h])
    return out.logprobs.detach(), out.entropy.detach(), grad


def assert_close(actual, expected, bound):
    actual = actual.double()
    assert torch.equal(actual.isnan(), expected.isnan())
    same = (actual == expected) | expected.isnan()
    error = torch.where(same, 0.0, (actual - expected).abs())
    worst = (error / bound).max() if error.numel() else torch.zeros(())
    assert worst <= 1, f"error is {worst:.2f} times its bound"


def check(logits, ids, *, temperature=1.0, softcap=None, mask=None, g=None, h=None, result=None):
    vocab = logits.shape[-1]
    g = torch.randn(ids.shape) if g is None else g
    h = torch.randn(ids.shape) if h is None else h
    options = dict(mask=mask, temperature=temperature, softcap=softcap)
    logp, entropy, grad = result or run(logits, ids, g, h, **options)
    assert logp.dtype == torch.float32 and grad.dtype == logits.dtype
    logp64, entropy64, grad64 = truth(logits, ids, g, h, **options)

    t = torch.as_tensor(temperature, dtype=torch.float64).expand(ids.shape)
    t = t.where(torch.ones_like(ids, dtype=torch.bool) if mask is None else mask, 1.0)
    from_cap = 0.0 if softcap is None else 4 * EPS * softcap / t
    finite = logp64.where(logp64.isfinite(), 0.0).abs()
    assert_close(logp, logp64, EPS * (finite + 8) + 2 * from_cap)
    # The entropy moves with z by at most |d| p |dz|, summed: at most (H + log V) dz.
    spread = entropy64.nan_to_num() + math.log(vocab)
    assert_close(entropy, entropy64, EPS * (2 * spread + 16) + from_cap * (spread + 1))

    depth = finite + 2 * math.log(vocab) + 8
    scale = (g.abs() + h.abs() * (spread + 2)).double() / t
    bound = scale * (EPS * 4 * depth + 2 * from_cap)
    rounding = HALF_ULP[logits.dtype] * grad64.abs().where(grad64.isfinite(), 0.0) * 1.01
    assert_close(grad, grad64, bound[..., None] + rounding + TINY[logits.dtype])


# ---- the reference itself ---------------------------------------------------------------------


def literal(logits, ids, temperature, softcap):
    """formulas.md word for word: log_softmax in float64, differentiated by autograd."""
    z = logits
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    logp = (z / temperature[..., None]).log_softmax(-1)
    return logp.gather(-1, ids[..., None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_reference_is_the_literal_formula(softcap):
    x = (3 * torch.randn(6, 11, dtype=torch.float64)).requires_grad_()
    ids, t = torch.randint(11, (6,)), torch.rand(6, dtype=torch.float64) + 0.5
    logp, entropy = literal(x, ids, t, softcap)
    out = rlkern.token_logprobs(x, ids, temperature=t, softcap=softcap, return_entropy=True)
    torch.testing.assert_close(out.logprobs, logp, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(out.entropy, entropy, rtol=1e-13, atol=1e-14)
    g, h = torch.randn(2, 6, dtype=torch.float64)
    (expected,) = torch.autograd.grad((g * logp + h * entropy).sum(), x)
    (actual,) = torch.autograd.grad((g * out.logprobs + h * out.entropy).sum(), x)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_gradcheck_in_float64(softcap):
    x = (2 * torch.randn(2, 3, 7, dtype=torch.float64)).requires_grad_()
    ids, t = torch.randint(7, (2, 3)), torch.rand(2, 3, dtype=torch.float64) + 0.5
    mask = torch.tensor([[True, False, True], [True, True, False]])

    def function(x):
        return tuple(
            rlkern.token_logprobs(
                x, ids, mask=mask, temperature=t, softcap=softcap, return_entropy=True
            )
        )

    assert torch.autograd.gradcheck(function, (x,))


# ---- accuracy ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 7, 8, 31, 33, 1000, 1024, 1025, 50257])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_against_float64(backend, dtype, vocab, softcap):
    logits = (4 * torch.randn(2, 3, vocab)).to(dtype)
    ids = torch.randint(vocab, (2, 3))
    mask = torch.rand(2, 3) > 0.2
    check(logits, ids, temperature=torch.rand(2, 3) + 0.5, softcap=softcap, mask=mask)
    check(logits, ids, temperature=0.7, softcap=softcap)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_vocabulary(backend, dtype):
    logits = (3 * torch.randn(4, 151936)).to(dtype)
    check(logits, torch.tensor([0, 151935, 1024, 77]))


def extreme_rows(vocab=1500):
    """Name -> one row of float32 logits and its token."""
    base = torch.randn(vocab)

    def having(**values):
        row = base.clone()
        for at, value in values.items():
            row[int(at[1:])] = value
        return row

    only = torch.full((vocab,), -INF)
    return {
        "large": (base * 1e4, 5),
        "large and equal": (torch.full((vocab,), 1e4), 5),
        "plus and minus 1e4": (torch.where(base > 0, 1e4, -1e4), 5),
        "one token has all the mass": (having(_700=1e4), 700),
        "another token has all the mass": (having(_700=1e4), 3),
        "some -inf": (torch.where(base > 1, -INF, base), int((base <= 1).nonzero()[0])),
        "target is -inf": (having(_9=-INF), 9),
        "only the target is finite": (only.clone().index_fill(0, torch.tensor([9]), 2.0), 9),
        "only the target is not finite": (having(_9=-INF), 9),
        "all -inf": (only, 9),
        "NaN": (having(_1200=math.nan), 3),
        "NaN first": (having(_0=math.nan), 3),
        "NaN is the target": (having(_3=math.nan), 3),
        "+inf": (having(_1200=INF), 3),
        "+inf is the target": (having(_3=INF), 3),
        "two +inf": (having(_3=INF, _4=INF), 3),
        "-inf and NaN": (only.clone().index_fill(0, torch.tensor([800]), math.nan), 9),
    }


@pytest.mark.parametrize("name", extreme_rows())
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits(backend, name, dtype):
    row, token = extreme_rows()[name]
    if dtype == torch.float16:
        row = row.clamp(-6e4, 6e4) if name == "large" else row
    # Beside an ordinary row, which must not notice.
    logits = torch.stack([row, torch.randn(1500), row]).to(dtype)
    ids = torch.tensor([token, 17, token])
    check(logits, ids)
    check(logits, ids, h=torch.zeros(3))


@pytest.mark.parametrize("name", ["NaN", "target is -inf", "all -inf", "+inf", "some -inf"])
def test_what_extreme_logits_give(backend, name):
    row, token = extreme_rows()[name]
    logits, ids = row[None], torch.tensor([token])
    logp, entropy, grad = run(logits, ids, torch.ones(1), torch.zeros(1))
    if name in ("NaN", "+inf"):
        assert logp.isnan().all() and entropy.isnan().all() and grad.isnan().all()
        assert run(logits, ids, torch.zeros(1), torch.zeros(1))[2].isnan().all()
    if name in ("target is -inf", "all -inf"):
        assert logp.item() == -INF and (grad == 0).all()
        assert (entropy.item() == 0) == (name == "all -inf") and entropy.isfinite().all()
    if name == "some -inf":
        assert (grad[row[None] == -INF] == 0).all() and logp.isfinite().all()


def test_a_margin_of_17_nats_is_not_lost(backend):
    logits = torch.tensor([[0.0, -17.0]])
    logp, _, grad = run(logits, torch.tensor([0]), torch.ones(1), torch.zeros(1))
    p = math.exp(-17) / (1 + math.exp(-17))
    assert logp.item() == pytest.approx(-math.log1p(math.exp(-17)), rel=4 * EPS + 1e-6)
    assert grad[0, 0].item() == pytest.approx(p, rel=1e-5)
    assert grad[0, 1].item() == pytest.approx(-p, rel=1e-5)


@pytest.mark.parametrize("p", [0.9, 0.99, 0.999])
def test_the_targets_gradient_in_bfloat16_is_right_to_one_percent(backend, p):
    vocab = 1000
    logits = torch.zeros(1, vocab)
    logits[0, 3] = math.log(p / (1 - p) * (vocab - 1))
    logits = logits.bfloat16()
    exact = logits.double().softmax(-1)[0, 3].item()
    grad = run(logits, torch.tensor([3]), torch.ones(1), torch.zeros(1))[2]
    assert grad[0, 3].item() == pytest.approx(1 - exact, rel=0.01)


def test_bfloat16_is_no_worse_than_eager_bfloat16(backend):
    logits = (3 * torch.randn(64, 4000)).bfloat16()
    ids = torch.randint(4000, (64,))
    g, h = torch.randn(2, 64)
    leaf = logits.clone().requires_grad_()
    eager_logp = leaf.log_softmax(-1)
    eager_entropy = -(eager_logp.exp() * eager_logp).sum(-1)
    picked = eager_logp.gather(-1, ids[:, None]).squeeze(-1)
    (eager_grad,) = torch.autograd.grad((g * picked + h * eager_entropy).sum(), leaf)
    for mine, eager, exact in zip(
        run(logits, ids, g, h),
        (picked, eager_entropy, eager_grad),
        truth(logits, ids, g, h),
        strict=True,
    ):
        worst = (mine.double() - exact).abs().max()
        # The tolerance: one rounding of the largest value to the result's dtype.
        rounding = torch.finfo(mine.dtype).eps * exact.abs().max()
        assert worst <= (eager.double() - exact).abs().max() + rounding


# ---- shapes, strides, masks ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (0,), (1,), (5,), (0, 3), (2, 0), (2, 3), (2, 3, 4)])
def test_leading_shapes(backend, shape):
    logits, ids = torch.randn(*shape, 13), torch.randint(13, shape)
    check(logits, ids)
    out = rlkern.token_logprobs(logits, ids, return_entropy=True)
    assert out.logprobs.shape == shape and out.entropy.shape == shape
    assert rlkern.token_logprobs(logits, ids).shape == shape


def layouts():
    base = torch.randn(4, 6, 70)
    yield "sliced in time", base[:, :-1, :64]
    yield "sliced in vocabulary", base[..., 3:67]
    yield "every other row", base[::2, 1::2, :64]
    yield "time first", base[..., :64].transpose(0, 1)
    yield "expanded", base[:1, :, :64].expand(4, 6, 64)
    yield "vocabulary not last in memory", torch.randn(4, 64, 6).transpose(1, 2)
    yield "four dimensions", torch.randn(2, 3, 5, 68)[:, :, 1:, :64].transpose(0, 1)


@pytest.mark.parametrize("name,logits", list(layouts()), ids=[n for n, _ in layouts()])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_logits_and_tokens(backend, name, logits, dtype):
    logits = logits.to(dtype) if dtype == torch.float32 else logits.contiguous().to(dtype)
    shape = logits.shape[:-1]
    ids = torch.randint(64, (*shape, 2))[..., 1]
    mask = (torch.rand(*shape, 3) > 0.3)[..., 0]
    g, h = torch.ones(()).expand(shape), torch.randn(*shape, 2)[..., 0]
    check(logits, ids, mask=mask, temperature=torch.rand(*shape, 2)[..., 0] + 0.5, g=g, h=h)


@pytest.mark.parametrize("inplace_backward", [False, True])
def test_no_rows_of_any_strides(backend, inplace_backward):
    leaf = torch.randn(3, 0, 8, requires_grad=True)
    for logits in ((leaf * 1)[..., ::2], (leaf * 1)[..., :1] * 2):
        ids = torch.zeros(3, 0, dtype=torch.long)
        logprobs = rlkern.token_logprobs(logits, ids, inplace_backward=inplace_backward)
        logprobs.sum().backward()
        assert logprobs.shape == (3, 0) and leaf.grad.shape == leaf.shape


def test_rows_are_read_where_they_lie(backend):
    base = torch.randn(2, 5, 64)
    check(base[:, :-1], torch.randint(64, (2, 4)))
    if backend != "native":
        pytest.skip("the reference may copy")
    # A copy would show as memory.
    with torch.autograd.profiler.profile(profile_memory=True) as prof:
        rlkern.token_logprobs(base[:, :-1], torch.zeros(2, 4, dtype=torch.long))
    assert sum(max(e.cpu_memory_usage, 0) for e in prof.function_events) < base.nbytes


@pytest.mark.parametrize("garbage", [math.nan, INF, -INF, 1e30])
def test_a_masked_position_may_hold_anything(backend, garbage):
    logits, ids = torch.randn(3, 40), torch.tensor([1, -100, 2])
    logits[1] = garbage
    mask = torch.tensor([True, False, True])
    temperature = torch.tensor([1.0, -1.0, 0.5])
    g = torch.tensor([1.0, math.nan, 1.0])
    logp, entropy, grad = run(logits, ids, g, g, mask=mask, temperature=temperature)
    assert logp[1] == 0 and entropy[1] == 0 and (grad[1] == 0).all()
    keep = mask.nonzero().squeeze(1)
    alone = run(logits[keep], ids[keep], g[keep], g[keep], temperature=temperature[keep])
    for whole, part in zip((logp, entropy, grad), alone, strict=True):
        assert torch.equal(whole[keep], part)


def test_integer_masks_and_ids(backend):
    logits, ids = torch.randn(4, 9), torch.randint(9, (4,))
    mask = torch.tensor([1, 0, 2, 1])
    expected = rlkern.token_logprobs(logits, ids, mask=mask != 0)
    for dtype in (torch.int64, torch.int32, torch.uint8):
        assert torch.equal(rlkern.token_logprobs(logits, ids, mask=mask.to(dtype)), expected)
    assert torch.equal(rlkern.token_logprobs(logits, ids.int(), mask=mask), expected)


def test_temperatures_that_broadcast(backend):
    logits, ids = torch.randn(2, 3, 9), torch.randint(9, (2, 3))
    t = torch.tensor([[0.5], [2.0]])
    expected = rlkern.token_logprobs(logits, ids, temperature=t.expand(2, 3).contiguous())
    assert torch.equal(rlkern.token_logprobs(logits, ids, temperature=t), expected)
    assert torch.equal(rlkern.token_logprobs(logits, ids, temperature=t.bfloat16()), expected)
    number = rlkern.token_logprobs(logits, ids, temperature=0.5)
    scalar = rlkern.token_logprobs(logits, ids, temperature=torch.tensor(0.5))
    torch.testing.assert_close(number, scalar, rtol=2 * EPS, atol=EPS)


# ---- determinism and memory ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_output_is_written_and_repeats_bitwise(backend, dtype, poisoned):
    logits = (3 * torch.randn(6, 3001)).to(dtype)
    ids, mask = torch.randint(3001, (6,)), torch.tensor([1, 1, 0, 1, 1, 1])
    g, h = torch.randn(2, 6)
    first = run(logits, ids, g, h, mask=mask)
    poisoned(logits.nbytes, 24, 48)
    second = run(logits, ids, g, h, mask=mask)
    for a, b in zip(first, second, strict=True):
        assert not a.isnan().any() and torch.equal(a, b)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_does_not_depend_on_the_batch(backend, threads):
    if backend == "eager":
        pytest.skip("promised for the kernels; torch's sums may split by size")
    logits, ids = 3 * torch.randn(33, 5003), torch.randint(5003, (33,))
    g, h = torch.randn(2, 33)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = run(logits, ids, g, h)
        for i in (0, 16, 32):
            alone = run(logits[i : i + 1], ids[i : i + 1], g[i : i + 1], h[i : i + 1])
            for a, b in zip(whole, alone, strict=True):
                assert torch.equal(a[i : i + 1], b)
    finally:
        torch.set_num_threads(before)


def test_no_gradient_product_without_need(backend):
    logits, ids = torch.randn(3, 9), torch.randint(9, (3,))
    assert not rlkern.token_logprobs(logits, ids).requires_grad
    logits.requires_grad_()
    with torch.no_grad():
        assert not rlkern.token_logprobs(logits, ids).requires_grad
    with torch.inference_mode():
        rlkern.token_logprobs(logits.detach(), ids)


def test_upstream_zero_gives_zero(backend):
    logits, ids = torch.randn(3, 9), torch.randint(9, (3,))
    assert (run(logits, ids, torch.zeros(3), torch.zeros(3))[2] == 0).all()


def test_unused_outputs(backend):
    logits, ids = torch.randn(3, 90), torch.randint(90, (3,))
    leaf = logits.clone().requires_grad_()
    out = rlkern.token_logprobs(leaf, ids, return_entropy=True)
    (from_logp,) = torch.autograd.grad(out.logprobs.sum(), leaf, retain_graph=True)
    (from_entropy,) = torch.autograd.grad(out.entropy.sum(), leaf)
    one, zero = torch.ones(3), torch.zeros(3)
    assert torch.equal(from_logp, run(logits, ids, one, zero)[2])
    assert torch.equal(from_entropy, run(logits, ids, zero, one)[2])

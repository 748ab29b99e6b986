"""token_logprobs in Triton against float64: on a GPU, or in Triton's interpreter.

Tolerances. With eps = 2^-23 (fp32): an exponential is good to 2 eps relative plus eps |d| for its
argument d = z - max; a sum passes at most 37 steps of a lane, 12 levels of lanes and 8 of segments,
eps / 2 each, which is below 29 eps. So a log-probability is off by at most eps (|logp| + 32), the
entropy, whose weights d e^d are at most 1/e each, by eps (2 H + 64), and p_j by a factor of
1 + eps (|d| + log V + 32). A softcap c adds 4 eps c / temperature to each z. Rounding to the
logits' dtype adds half an ulp to a gradient, a whole one where the interpreter truncates to bf16.
"""

from __future__ import annotations

import math

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton_device import DEVICE, INTERPRETED, MARKS, on_gpu  # noqa: E402

import rlkern  # noqa: E402
from rlkern.reference import token_logprobs as reference  # noqa: E402

pytestmark = MARKS

INF = float("inf")
NAN = float("nan")
EPS = 2.0**-23
ROUNDING = {
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-7 if INTERPRETED else 2.0**-8,
    torch.float16: 2.0**-11,
}
TINY = {torch.float32: 1e-37, torch.bfloat16: 1e-37, torch.float16: 2.0**-24}
DTYPES = tuple(ROUNDING)
OPS = torch.ops.rlkern


@pytest.fixture(autouse=True)
def triton_backend():
    with rlkern.use_backend("triton"):
        yield


def randn(*shape, dtype=torch.float32, scale=4.0):
    return (torch.randn(shape) * scale).to(DEVICE, dtype)


def randint(high, *shape):
    return torch.randint(0, high, shape).to(DEVICE)


def truth(logits, ids, g, h, mask=None, temperature=1.0, softcap=None):
    """logp, entropy and gradient by the float64 reference."""
    vocab = logits.shape[-1]
    flat = logits.detach().double().reshape(-1, vocab)
    counts = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    t = torch.as_tensor(temperature, dtype=torch.float64, device=DEVICE).expand(ids.shape)
    flat_args = ids.reshape(-1), counts.reshape(-1), t.reshape(-1), softcap
    fwd = reference.forward(flat, *flat_args)
    grad = reference.backward(
        g.reshape(-1).double(), h.reshape(-1).double(), flat, *flat_args, *fwd
    )
    return fwd[0].view(ids.shape), fwd[1].view(ids.shape), grad.view(logits.shape)


def run(logits, ids, g, h, *, inplace=False, **options):
    leaf = logits.detach().requires_grad_()
    used = leaf * 1 if inplace else leaf
    out = rlkern.token_logprobs(used, ids, return_entropy=True, inplace_backward=inplace, **options)
    wanted = [used, leaf] if inplace else [leaf]
    grad = torch.autograd.grad([out.logprobs, out.entropy], wanted, [g, h])[-1]
    if inplace:
        assert torch.equal(grad.nan_to_num(7.0), used.detach().nan_to_num(7.0))
    return out.logprobs.detach(), out.entropy.detach(), grad


def assert_close(actual, expected, bound):
    actual = actual.double()
    assert torch.equal(actual.isnan(), expected.isnan())
    same = (actual == expected) | expected.isnan()
    error = torch.where(same, 0.0, (actual - expected).abs())
    worst = (error / bound).max() if error.numel() else torch.zeros(())
    assert worst <= 1, f"error is {worst:.2f} times its bound"


def check(logits, ids, *, temperature=1.0, softcap=None, mask=None, g=None, h=None, inplace=False):
    vocab = logits.shape[-1]
    g = randn(*ids.shape, scale=1.0) if g is None else g
    h = randn(*ids.shape, scale=1.0) if h is None else h
    options = dict(mask=mask, temperature=temperature, softcap=softcap)
    logp, entropy, grad = run(logits, ids, g, h, inplace=inplace, **options)
    assert logp.dtype == torch.float32 and grad.dtype == logits.dtype
    logp64, entropy64, grad64 = truth(logits, ids, g, h, **options)

    t = torch.as_tensor(temperature, dtype=torch.float64, device=DEVICE).expand(ids.shape)
    t = t if mask is None else t.where(mask, 1.0)
    from_cap = 0.0 if softcap is None else 4 * EPS * softcap / t
    finite = logp64.where(logp64.isfinite(), 0.0).abs()
    assert_close(logp, logp64, EPS * (finite + 32) + 2 * from_cap)
    # The entropy moves with z by at most |d| p |dz|, summed: at most (H + log V) dz.
    spread = entropy64.nan_to_num() + math.log(vocab)
    assert_close(entropy, entropy64, EPS * (2 * spread + 64) + from_cap * (spread + 1))
    depth = finite + 2 * math.log(vocab) + 32
    scale = (g.abs() + h.abs() * (spread + 2)).double() / t
    bound = scale * (EPS * 4 * depth + 2 * from_cap)
    rounding = ROUNDING[logits.dtype] * grad64.abs().where(grad64.isfinite(), 0.0) * 1.01
    assert_close(grad, grad64, bound[..., None] + rounding + TINY[logits.dtype])
    return logp, entropy, grad


# ---- values -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 7, 1000])
@pytest.mark.parametrize("inplace", [False, True])
def test_small_vocabularies(dtype, vocab, inplace):
    check(randn(3, vocab, dtype=dtype), randint(vocab, 3), inplace=inplace)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_segments_that_do_not_divide_the_row(dtype, softcap):
    # Targets in the first block, at both sides of a segment's edge, and in the ragged end.
    ids = torch.tensor([0, 32767, 32768, 50256], device=DEVICE)[-1 if softcap else 0 :]
    check(randn(len(ids), 50257, dtype=dtype), ids, softcap=softcap)


@pytest.mark.parametrize(
    ("dtype", "rows", "options"),
    [
        (torch.bfloat16, 2, dict(temperature=0.7)),
        (torch.float32, 1, dict(temperature=1.3, inplace=True)),
        (torch.bfloat16, 1, dict(softcap=50.0)),
    ],
)
def test_large_vocabulary(dtype, rows, options):
    check(randn(rows, 151936, dtype=dtype), randint(151936, rows), **options)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3), (2, 0), (2, 1, 2)])
def test_leading_shapes(shape):
    check(randn(*shape, 40), randint(40, *shape))


def test_options_together():
    ids = randint(300, 2, 3)
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]], device=DEVICE).bool()
    temperature = torch.tensor([[0.5], [2.0]], device=DEVICE)
    for softcap in (None, 5.0):
        check(randn(2, 3, 300), ids, mask=mask, temperature=temperature, softcap=softcap)


def test_without_entropy():
    logits, ids = randn(3, 100).requires_grad_(), randint(100, 3)
    logp = rlkern.token_logprobs(logits, ids)
    logp.sum().backward()
    g, h = torch.ones(3, device=DEVICE), torch.zeros(3, device=DEVICE)
    expected = run(logits, ids, g, h)
    assert torch.equal(logp, expected[0])
    assert torch.equal(logits.grad, expected[2])


def test_rows_where_they_lie():
    buffer = randn(3, 6, 70, dtype=torch.bfloat16)
    for logits in (
        buffer[:, :-1],
        buffer[:, ::2, 3:43],
        buffer.transpose(0, 1),
        buffer[1],
        buffer[:, 2, 1:],
        buffer[:1, :1].expand(2, 3, 70),
    ):
        ids = randint(logits.shape[-1], *logits.shape[:-1])
        mask = torch.rand(ids.shape[::-1], device=DEVICE).permute(*range(ids.dim())[::-1]) < 0.7
        temperature = torch.rand(ids.shape[-1], device=DEVICE) + 0.5
        upstream = torch.ones((), device=DEVICE).expand(ids.shape)
        check(logits, ids, mask=mask, temperature=temperature, g=upstream, h=upstream)


def test_inplace_on_a_slice_leaves_the_rest_alone():
    buffer = randn(2, 4, 33)
    logits = buffer.clone()[:, 1:3, 4:24]
    base = logits._base
    ids = randint(20, 2, 2)
    args = logits, ids, None, None, 1.0, None
    saved = OPS.token_logprobs_triton(*args, True)
    g, h = randn(2, 2), randn(2, 2)
    expected = OPS.token_logprobs_bwd_triton(g, h, *args, *saved)
    OPS.token_logprobs_bwd_triton_(g, h, *args, *saved)
    assert torch.equal(logits, expected)
    base[:, 1:3, 4:24] = buffer[:, 1:3, 4:24]
    assert torch.equal(base, buffer)


# ---- accuracy and extremes ---------------------------------------------------------------------


@pytest.mark.parametrize("margin", [1.0, 5.0, 17.0, 40.0, 80.0])
def test_logprob_of_a_token_with_nearly_all_the_mass(margin):
    """Relative, where z_y - logsumexp would cancel: eps (margin + 32), as for any exponential."""
    logits = torch.full((1, 1000), -INF, device=DEVICE)
    logits[0, 3], logits[0, 500] = margin, 0.0
    ids = torch.tensor([3], device=DEVICE)
    g, h = torch.ones(1, device=DEVICE), torch.zeros(1, device=DEVICE)
    logp, entropy, grad = run(logits, ids, g, h)
    logp64, entropy64, grad64 = truth(logits, ids, g, h)
    tolerance = EPS * (margin + 32)
    for actual, expected in ((logp, logp64), (entropy, entropy64), (grad, grad64)):
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_large_logits(offset):
    """Differences are taken before the division, so an offset costs only its own rounding."""
    check(randn(3, 400) + offset, randint(400, 3), temperature=0.3)


def test_lowest_finite_logits():
    """What a logits processor leaves where it forbids a token, before values that count."""
    logits = torch.full((3, 9000), torch.finfo(torch.float32).min, device=DEVICE)
    logits[0, 8000:] = randn(1000)
    logits[1, 5] = 3.0e38
    ids = torch.tensor([8500, 5, 7], device=DEVICE)
    check(logits, ids)
    check(logits, ids, temperature=0.01)


def special_rows():
    """Rows of values that are not finite, each beside an ordinary one."""
    rows = {
        "some -inf": ({1: -INF, 4150: -INF}, 3),
        "target -inf": ({3: -INF}, 3),
        "only the target": ("only", 3),
        "all -inf": ("none", 3),
        "NaN": ({4100: NAN}, 3),
        "NaN target": ({3: NAN}, 3),
        "+inf": ({4100: INF}, 3),
        "+inf target": ({3: INF}, 3),
        "NaN among -inf": ("nan", 3),
    }
    logits = randn(2 * len(rows), 4200)
    for i, (values, _) in enumerate(rows.values()):
        row = logits[2 * i]
        if values == "only":
            row[:3], row[4:] = -INF, -INF
        elif values in ("none", "nan"):
            row.fill_(-INF)
            if values == "nan":
                row[4150] = NAN
        else:
            for column, value in values.items():
                row[column] = value
    return logits, torch.full((len(logits),), 3, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_special_values(dtype):
    logits, ids = special_rows()
    logp, entropy, grad = check(logits.to(dtype), ids)
    assert logp[2] == -INF and (grad[6] == 0).all()
    assert logp[4] == 0 and entropy[4] == 0 and logp[6] == -INF and entropy[6] == 0
    for row in (8, 10, 12, 14, 16):
        assert logp[row].isnan() and entropy[row].isnan() and grad[row].isnan().all()
    assert logp[1::2].isfinite().all()


def test_special_values_softcapped():
    logits, ids = special_rows()
    check(logits, ids, softcap=20.0)


def test_zero_upstream_rows_and_nan_rows():
    """No gradient asked of a row writes 0, of a broken row NaN; neither is read."""
    logits, ids = special_rows()
    zero = torch.zeros(len(ids), device=DEVICE)
    check(logits, ids, g=zero, h=zero)
    saved = OPS.token_logprobs_triton(logits, ids, None, None, 1.0, None, True)
    garbage = torch.full_like(logits, NAN)
    grad = OPS.token_logprobs_bwd_triton(zero, None, garbage, ids, None, None, 1.0, None, *saved)
    broken = saved[0].isnan()
    assert (grad[~broken] == 0).all() and grad[broken].isnan().all()


def test_masked_rows_are_not_read():
    logits = randn(4, 600)
    ids = randint(600, 4)
    mask = torch.tensor([1, 0, 1, 0], device=DEVICE).bool()
    temperature = torch.tensor([1.0, NAN, 0.5, -1.0], device=DEVICE)
    logits[1], logits[3] = NAN, INF
    # Followed as an address this id would end the process.
    ids[1], ids[3] = 2**50, -(2**50)
    logp, entropy, grad = check(logits, ids, mask=mask, temperature=temperature)
    assert (logp[1::2] == 0).all() and (entropy[1::2] == 0).all() and (grad[1::2] == 0).all()


@pytest.mark.parametrize("vocab", [10, 40000])
def test_ids_outside_the_row(vocab):
    """NaN for that row alone; nothing outside the row is read."""
    logits = randn(6, vocab)
    ids = torch.tensor([2, -1, 3, vocab, 2**50, -(2**50)], device=DEVICE)
    args = logits, ids, None, None, 1.0, None
    logp, entropy, state = OPS.token_logprobs_triton(*args, True)
    g = torch.ones(6, device=DEVICE)
    grad = OPS.token_logprobs_bwd_triton(g, g, *args, logp, entropy, state)
    outside = (ids < 0) | (ids >= vocab)
    assert torch.equal(logp.isnan(), outside)
    assert torch.equal(grad.isnan().all(-1), outside)
    assert torch.equal(grad.isnan().any(-1), outside)
    expected = OPS.token_logprobs_triton(
        logits, ids.where(~outside, 0), None, None, 1.0, None, True
    )
    assert torch.equal(logp[~outside], expected[0][~outside])
    # The entropy does not ask for the token; without one, the sum is in another order.
    bound = EPS * (4 * math.log(vocab) + 64)
    torch.testing.assert_close(entropy, expected[1], rtol=0, atol=bound)


def test_temperatures_that_are_none():
    logits, ids = randn(5, 50), randint(50, 5)
    temperature = torch.tensor([1.0, 0.0, -1.0, NAN, INF], device=DEVICE)
    logp, entropy, _ = OPS.token_logprobs_triton(logits, ids, None, temperature, 1.0, None, True)
    assert logp.isnan().tolist() == entropy.isnan().tolist() == [False, True, True, True, True]


# ---- independence ------------------------------------------------------------------------------


def test_same_bits_again_and_in_any_batch():
    for vocab in (77, 33001):
        logits, ids = randn(3, vocab, dtype=torch.bfloat16), randint(vocab, 3)
        g, h = randn(3), randn(3)
        first = run(logits, ids, g, h)
        for a, b in zip(first, run(logits, ids, g, h), strict=True):
            assert torch.equal(a, b)
        wide = torch.zeros(3, 2, vocab + 3, dtype=logits.dtype, device=DEVICE)
        wide[:, 1, 1 : vocab + 1] = logits
        elsewhere = wide[:, 1:, 1 : vocab + 1]
        moved = run(elsewhere, ids[:, None], g[:, None], h[:, None])
        for i in (0, 2):
            row = run(logits[i], ids[i], g[i], h[i])
            pair = run(logits[i : i + 1], ids[i : i + 1], g[i : i + 1], h[i : i + 1])
            for whole, one, two, three in zip(first, row, pair, moved, strict=True):
                assert torch.equal(whole[i], one)
                assert torch.equal(whole[i], two[0])
                assert torch.equal(whole[i], three[i, 0])


def test_offsets_beyond_32_bits():
    """Rows 2^31 elements apart; on a CPU the memory between them is never touched."""
    vocab, apart = 1000, 2**31 + 24
    try:
        memory = torch.empty(apart + vocab, dtype=torch.bfloat16, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"no address space for 4 GiB: {error}")
    logits = memory.as_strided((2, vocab), (apart, 1))
    values, ids = randn(2, vocab, dtype=torch.bfloat16), randint(vocab, 2)
    logits.copy_(values)
    g = torch.ones(2, device=DEVICE)
    saved = OPS.token_logprobs_triton(logits, ids, None, None, 1.0, None, True)
    expected = run(values, ids, g, g)
    OPS.token_logprobs_bwd_triton_(g, g, logits, ids, None, None, 1.0, None, *saved)
    assert torch.equal(saved[0], expected[0]) and torch.equal(logits, expected[2])


@on_gpu
def test_more_rows_than_a_second_grid_axis_holds():
    check(randn(70000, 40), randint(40, 70000))


# ---- autograd ----------------------------------------------------------------------------------


def test_opcheck(monkeypatch):
    monkeypatch.undo()  # opcheck looks at what new_empty itself does
    logits, ids = randn(1, 2, 20), randint(20, 1, 2)
    mask = torch.tensor([[1, 0]], device=DEVICE).bool()
    args = ids, mask, torch.rand(1, 2, device=DEVICE) + 0.5, 1.0, 10.0
    forward = OPS.token_logprobs_triton.default
    torch.library.opcheck(forward, (logits.clone().requires_grad_(), *args, True))
    torch.library.opcheck(forward, (logits, *args, False))
    saved = forward(logits, *args, True)
    grads = randn(1, 2), randn(1, 2)
    for op in (OPS.token_logprobs_bwd_triton.default, OPS.token_logprobs_bwd_triton_.default):
        torch.library.opcheck(op, (*grads, logits.clone(), *args, *saved))


def test_compiled_caller():
    """In one graph. The trace's own backend, as this is about the operator, not about Inductor."""
    logits, ids = randn(3, 50).requires_grad_(), randint(50, 3)

    def loss(x):
        out = rlkern.token_logprobs(x, ids, temperature=0.8, return_entropy=True)
        return (out.logprobs + 0.1 * out.entropy).sum()

    (expected,) = torch.autograd.grad(loss(logits), logits)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(logits), logits)
    assert torch.equal(grad, expected)


# ---- the scalar functions ----------------------------------------------------------------------


@triton.jit
def apply_kernel(x, y, n, function: tl.constexpr, parameter, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < n, other=0.0)
    if parameter is None:
        v = function(v)
    else:
        v = function(v, parameter)
    tl.store(y + i, v, mask=i < n)


def applied(function, x, parameter=None):
    x = x.to(DEVICE, torch.float32)
    y = torch.full_like(x, NAN)
    block = triton.next_power_of_2(len(x))
    apply_kernel[(1,)](x, y, len(x), function, parameter, BLOCK=block, enable_fp_fusion=False)
    return y.double().cpu()


def magnitudes(low, high, n=2000):
    return torch.logspace(math.log10(low), math.log10(high), n, dtype=torch.float64).float()


# Both are stated in their docstrings as below 5e-7 relative.
RELATIVE = 5e-7


def test_log1p():
    from rlkern.triton import _math

    x = torch.cat([torch.zeros(1), magnitudes(1e-30, 1e6), magnitudes(1e-8, 1.0)])
    y, expected = applied(_math.log1p, x), torch.log1p(x.double())
    torch.testing.assert_close(y, expected, rtol=RELATIVE, atol=0)
    assert applied(_math.log1p, torch.tensor([NAN, NAN])).isnan().all()


def test_expm1():
    from rlkern.triton import _math

    x = -torch.cat([torch.zeros(1), magnitudes(1e-30, 100), magnitudes(1e-8, 1.0)])
    y, expected = applied(_math.expm1, x), torch.expm1(x.double())
    torch.testing.assert_close(y, expected, rtol=RELATIVE, atol=0)
    special = applied(_math.expm1, torch.tensor([-INF, NAN]))
    assert special[0] == -1 and special[1].isnan()


def test_softcap():
    """Relative at both ends: tanh near 0, and 1 - tanh^2 where it is all but 0.

    An argument t = 2 |u| log2(e) is rounded three times, which moves e = 2^-t by t ln 2 3 eps / 2.
    """
    from rlkern.triton import _math

    cap = 30.0
    x = torch.cat([magnitudes(1e-20, 600), -magnitudes(1e-20, 600)])
    u = x.double() / cap
    y = applied(_math.softcapped, x, cap)
    torch.testing.assert_close(y, cap * torch.tanh(u), rtol=2 * RELATIVE, atol=0)
    slope = applied(_math.softcap_derivative, x, cap)
    expected = 1 / torch.cosh(u) ** 2
    bound = expected * (2 * RELATIVE + 3 * EPS * u.abs())
    assert ((slope - expected).abs() <= bound).all()
    ends = torch.tensor([-INF, INF])
    assert applied(_math.softcapped, ends, cap).tolist() == [-cap, cap]
    assert applied(_math.softcap_derivative, ends, cap).tolist() == [0, 0]
    assert applied(_math.softcapped, torch.tensor([NAN, NAN]), cap).isnan().all()

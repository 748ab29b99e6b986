"""kl_divergence against literal float64 lines.

Tolerances. A term of the sum is good to some ten roundings of 2^-24 and two exponentials of 1.3e-7
each, and so is a sum of terms of one sign: 1e-6. A logit's rounding by softcap and temperature,
|z| 2^-24, is one of t as well: at |z| = 20 and |t| of about 1, 2.4e-6. Together RTOL. The
normalisation's error, below 5e-7, is common to all t and enters squared: 5e-7^2 / 2 = FLOOR.
Gradients are judged in norm, where no common error is left.
"""

from __future__ import annotations

import pytest
import torch
from divergences import KINDS, literal
from torch.utils.checkpoint import checkpoint

import rlkern

RTOL, FLOOR = 4e-6, 1.3e-13
INF, NAN = float("inf"), float("nan")


def logits_pair(shape=(3, 17), vocab=211, apart=1.0, scale=3.0, dtype=torch.float32):
    logits = scale * torch.randn(*shape, vocab)
    ref = logits + apart * torch.randn(*shape, vocab)
    return logits.to(dtype).requires_grad_(), ref.to(dtype)


def results(function, logits, ref, upstream, **options):
    value = function(logits, ref, **options)
    (grad,) = torch.autograd.grad((value * upstream.to(value.dtype)).sum(), logits)
    return value.detach(), grad


def exact(logits, ref, upstream, **options):
    return results(literal, logits.detach().double().requires_grad_(), ref.double(), upstream,
                   **options)  # fmt: skip


def distance(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def check(logits, ref, upstream, rtol=RTOL, **options):
    value, grad = results(rlkern.kl_divergence, logits, ref, upstream, **options)
    expected, expected_grad = exact(logits, ref, upstream, **options)
    assert value.dtype == torch.float32 and grad.dtype == logits.dtype
    torch.testing.assert_close(value.double(), expected, rtol=rtol, atol=FLOOR)
    # One rounding more where the gradient is stored in 16 bits.
    assert distance(grad, expected_grad) <= rtol + torch.finfo(logits.dtype).eps / 2
    return value, grad


OPTIONS = [
    {},
    {"temperature": 0.7},
    {"softcap": 5.0},
    {"softcap": 5.0, "temperature": "per token"},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_float64(backend, kind, options, dtype):
    logits, ref = logits_pair(dtype=dtype)
    options = dict(options, mask=torch.rand(3, 17) < 0.7, divergence=kind)
    if options.get("temperature") == "per token":
        options["temperature"] = torch.rand(3, 1) + 0.5
    check(logits, ref, torch.randn(3, 17), **options)


@pytest.mark.parametrize("beta", [0.001, 0.01, 0.3, 0.9, 0.999])
def test_beta(backend, beta):
    """The smaller share, rounded to fp32 or taken off 1 there, is good to 2^-24 of 1, and so is
    what it leaves of m where the other distribution has nothing."""
    logits, ref = logits_pair(apart=3.0)
    rtol = RTOL + 2.0**-24 / min(beta, 1 - beta)
    check(logits, ref, torch.randn(3, 17), rtol, divergence="js", beta=beta)


@pytest.mark.parametrize("apart", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("kind", KINDS)
def test_nearly_equal_distributions(backend, kind, apart):
    """Where sum p (log p - log q) in fp32 would be all rounding."""
    logits, ref = logits_pair(apart=apart)
    check(logits, ref, torch.randn(3, 17), divergence=kind)
    equal, grad = results(
        rlkern.kl_divergence, logits, logits.detach(), torch.ones(3, 17), divergence=kind
    )
    assert (equal == 0).all() and (grad == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_far_distributions(backend, kind):
    """Differences of every size, up to where one of the two probabilities is 0."""
    logits, ref = logits_pair(apart=30.0, scale=20.0)
    # z - z_ref and the normalisation, about as large, are each rounded to 2^-24 of themselves; of a
    # term t + expm1(-t) with |t| of 1 that is twice as much.
    rtol = 4 * 2**-24 * (logits - ref).abs().max().item()
    check(logits, ref, torch.randn(3, 17), rtol, divergence=kind)


@pytest.mark.parametrize("vocab", [1, 2, 1023, 50257, 151936])
@pytest.mark.parametrize("kind", KINDS)
def test_vocabularies(backend, kind, vocab):
    logits, ref = logits_pair((2,), vocab)
    value, grad = check(logits, ref, torch.randn(2), divergence=kind)
    if vocab == 1:
        assert (value == 0).all() and (grad == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_large_logits(backend, kind):
    logits, ref = logits_pair(apart=10.0)
    check(logits, ref, torch.ones(3, 17), divergence=kind)
    # A shift of all logits that loses none of their bits changes nothing but the shift's rounding.
    coarse, ref = (x.detach().mul(64).round().div(64) for x in (logits, ref))
    for shift, ref_shift in ((1e4, 0.0), (0.0, 1e4), (-1e4, 1e4), (1e4, 1e4)):
        check((coarse + shift).requires_grad_(), ref + ref_shift, torch.ones(3, 17),
              divergence=kind)  # fmt: skip
    one_hot = torch.full((1, 5), -1e4).index_fill(1, torch.tensor([2]), 1e4)
    other = torch.full((1, 5), -1e4).index_fill(1, torch.tensor([3]), 1e4)
    far = rlkern.kl_divergence(one_hot, other, divergence=kind)
    assert far.item() == pytest.approx(2e4 if kind != "js" else 0.6931472, rel=1e-6)


def at_infinity(kind, logits, ref):
    logits = torch.tensor([logits]).requires_grad_()
    return results(
        rlkern.kl_divergence, logits, torch.tensor([ref]), torch.ones(1), divergence=kind
    )


def test_tokens_without_probability(backend):
    # p_j = 0 counts nothing in the KL, and its logit has no gradient.
    for kind in ("kl", "js"):
        value, grad = at_infinity(kind, [0.0, 1.0, -INF], [1.0, 0.0, 2.0])
        x = torch.tensor([[0.0, 1.0, -INF]]).double()
        expected = literal(x, torch.tensor([[1.0, 0.0, 2.0]]).double(), divergence=kind)
        torch.testing.assert_close(value.double(), expected, rtol=RTOL, atol=0)
        assert grad[0, 2] == 0 and grad.isfinite().all() and abs(grad.sum()) < 1e-6
    # Neither has it: as if it were not there.
    for kind in KINDS:
        with_it = at_infinity(kind, [0.0, 1.0, -INF], [1.0, 0.0, -INF])
        without = at_infinity(kind, [0.0, 1.0], [1.0, 0.0])
        torch.testing.assert_close(with_it[0], without[0])
        torch.testing.assert_close(with_it[1][:, :2], without[1])
        assert with_it[1][0, 2] == 0
    # q_j = 0 < p_j: an infinite KL without a gradient; in the reverse KL it counts nothing.
    value, grad = at_infinity("kl", [0.0, 1.0, 2.0], [1.0, 0.0, -INF])
    assert value.item() == INF and grad.isnan().all()
    value, grad = at_infinity("reverse_kl", [0.0, 1.0, 2.0], [1.0, 0.0, -INF])
    p, q = (torch.tensor([x]).softmax(-1) for x in ([0.0, 1.0, 2.0], [1.0, 0.0, -INF]))
    torch.testing.assert_close(grad, p - q)
    assert value.isfinite().all()
    value, grad = at_infinity("reverse_kl", [0.0, 1.0, -INF], [1.0, 0.0, 2.0])
    assert value.item() == INF and grad.isfinite().all() and grad[0, 2] == 0


def test_rows_without_a_distribution(backend):
    none, some = [-INF] * 3, [0.0, 1.0, 2.0]
    for kind, of_policy, of_ref in (
        ("kl", INF, 0.0),
        ("reverse_kl", 0.0, INF),
        ("js", 0.34657359, 0.34657359),
    ):
        assert at_infinity(kind, some, none)[0].item() == pytest.approx(of_policy)
        value, grad = at_infinity(kind, none, some)
        assert value.item() == pytest.approx(of_ref) and (grad == 0).all()
        value, grad = at_infinity(kind, none, none)
        assert value.item() == 0 and (grad == 0).all()
        grad = at_infinity(kind, some, none)[1]
        assert grad.isnan().all() if kind == "kl" else (grad == 0).all()


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_in_its_row(backend, kind, bad):
    logits, ref = logits_pair((4,), 50)
    clean = results(rlkern.kl_divergence, logits, ref, torch.ones(4), divergence=kind)
    for spoilt, row in ((logits, 1), (ref, 2)):
        with torch.no_grad():
            spoilt[row, 33] = bad
    value, grad = results(rlkern.kl_divergence, logits, ref, torch.zeros(4), divergence=kind)
    assert value[1:3].isnan().all() and grad[1:3].isnan().all()
    for row in (0, 3):
        assert value[row] == clean[0][row] and (grad[row] == 0).all()


def test_masked_positions_are_not_read(backend, poisoned):
    logits, ref = logits_pair()
    mask = torch.rand(3, 17) < 0.6
    upstream = torch.randn(3, 17)
    clean = results(rlkern.kl_divergence, logits, ref, upstream, mask=mask)
    dirty = logits.detach().masked_fill(~mask[..., None], NAN).requires_grad_()
    ref = ref.masked_fill(~mask[..., None], INF)
    poisoned(logits.numel() * 4, 3 * 17 * 4)
    found = results(
        rlkern.kl_divergence, dirty, ref, upstream.masked_fill(~mask, NAN), mask=mask.int()
    )
    assert all(torch.equal(a, b) for a, b in zip(clean, found, strict=True))
    assert (found[0][~mask] == 0).all() and (found[1][~mask] == 0).all()


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0), (2, 3, 4)], ids=str)
def test_shapes(backend, shape):
    logits, ref = logits_pair(shape, 50)
    value, _ = check(logits, ref, torch.randn(shape), temperature=torch.rand(shape) + 0.5)
    assert value.shape == shape


def test_strides_are_taken_as_they_come(backend):
    whole, ref = logits_pair((3, 9))
    upstream = torch.randn(3, 8)
    plain = results(
        rlkern.kl_divergence, whole.detach()[:, :-1].contiguous().requires_grad_(),
        ref[:, 1:].contiguous(), upstream,
    )  # fmt: skip
    value = rlkern.kl_divergence(whole[:, :-1], ref[:, 1:])
    (grad,) = torch.autograd.grad((value * upstream).sum(), whole)
    assert torch.equal(value, plain[0]) and torch.equal(grad[:, :-1], plain[1])
    columns = whole.detach().mT.contiguous().mT.requires_grad_()
    found = results(rlkern.kl_divergence, columns[:, :-1], ref[:, 1:], upstream)
    assert torch.equal(found[0], plain[0]) and torch.equal(found[1], plain[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_its_batch_and_repeats(backend, kind):
    logits, ref = logits_pair((40,), 1003, dtype=torch.bfloat16)
    upstream = torch.randn(40)
    whole = results(rlkern.kl_divergence, logits, ref, upstream, divergence=kind)
    again = results(rlkern.kl_divergence, logits, ref, upstream, divergence=kind)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    one = slice(7, 8)
    part = results(
        rlkern.kl_divergence, logits.detach()[one].requires_grad_(), ref[one], upstream[one],
        divergence=kind,
    )  # fmt: skip
    for a, b in zip(part, whole, strict=True):
        assert torch.equal(a, b[one])


@pytest.mark.parametrize("over", ["logits", "ref_logits", "another"])
def test_the_gradient_over_either_row(backend, over):
    from rlkern.ops._register import overload

    logits, ref = (x.detach() for x in logits_pair((9,)))
    arguments = (None, None, 0.8, 4.0, 0, 0.5)
    g = torch.randn(9)
    _, state = overload("vocab_divergence", backend)(logits, ref, *arguments)
    expected = overload("vocab_divergence_bwd", backend)(g, logits, ref, *arguments, state)
    grad = {"logits": logits, "ref_logits": ref, "another": torch.full_like(ref, NAN)}[over]
    overload("vocab_divergence_bwd_", backend)(g, grad, logits, ref, *arguments, state)
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    logits, ref = logits_pair((2, 3), 7, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])

    def function(x):
        return rlkern.kl_divergence(
            x, ref, divergence=kind, temperature=0.8, softcap=4.0, mask=mask
        )

    assert torch.autograd.gradcheck(function, (logits,))


@pytest.mark.parametrize("kind", range(3))
def test_opcheck(backend, kind):
    from rlkern.ops._register import overload

    logits, ref = logits_pair((2, 5), 30)
    arguments = (torch.rand(2, 5) < 0.7, torch.rand(2, 5) + 0.5, 1.0, 3.0, kind, 0.4)
    forward = overload("vocab_divergence", backend)
    torch.library.opcheck(forward, (logits, ref, *arguments))
    logits = logits.detach()
    _, state = forward(logits, ref, *arguments)
    given = (logits, ref, *arguments, state)
    g = torch.randn(2, 5)
    torch.library.opcheck(overload("vocab_divergence_bwd", backend), (g, *given))
    grad = torch.empty_like(logits)
    torch.library.opcheck(overload("vocab_divergence_bwd_", backend), (g, grad, *given))


def test_compiles(backend):
    logits, ref = logits_pair()
    upstream = torch.randn(3, 17)
    options = {"divergence": "js", "temperature": 0.8, "mask": torch.rand(3, 17) < 0.7}
    plain = results(rlkern.kl_divergence, logits, ref, upstream, **options)
    compiled = torch.compile(rlkern.kl_divergence, fullgraph=True, backend="aot_eager")
    again = results(compiled, logits, ref, upstream, **options)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_activation_checkpointing_and_autocast(backend):
    logits, ref = logits_pair()
    upstream = torch.randn(3, 17)
    plain = results(rlkern.kl_divergence, logits, ref, upstream)

    def inside(x, r):
        return checkpoint(rlkern.kl_divergence, x, r, use_reentrant=False)

    with torch.autocast("cpu", torch.bfloat16):
        again = results(inside, logits, ref, upstream)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_no_gradient_is_formed_where_none_is_needed(backend):
    logits, ref = logits_pair()
    assert not rlkern.kl_divergence(logits.detach(), ref).requires_grad
    with torch.no_grad():
        assert not rlkern.kl_divergence(logits, ref).requires_grad
        rlkern.kl_divergence(logits, logits)  # and then the reference may be anything


def test_second_derivatives_are_refused(backend):
    logits, ref = logits_pair()
    with pytest.raises(RuntimeError, match="first derivatives only"):
        (grad,) = torch.autograd.grad(
            rlkern.kl_divergence(logits, ref).sum(), logits, create_graph=True
        )
        grad.sum().backward()


X = torch.zeros(2, 3, 5)
REFUSED = [
    ({"logits": [0]}, TypeError, "logits: expected a torch.Tensor, got list"),
    ({"ref_logits": None}, TypeError, "ref_logits: expected a torch.Tensor, got NoneType"),
    ({"ref_logits": X[:1]}, ValueError, r"ref_logits: expected shape \[2, 3, 5\] .logits'., got"),
    ({"ref_logits": X.bfloat16()}, TypeError, "ref_logits: expected torch.float32 .logits' dtype"),
    ({"ref_logits": X.to("meta")}, ValueError, "ref_logits: expected device cpu .logits'., got"),
    ({"ref_logits": X.clone().requires_grad_()}, ValueError, "ref_logits: expected a tensor that"),
    ({"mask": X[..., 0]}, TypeError, "mask: expected bool"),
    ({"mask": X[:1, :, 0].bool()}, ValueError, r"mask: expected shape \[2, 3\]"),
    ({"divergence": "kll"}, ValueError, "divergence: expected one of kl.* did you mean 'kl'"),
    ({"divergence": 1}, TypeError, "divergence: expected a str, got int"),
    ({"beta": 1.0}, ValueError, "beta: expected a finite number of at least 0.001 and at most 0.9"),
    ({"beta": 0.3}, ValueError, "beta: expected its default, which 'kl' does not look at, got 0.3"),
    ({"beta": 1e-4}, ValueError, "beta: expected a finite number of at least 0.001"),
    ({"temperature": 0.0}, ValueError, "temperature: expected a positive"),
    ({"temperature": -X[..., 0] - 1}, ValueError, r"temperature: expected positive finite values"),
    ({"softcap": 0.0}, ValueError, "softcap: expected a positive"),
]


@pytest.mark.parametrize(
    ("change", "error", "message"), REFUSED, ids=[message[:40] for *_, message in REFUSED]
)
def test_refuses(change, error, message):
    with pytest.raises(error, match=message):
        rlkern.kl_divergence(**{"logits": X, "ref_logits": X} | change)


def test_the_operator_refuses_what_the_front_would(backend):
    if backend != "native":
        pytest.skip("the checks of the C++ operator")
    op = torch.ops.rlkern.vocab_divergence
    for ref, number, kind, beta, message in (
        (X[:, :2], 1.0, 0, 0.5, "ref_logits: expected rows"),
        (X.half(), 1.0, 0, 0.5, "ref_logits: expected rows"),
        (X, 0.0, 0, 0.5, "temperature: expected a positive"),
        (X, 1.0, 3, 0.5, "divergence: expected 0, 1 or 2, got 3"),
        (X, 1.0, 2, 1.0, "beta: expected a number between 0 and 1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(X, ref, None, None, number, None, kind, beta)

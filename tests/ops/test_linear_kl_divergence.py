"""linear_kl_divergence against literal float64 lines, and against kl_divergence of the logits.

Tolerances. A logit is a sum of D products, good to D 2^-24 of the sum of magnitudes in fp32: with
D = 24 and magnitudes of 10 in all 1e-5 at worst and 2e-6 in practice of it, the error of a t. A
term of the divergence changes by twice that relative to |t|, of about 1, and the rounding is not
common to all: RTOL in the norm of all results, for the gradients' sums over V or N as well.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from divergences import KINDS, literal
from torch.utils.checkpoint import checkpoint

import rlkern

V, D, REF_D = 211, 24, 40
RTOL = 1e-5
FEW = 64 * V * 8  # of both logits in fp32: several chunks below


def inputs(shape=(3, 70), dtype=torch.float32, vocab=V, bias=True):
    """hidden, weight, ref_hidden, ref_weight, of another hidden size; and the rest by name."""
    hidden = torch.randn(*shape, D).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, D) / 2).to(dtype).requires_grad_()
    ref_hidden = torch.randn(*shape, REF_D).to(dtype)
    ref_weight = (torch.randn(vocab, REF_D) / 3).to(dtype)
    given = {"mask": torch.rand(shape) < 0.7}
    if bias:
        given["bias"] = torch.randn(vocab).to(dtype).requires_grad_()
        given["ref_bias"] = torch.randn(vocab).to(dtype)
    return (hidden, weight, ref_hidden, ref_weight), given


def eager(hidden, weight, ref_hidden, ref_weight, *, bias=None, ref_bias=None, logit_scale=1.0,
          **given):  # fmt: skip
    policy = F.linear(hidden, weight, bias) * logit_scale
    return literal(policy, F.linear(ref_hidden, ref_weight, ref_bias) * logit_scale, **given)


def results(function, factors, given, upstream):
    """The divergence, and the gradients of hidden, weight and bias."""
    value = function(*factors, **given)
    wanted = [*factors[:2], *([given["bias"]] if "bias" in given else [])]
    grads = torch.autograd.grad((value * upstream.to(value.dtype)).sum(), wanted)
    return [value.detach(), *grads]


def truth(factors, given, upstream):
    def exact(x):
        return x.detach().double().requires_grad_(x.requires_grad)

    names = ("bias", "ref_bias")
    given = {name: exact(x) if name in names else x for name, x in given.items()}
    return results(eager, [exact(x) for x in factors], given, upstream)


def distance(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def ours(*factors, **given):
    return rlkern.linear_kl_divergence(*factors, **given)


OPTIONS = [
    {},
    {"temperature": 0.7, "logit_scale": 0.25},
    {"softcap": 3.0, "temperature": "per token", "logit_scale": 0.5},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("budget", [FEW, 1 << 30], ids=["chunks", "one chunk"])
def test_equals_float64(backend, kind, options, budget):
    factors, given = inputs()
    options = dict(options, divergence=kind)
    if options.get("temperature") == "per token":
        options["temperature"] = torch.rand(3, 1) + 0.5
    upstream = torch.randn(3, 70)
    expected = truth(factors, given | options, upstream)
    actual = results(ours, factors, given | options | {"memory_budget": budget}, upstream)
    for value, exact in zip(actual, expected, strict=True):
        assert value.dtype == torch.float32 and distance(value, exact) <= RTOL


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_worse_than_eager_in_its_dtype(backend, dtype):
    factors, given = inputs(dtype=dtype)
    upstream = torch.randn(3, 70)
    expected = truth(factors, given, upstream)

    def widened(*factors, **given):
        def wide(x):
            return x.float()

        hidden, weight, ref_hidden, ref_weight = factors
        policy = F.linear(hidden, weight, given["bias"])
        return literal(wide(policy), wide(F.linear(ref_hidden, ref_weight, given["ref_bias"])),
                       mask=given["mask"])  # fmt: skip

    theirs = results(widened, factors, given, upstream)
    actual = results(ours, factors, given | {"memory_budget": FEW // 2}, upstream)
    for mine, other, exact in zip(actual, theirs, expected, strict=True):
        # A quarter of the type's rounding on top: the parts of the weight's gradient are rounded
        # before they are added, eager's whole sum once.
        assert distance(mine, exact) <= distance(other, exact) + torch.finfo(dtype).eps / 4


@pytest.mark.parametrize("vocab", [1, 2, 50257])
def test_vocabularies(backend, vocab):
    factors, given = inputs((5,), vocab=vocab, bias=False)
    upstream = torch.randn(5)
    expected = truth(factors, given, upstream)
    for value, exact in zip(results(ours, factors, given, upstream), expected, strict=True):
        assert distance(value, exact) <= RTOL


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0), (65,), (2, 3, 4)], ids=str)
def test_shapes(backend, shape):
    factors, given = inputs(shape, bias=False)
    upstream = torch.randn(shape)
    expected = truth(factors, given, upstream)
    for value, exact in zip(results(ours, factors, given, upstream), expected, strict=True):
        assert value.shape == exact.shape and distance(value, exact) <= RTOL


def test_same_as_kl_divergence_of_the_logits(backend):
    (hidden, weight, ref_hidden, ref_weight), _ = inputs((40,), bias=False)
    with torch.no_grad():
        logits, ref = torch.mm(hidden, weight.t()), torch.mm(ref_hidden, ref_weight.t())
        expected = rlkern.kl_divergence(logits, ref, divergence="js")
        actual = ours(hidden, weight, ref_hidden, ref_weight, divergence="js")
    assert torch.equal(actual, expected)


def test_float64_and_gradcheck():
    factors, given = inputs((2, 5), dtype=torch.float64, vocab=13)
    options = {"temperature": 0.8, "softcap": 4.0, "logit_scale": 0.5, "mask": given["mask"]}

    def function(h, w, b):
        return ours(h, w, *factors[2:], bias=b, ref_bias=given["ref_bias"], **options)

    assert torch.autograd.gradcheck(function, (*factors[:2], given["bias"]))


def test_masked_tokens_cost_and_change_nothing(backend):
    (hidden, weight, ref_hidden, ref_weight), given = inputs(bias=False)
    mask, upstream = given["mask"], torch.randn(3, 70)
    clean = results(ours, (hidden, weight, ref_hidden, ref_weight), given, upstream)
    hidden, ref_hidden = (
        x.detach().masked_fill(~mask[..., None], float("nan")) for x in (hidden, ref_hidden)
    )
    dirty = (hidden.requires_grad_(), weight, ref_hidden, ref_weight)
    found = results(ours, dirty, given, upstream)
    assert all(torch.equal(a, b) for a, b in zip(clean, found, strict=True))
    assert (clean[0][~mask] == 0).all() and (clean[1][~mask] == 0).all()
    assert all((x == 0).all() for x in results(ours, dirty, {"mask": mask & False}, upstream))


def test_batch_invariant(backend):
    factors, _ = inputs((300,), vocab=1003, bias=False)
    options = {"batch_invariant": True, "memory_budget": 128 * 1003 * 8}

    def run(rows):
        hidden = factors[0].detach()[rows].requires_grad_()
        value = ours(hidden, factors[1], factors[2][rows], factors[3], **options)
        return value.detach(), torch.autograd.grad(value.sum(), hidden)[0]

    whole = run(slice(None))
    for rows in (slice(0, 1), slice(3, 67), slice(299, 300)):
        for part, of_whole in zip(run(rows), whole, strict=True):
            assert torch.equal(part, of_whole[rows])


def test_frozen_head_gets_no_gradient(backend):
    (hidden, weight, *reference), _ = inputs((70,), bias=False)
    upstream = torch.randn(70)
    both = results(ours, (hidden, weight, *reference), {}, upstream)
    value = ours(hidden, weight.detach(), *reference)
    (grad,) = torch.autograd.grad((value * upstream).sum(), hidden)
    assert torch.equal(grad, both[1])
    value = ours(hidden.detach(), weight, *reference)
    (grad,) = torch.autograd.grad((value * upstream).sum(), weight)
    assert torch.equal(grad, both[2])


def test_autocast(backend):
    factors, given = inputs()
    upstream = torch.randn(3, 70)
    with torch.autocast("cpu", torch.bfloat16):
        actual = results(ours, factors, given, upstream)
    half = {n: x if n == "mask" else x.bfloat16() for n, x in given.items()}
    expected = ours(*(x.bfloat16() for x in factors), **half)
    assert torch.equal(actual[0], expected) and actual[2].dtype == torch.float32


def test_checkpointing_compiling_and_repeating(backend):
    factors, given = inputs()
    upstream = torch.randn(3, 70)
    plain = results(ours, factors, given, upstream)

    def inside(*factors, **given):
        return checkpoint(ours, *factors, use_reentrant=False, **given)

    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for function in (ours, inside, compiled):
        again = results(function, factors, given, upstream)
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_opcheck(backend):
    factors, given = inputs((70,))
    policy = (*factors[:2], given["bias"])
    reference = (*factors[2:], given["ref_bias"])
    options = (given["mask"], None, 1.0, None, 2, 0.3)
    cut = (64, False, False, backend)
    operators = torch.ops.rlkern
    torch.library.opcheck(operators.linear_kl_divergence, (*policy, *reference, *options, *cut))
    policy = [x.detach() for x in policy]
    _, state = operators.linear_kl_divergence(*policy, *reference, *options, *cut)
    given = (torch.randn(70), *policy, *reference, *options, state, *cut, [True, True, False])
    torch.library.opcheck(operators.linear_kl_divergence_bwd, given)


def test_second_derivatives_are_refused():
    factors, _ = inputs((8,), bias=False)
    (grad,) = torch.autograd.grad(ours(*factors).sum(), factors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()


H, W = torch.zeros(2, 3, D), torch.zeros(V, D)
REFUSED = [
    ({"weight": W[:, :3]}, ValueError, rf"^weight: expected shape \[V, {D}\] .hidden's last"),
    ({"ref_hidden": [0]}, TypeError, "ref_hidden: expected a torch.Tensor, got list"),
    ({"ref_hidden": H[:1]}, ValueError, r"ref_hidden: expected shape \[2, 3, 'D'\]"),
    ({"ref_weight": W[:, :3]}, ValueError, rf"ref_weight: expected shape \[V, {D}\] .ref_hidden's"),
    ({"ref_weight": W[:-1]}, ValueError, f"ref_weight: expected {V} rows .weight's vocabulary"),
    ({"ref_weight": W.bfloat16()}, TypeError, "ref_weight: expected torch.float32 .ref_hidden's"),
    ({"ref_bias": W[:-1, 0]}, ValueError, rf"ref_bias: expected shape \[{V}\] .ref_weight's rows"),
    ({"ref_hidden": H.double(), "ref_weight": W.double()}, TypeError, "ref_hidden: expected torch"),
    ({"ref_weight": W.clone().requires_grad_()}, ValueError, "ref_weight: expected a tensor that"),
    ({"ref_hidden": H.clone().requires_grad_()}, ValueError, "ref_hidden: expected a tensor that"),
    ({"mask": H[:1, :, 0].bool()}, ValueError, r"mask: expected shape \[2, 3\]"),
    ({"divergence": "tv"}, ValueError, "divergence: expected one of kl, reverse_kl, js"),
    ({"logit_scale": 0}, ValueError, "logit_scale: expected a positive"),
    ({"memory_budget": 0}, ValueError, "memory_budget: expected at least 1 byte"),
    ({"batch_invariant": 1}, TypeError, "batch_invariant: expected a bool, got 1"),
]


@pytest.mark.parametrize(
    ("change", "error", "message"), REFUSED, ids=[message[:40] for *_, message in REFUSED]
)
def test_refuses(change, error, message):
    given = {"hidden": H, "weight": W, "ref_hidden": H, "ref_weight": W} | change
    with pytest.raises(error, match=message):
        rlkern.linear_kl_divergence(**given)

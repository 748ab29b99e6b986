"""vocab_divergence on a GPU: what no test without one can see."""

from __future__ import annotations

import gpu
import pytest
import torch

import rlkern
from rlkern.reference import vocab_divergence as reference

pytestmark = gpu.MARKS
KINDS = reference.DIVERGENCES
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RTOL = 1e-5  # as tests/cuda/test_divergence_emulated.py derives it


@pytest.fixture(autouse=True)
def native():
    with rlkern.use_backend("native"):
        yield


def pair(dtype, tokens, vocab):
    generator = torch.Generator("cuda").manual_seed(vocab)
    x, noise = torch.randn(2, *tokens, vocab, generator=generator, device="cuda")
    return (3 * x).to(dtype).requires_grad_(), (3 * x + noise).to(dtype)


def results(function, logits, ref, upstream, **options):
    value = function(logits, ref, **options)
    (grad,) = torch.autograd.grad((value * upstream.to(value.dtype)).sum(), logits)
    return value.detach(), grad


def exact(logits, ref, upstream, **options):
    with rlkern.use_backend("eager"):
        return results(
            rlkern.kl_divergence, logits.detach().double().requires_grad_(), ref.double(),
            upstream, **options,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 7, 1000, 50257, 151936])
@pytest.mark.parametrize("kind", KINDS)
def test_against_float64(kind, vocab, dtype):
    logits, ref = pair(dtype, (2, 3), vocab)
    upstream = torch.randn(2, 3, device="cuda")
    options = {"divergence": kind, "beta": 0.3, "softcap": 20.0 if vocab == 1000 else None}
    gpu.poison_freed_memory(6, 36, logits.numel())
    value, grad = results(rlkern.kl_divergence, logits, ref, upstream, **options)
    expected, slope = exact(logits, ref, upstream, **options)
    torch.testing.assert_close(value.double(), expected, rtol=RTOL, atol=5e-13)
    unit = torch.finfo(dtype).eps / 2
    assert (grad.double() - slope).norm() <= (RTOL + unit) * slope.norm()


@pytest.mark.parametrize("kind", range(3))
def test_the_gradient_over_either_row_and_repeats(kind):
    logits, ref = (x.detach() for x in pair(torch.bfloat16, (5,), 50257))
    g = torch.randn(5, device="cuda")
    arguments = (None, None, 0.8, 20.0, kind, 0.5)
    operators = torch.ops.rlkern
    value, state = operators.vocab_divergence(logits, ref, *arguments)
    assert torch.equal(value, operators.vocab_divergence(logits, ref, *arguments)[0])
    expected = operators.vocab_divergence_bwd(g, logits, ref, *arguments, state)
    for over in (0, 1):
        both = [logits.clone(), ref.clone()]
        operators.vocab_divergence_bwd_(g, both[over], *both, *arguments, state)
        assert torch.equal(both[over], expected)


def test_streams_waits_and_nothing():
    logits, ref = (x.detach() for x in pair(torch.float32, (3,), 1000))
    expected = rlkern.kl_divergence(logits, ref)
    assert torch.equal(gpu.on_another_stream((logits, ref), rlkern.kl_divergence), expected)
    leaf = logits.requires_grad_()
    gpu.assert_nothing_waits(lambda: rlkern.kl_divergence(leaf, ref).sum().backward())
    empty = torch.empty(0, 7, device="cuda", requires_grad=True)
    rlkern.kl_divergence(empty, empty.detach()).sum().backward()
    assert empty.grad.shape == (0, 7)


@pytest.mark.parametrize("preset", ["grpo", "gspo"])
def test_in_a_loss(preset):
    loss = rlkern.PolicyLoss.preset(preset, kl_coef=0.1, kl_estimator="exact")
    shape, vocab = (3, 7), 101
    hidden, weight = torch.randn(*shape, 12, device="cuda"), torch.randn(vocab, 12, device="cuda")
    ref = {
        "ref_hidden": torch.randn(*shape, 20, device="cuda"),
        "ref_weight": torch.randn(vocab, 20, device="cuda") / 3,
    }
    ids = torch.randint(vocab, shape, device="cuda")
    advantages = torch.tensor([1.0, -1.0, 0.0], device="cuda")
    found = []
    for dtype in (torch.float64, torch.float32):
        h, w = (x.to(dtype).requires_grad_() for x in (hidden.clone(), weight.clone()))
        with rlkern.use_backend("eager" if dtype == torch.float64 else "native"):
            out = loss.from_hidden(
                h, w, ids, advantages.to(dtype), **{n: x.to(dtype) for n, x in ref.items()}
            )
        found.append((out.loss.detach(), *torch.autograd.grad(out.loss, (h, w))))
    for a, b in zip(found[1], found[0], strict=True):
        assert (a.double() - b).norm() <= 1e-4 * b.norm()

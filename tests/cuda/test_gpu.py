"""The CUDA library on a GPU: what no test without one can see."""

from __future__ import annotations

import math

import gpu
import pytest
import torch

import rlkern
from rlkern._schema import operator_name
from rlkern.reference import token_logprobs as reference

pytestmark = gpu.MARKS

U = 2.0**-24
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True, params=["native"])
def backend(request):
    with rlkern.use_backend(request.param):
        yield request.param


# What a launch does around its kernel, which Triton's launches do too.
and_triton = pytest.mark.parametrize("backend", ["native", "triton"], indirect=True)


def inputs(dtype, tokens, vocab, spread=3.0):
    generator = torch.Generator("cuda").manual_seed(vocab)
    logits = torch.randn(*tokens, vocab, generator=generator, device="cuda") * spread
    ids = torch.randint(vocab, tokens, generator=generator, device="cuda")
    lift = torch.rand(*tokens, 1, generator=generator, device="cuda") * (math.log(vocab) + 10)
    return logits.scatter_add_(-1, ids[..., None], lift).to(dtype), ids


def operator(op, backend):
    return getattr(torch.ops.rlkern, operator_name(op, backend))


def forward(
    logits, ids, mask=None, token_temperature=None, temperature=1.0, softcap=None, backend="native"
):
    return operator("token_logprobs", backend)(
        logits, ids, mask, token_temperature, temperature, softcap, True
    )


def truth(logits, ids, temperature=1.0, softcap=None):
    n = ids.numel()
    return reference.forward(
        logits.double().reshape(n, -1),
        ids.reshape(n),
        torch.ones(n, dtype=torch.bool, device=logits.device),
        torch.full((n,), temperature, dtype=torch.float64, device=logits.device),
        softcap,
    )


def sum_bound(vocab, cap=0.0):
    """As tests/cuda/test_emulated.py derives it; ex2.approx and rcp.approx are within its 4 u."""
    return (5 * math.log(max(vocab, 2)) + 34 + 12 * cap) * U


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 7, 1000, 50257, 151936])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_against_float64(dtype, vocab, softcap):
    logits, ids = inputs(dtype, (2, 3), vocab)
    logprobs, entropy, state = forward(logits, ids, softcap=softcap)
    expected = truth(logits, ids, softcap=softcap)
    bound = sum_bound(vocab, softcap or 0.0)
    size = expected[0].abs()
    allowed = torch.where(size < 1e-2, 500 * U * size + vocab * 2.0**-126, bound + 4 * U * size)
    assert ((logprobs.flatten() - expected[0]).abs() <= allowed).all()
    assert ((entropy.flatten() - expected[1]).abs() <= bound * (1 + math.log(vocab))).all()

    g, h = torch.randn(2, 3, device="cuda"), torch.randn(2, 3, device="cuda")
    saved = (logits, ids, None, None, 1.0, softcap, logprobs, entropy, state)
    gradient = torch.ops.rlkern.token_logprobs_bwd(g, h, *saved)
    counts = torch.ones(6, dtype=torch.bool, device="cuda")
    ones = torch.ones(6, dtype=torch.float64, device="cuda")
    wanted = reference.backward(
        g.double().flatten(), h.double().flatten(), logits.double().reshape(6, -1),
        ids.flatten(), counts, ones, softcap, logprobs.double().flatten(),
        entropy.double().flatten(), state.double().reshape(6, 2),
    )  # fmt: skip
    # Rounding to the type, the bound on p (which reaches 1), and subnormal halves.
    unit = {torch.float32: U, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    scale = (g.abs() + h.abs() * (100 + math.log(vocab))).flatten()[:, None]
    allowed = unit * wanted.abs() + 2 * bound * scale + 2.0**-25
    assert ((gradient.reshape(6, -1) - wanted).abs() <= allowed).all()
    over = logits.clone()
    torch.ops.rlkern.token_logprobs_bwd_(g, h, over, *saved[1:])
    assert torch.equal(over, gradient)


def test_against_the_emulated_kernels(emulated):
    """The same code on a CPU: they may differ by the approximate instructions, and no more."""
    logits, ids = inputs(torch.bfloat16, (4,), 50257)
    mask = torch.tensor([True, False, True, True], device="cuda")
    ids[1] = -1
    logprobs, entropy, state = forward(logits, ids, mask)
    same = emulated.forward(logits.cpu(), ids.cpu(), mask.cpu())
    for a, b in zip((logprobs, entropy, state), same, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=8 * U, atol=sum_bound(50257) * 11)


def test_outputs_are_written_whatever_memory_held():
    """The caching allocator hands out what was freed: NaN."""
    logits, ids = inputs(torch.bfloat16, (64,), 40000)
    for _ in range(3):
        gpu.poison_freed_memory(64, 128, 64 * 3 * 3, logits.numel() // 2)
        out = forward(logits, ids)
        assert all(t.isfinite().all() for t in out)
        gradient = torch.ops.rlkern.token_logprobs_bwd(
            torch.ones(64, device="cuda"), None, logits, ids, None, None, 1.0, None, *out
        )
        assert gradient.isfinite().all()


def test_the_same_call_twice_and_a_row_alone():
    logits, ids = inputs(torch.bfloat16, (300,), 50257)
    first, again = forward(logits, ids), forward(logits, ids)
    alone = forward(logits[123:124].clone(), ids[123:124])
    for a, b, c in zip(first, again, alone, strict=True):
        assert torch.equal(a, b) and torch.equal(a[123:124], c)


@and_triton
def test_the_current_stream_is_used(backend):
    logits, ids = inputs(torch.bfloat16, (256,), 151936)
    expected = forward(logits, ids, backend=backend)[0]
    logprobs = gpu.on_another_stream([logits], lambda x: forward(x, ids, backend=backend)[0])
    assert torch.equal(logprobs, expected)


@and_triton
@gpu.needs_two_gpus
def test_the_tensors_device_is_used(backend):
    logits, ids = inputs(torch.bfloat16, (5,), 50257)
    expected = forward(logits, ids, backend=backend)
    assert torch.cuda.current_device() == 0
    found = forward(logits.to("cuda:1"), ids.to("cuda:1"), backend=backend)
    assert torch.cuda.current_device() == 0
    for a, b in zip(found, expected, strict=True):
        assert a.device.index == 1 and torch.equal(a.cpu(), b.cpu())


@and_triton
def test_nothing_waits_for_the_gpu(backend):
    logits, ids = inputs(torch.bfloat16, (8,), 50257)
    logits.requires_grad_()
    mask = torch.ones(8, dtype=torch.bool, device="cuda")

    def step():
        out = rlkern.token_logprobs(logits, ids, mask=mask, return_entropy=True)
        (out.logprobs.sum() + out.entropy.sum()).backward()

    gpu.assert_nothing_waits(step)


@and_triton
def test_graph_capture(backend):
    logits, ids = inputs(torch.bfloat16, (16,), 50257)
    static, g = logits.clone(), torch.randn(16, device="cuda")

    def step():
        out = forward(static, ids, backend=backend)
        operator("token_logprobs_bwd_", backend)(g, None, static, ids, None, None, 1.0, None, *out)
        return out[0]

    graph, captured = gpu.captured(step)
    other, _ = inputs(torch.bfloat16, (16,), 50257, spread=1.0)
    for values in (logits, other):
        static.copy_(values)
        graph.replay()
        out = forward(values, ids, backend=backend)
        expected = operator("token_logprobs_bwd", backend)(
            g, None, values, ids, None, None, 1.0, None, *out
        )
        assert torch.equal(captured, out[0]) and torch.equal(static, expected)


def test_more_than_two_to_the_31_elements():
    vocab, rows = 151936, 2**31 // 151936 + 64
    free, _ = torch.cuda.mem_get_info()
    need = 3 * rows * vocab * 2
    if free < need:
        pytest.skip(f"{need / 2**30:.0f} GiB of GPU memory are needed, {free / 2**30:.0f} are free")
    logits = torch.empty(rows, vocab, dtype=torch.bfloat16, device="cuda").normal_()
    ids = torch.randint(vocab, (rows,), device="cuda")
    out = forward(logits, ids)
    expected = truth(logits[-8:], ids[-8:])
    assert ((out[0][-8:] - expected[0]).abs() <= 1e-5).all()
    g = torch.ones(rows, device="cuda")
    last = logits[-8:].clone()
    torch.ops.rlkern.token_logprobs_bwd_(g, None, logits, ids, None, None, 1.0, None, *out)
    few = forward(last, ids[-8:])
    assert torch.equal(
        logits[-8:],
        torch.ops.rlkern.token_logprobs_bwd(
            g[-8:], None, last, ids[-8:], None, None, 1.0, None, *few
        ),
    )


def test_more_than_65535_rows_in_two_dimensions():
    logits, ids = inputs(torch.bfloat16, (2, 70001), 32)
    logprobs = forward(logits[:, :-1], ids[:, 1:])[0]
    expected = truth(logits[:, :-1], ids[:, 1:])[0].view(2, 70000)
    assert ((logprobs - expected).abs() <= sum_bound(32) + 4 * U * expected.abs()).all()


def test_in_place_backward_through_autograd():
    logits, ids = inputs(torch.bfloat16, (6,), 1000)
    leaf = logits.clone().requires_grad_()
    rlkern.token_logprobs(leaf, ids).sum().backward()
    source = logits.clone().requires_grad_()
    made = source * 1
    version = made._version
    rlkern.token_logprobs(made, ids, inplace_backward=True).sum().backward()
    assert torch.equal(source.grad, leaf.grad) and made._version > version


def test_opcheck():
    logits, ids = inputs(torch.bfloat16, (3,), 65)
    logits.requires_grad_()
    torch.library.opcheck(
        torch.ops.rlkern.token_logprobs.default, (logits, ids, None, None, 0.7, None, True)
    )


def test_compiles_whole():
    logits, ids = inputs(torch.bfloat16, (4,), 1000)

    def loss(logits):
        out = rlkern.token_logprobs(logits, ids, return_entropy=True)
        return (out.logprobs + 0.1 * out.entropy).sum()

    gpu.assert_compiles_whole(loss, logits)


def test_tensors_of_two_devices_are_refused():
    logits, ids = inputs(torch.bfloat16, (4,), 10)
    with pytest.raises(RuntimeError, match="token_ids"):
        forward(logits, ids.cpu())

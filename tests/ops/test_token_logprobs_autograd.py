"""token_logprobs inside PyTorch: opcheck, compile, autocast, checkpointing, in-place backward."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading

import pytest
import torch
import torch._dynamo.testing
from torch.utils.checkpoint import checkpoint

import rlkern
from rlkern._schema import operator_name


def example(dtype=torch.float32, vocab=70):
    logits = torch.randn(2, 3, vocab).to(dtype)
    return logits, torch.randint(vocab, (2, 3))


def operator(op, backend):
    return getattr(torch.ops.rlkern, operator_name(op, backend)).default


# ---- the operators --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("return_entropy", [False, True])
def test_opcheck_of_the_forward(backend, dtype, return_entropy):
    logits, ids = example(dtype)
    logits.requires_grad_()
    mask, t = torch.rand(2, 3) > 0.3, torch.rand(2, 3) + 0.5
    op = operator("token_logprobs", backend)
    torch.library.opcheck(op, (logits, ids, None, None, 1.0, None, return_entropy))
    torch.library.opcheck(op, (logits, ids, mask, t, 1.0, 20.0, return_entropy))


@pytest.mark.parametrize("which", ["token_logprobs_bwd", "token_logprobs_bwd_"])
def test_opcheck_of_the_backward(backend, which):
    logits, ids = example()
    mask, t = torch.rand(2, 3) > 0.3, torch.rand(2, 3) + 0.5
    args = (logits, ids, mask, t, 1.0, 20.0)
    saved = operator("token_logprobs", backend)(*args, True)
    g, h = torch.randn(2, 2, 3)
    for upstream in ((g, h), (g, None), (None, h)):
        torch.library.opcheck(operator(which, backend), (*upstream, *args, *saved))


def test_inplace_operator_gives_the_gradient_of_the_other(backend):
    logits, ids = example()
    args = (logits, ids, None, None, 0.7, None)
    saved = operator("token_logprobs", backend)(*args, False)
    g = torch.randn(2, 3)
    expected = operator("token_logprobs_bwd", backend)(g, None, *args, *saved)
    operator("token_logprobs_bwd_", backend)(g, None, *args, *saved)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("inplace_backward", [False, True])
def test_second_derivatives_raise(backend, inplace_backward):
    leaf, ids = example()
    leaf.requires_grad_()
    logits = leaf * 1
    out = rlkern.token_logprobs(logits, ids, inplace_backward=inplace_backward)
    with pytest.raises(RuntimeError, match="first derivatives"):
        (grad,) = torch.autograd.grad(out.sum(), leaf, create_graph=True)
        (grad.pow(2).sum() + leaf.sum()).backward()  # a gradient penalty


# ---- compile, autocast, checkpointing -------------------------------------------------------


def loss_of(hidden, weight, ids, **options):
    logits = hidden @ weight.t()
    out = rlkern.token_logprobs(logits, ids, return_entropy=True, **options)
    return (out.logprobs + 0.1 * out.entropy).sum()


def model(vocab=70, width=8):
    hidden = torch.randn(2, 3, width, requires_grad=True)
    weight = torch.randn(vocab, width, requires_grad=True)
    return hidden, weight, torch.randint(vocab, (2, 3))


def test_forward_mode_raises(backend):
    logits, ids = example()
    t = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="logits: .*backwards only"):
        torch.func.jvp(lambda x: rlkern.token_logprobs(x, ids), (logits,), (logits,))
    with pytest.raises(RuntimeError, match="temperature: .*backwards only"):
        torch.func.jvp(lambda x: rlkern.token_logprobs(logits, ids, temperature=x), (t,), (t,))


@pytest.mark.parametrize("inplace_backward", [False, True])
def test_compiles_without_a_graph_break(backend, inplace_backward):
    hidden, weight, ids = model()
    options = dict(
        mask=torch.tensor([[True, True, False], [True, False, True]]),
        temperature=torch.rand(2, 3) + 0.5,
        softcap=15.0,
        inplace_backward=inplace_backward,
    )
    torch._dynamo.reset()
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss_of(hidden, weight, ids, **options), [hidden, weight])
    actual = torch.autograd.grad(compiled(hidden, weight, ids, **options), [hidden, weight])
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_compiles_with_inductor_and_dynamic_shapes(backend):
    if backend == "eager":
        pytest.skip("the operators are opaque to inductor: one backend shows it")
    torch._dynamo.reset()
    compiled = torch.compile(loss_of, fullgraph=True, dynamic=True)
    for tokens in (3, 5):
        hidden = torch.randn(2, tokens, 8, requires_grad=True)
        weight = torch.randn(70, 8, requires_grad=True)
        ids = torch.randint(70, (2, tokens))
        expected = torch.autograd.grad(loss_of(hidden, weight, ids), [hidden, weight])
        actual = torch.autograd.grad(compiled(hidden, weight, ids), [hidden, weight])
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_ids_are_checked_inside_compiled_code(backend):
    torch._dynamo.reset()
    hidden, weight, ids = model()
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    compiled(hidden, weight, ids)
    ids[1, 2] = 70
    with pytest.raises((RuntimeError, ValueError), match=r"token_ids: expected values in \[0, 70"):
        compiled(hidden, weight, ids)


@pytest.mark.parametrize("inplace_backward", [False, True])
def test_autocast(backend, inplace_backward):
    hidden, weight, ids = model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(hidden, weight, ids, inplace_backward=inplace_backward)
    assert loss.dtype == torch.float32
    grads = torch.autograd.grad(loss, [hidden, weight])
    exact = torch.autograd.grad(loss_of(hidden, weight, ids), [hidden, weight])
    for a, b in zip(grads, exact, strict=True):
        # bfloat16 products of width 8 and vocabulary 70: a few of its ulps (2^-8) of the largest.
        assert (a - b).abs().max() <= 2.0**-5 * b.abs().max()


@pytest.mark.parametrize("inplace_backward", [False, True])
def test_activation_checkpointing(backend, inplace_backward):
    hidden, weight, ids = model()
    expected = torch.autograd.grad(loss_of(hidden, weight, ids), [hidden, weight])
    loss = checkpoint(
        loss_of, hidden, weight, ids, inplace_backward=inplace_backward, use_reentrant=False
    )
    for a, b in zip(torch.autograd.grad(loss, [hidden, weight]), expected, strict=True):
        assert torch.equal(a, b)


# ---- in place -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_inplace_backward_equals_the_other(backend, dtype):
    if dtype == torch.float64 and backend != "eager":
        pytest.skip("float64 runs in the reference")
    leaf, ids = example(dtype, vocab=1100)
    leaf.requires_grad_()
    mask = torch.tensor([[True, True, False], [True, False, True]])
    grads = []
    for inplace in (False, True):
        logits = leaf * 1
        memory = logits.data_ptr()
        out = rlkern.token_logprobs(
            logits, ids, mask=mask, return_entropy=True, inplace_backward=inplace
        )
        seen = []
        logits.register_hook(lambda grad, seen=seen: seen.append(grad.data_ptr()))
        grads += torch.autograd.grad((out.logprobs + 0.3 * out.entropy).sum(), leaf)
        assert (seen == [memory]) == inplace
    assert torch.equal(*grads)


def test_inplace_backward_into_strided_memory(backend):
    leaf = torch.randn(2, 5, 70, requires_grad=True)
    ids = torch.randint(70, (2, 4))
    grads = []
    for inplace in (False, True):
        logits = (leaf * 1)[:, :-1]
        out = rlkern.token_logprobs(logits, ids, inplace_backward=inplace)
        grads += torch.autograd.grad(out.sum(), leaf)
    assert torch.equal(*grads)


def test_inplace_backward_allocates_no_second_logits():
    leaf = torch.randn(64, 5000, requires_grad=True)
    ids = torch.randint(5000, (64,))
    with rlkern.use_backend("native"):
        logits = leaf * 1
        loss = rlkern.token_logprobs(logits, ids, inplace_backward=True).sum()
        with torch.autograd.profiler.profile(profile_memory=True) as prof:
            torch.autograd.grad(loss, logits)
    assert sum(max(e.cpu_memory_usage, 0) for e in prof.function_events) < logits.nbytes / 10


def test_inplace_backward_tells_autograd(backend):
    leaf, ids = example()
    leaf.requires_grad_()
    logits = leaf * 1
    squares = logits.pow(2)  # saves the logits
    loss = rlkern.token_logprobs(logits, ids, inplace_backward=True).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inplace_backward_is_refused_where_it_cannot_be_right(backend):
    leaf, ids = example()
    leaf.requires_grad_()
    refused = {
        "a leaf tensor": leaf,
        "a view of a leaf": leaf.view(2, 3, 70),
        "an expanded or overlapping tensor": (leaf * 1)[:1].expand(2, 3, 70),
        "overlapping": (leaf * 1).flatten().as_strided((2, 3, 70), (210, 35, 1)),
        "a tensor whose rows must be copied": (leaf * 1).mT.contiguous().mT,
    }
    for what, logits in refused.items():
        with pytest.raises(ValueError, match=f"inplace_backward=True: .*{what}"):
            rlkern.token_logprobs(logits, ids, inplace_backward=True)
        with torch.no_grad():  # nothing will be written
            rlkern.token_logprobs(logits, ids, inplace_backward=True)
    rlkern.token_logprobs(leaf.detach(), ids, inplace_backward=True)


# ---- choosing a backend -----------------------------------------------------------------------


def test_float64_runs_in_the_reference_and_a_kernel_asked_for_it_raises():
    logits, ids = example(torch.float64)
    assert rlkern.token_logprobs(logits, ids).dtype == torch.float64
    with rlkern.use_backend("native"), pytest.raises(RuntimeError, match="'native'.*float64"):
        rlkern.token_logprobs(logits, ids)


def test_a_backend_that_cannot_serve_raises(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    logits, ids = example()
    with rlkern.use_backend("triton"), pytest.raises(RuntimeError, match="'triton' was asked for"):
        rlkern.token_logprobs(logits, ids)
    with pytest.raises(ValueError, match="expected auto, native, triton, eager, got 'cuda'"):
        with rlkern.use_backend("cuda"):
            pass


@pytest.mark.parametrize(
    "native, triton, automatic",
    [(True, True, "native"), (False, True, "triton"), (False, False, "eager")],
)
def test_on_a_gpu_native_serves_where_built_and_triton_where_not(
    monkeypatch, native, triton, automatic
):
    from rlkern import _backend

    call = ("token_logprobs", "cuda", torch.bfloat16)
    monkeypatch.setitem(_backend._native_kernels, call[:2], native)
    monkeypatch.setattr(_backend, "_HAS_TRITON", triton)
    assert _backend.choose(*call) == automatic
    for name, serves in {"native": native, "triton": triton, "eager": True}.items():
        with rlkern.use_backend(name):
            if serves:
                assert _backend.choose(*call) == name
            else:
                with pytest.raises(RuntimeError, match=f"'{name}' was asked for"):
                    _backend.choose(*call)


def test_the_environment_chooses_a_backend():
    code = """
import sys, torch, rlkern
from rlkern import _backend
print(_backend.choose("token_logprobs", "cpu", torch.float32))
with rlkern.use_backend("eager"):
    print(_backend.choose("token_logprobs", "cpu", torch.float32))
"""

    def run(backend):
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        return subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env=env | {"RLKERN_BACKEND": backend},
        )

    assert run("eager").stdout.split() == ["eager", "eager"]
    done = run("triton")
    assert done.returncode != 0 and "'triton' was asked for, but cannot serve" in done.stderr
    assert "RLKERN_BACKEND: expected auto, native, triton, eager" in run("cuda").stderr


def test_use_backend_nests_and_restores():
    from rlkern import _backend

    def chosen():
        return _backend.choose("token_logprobs", "cpu", torch.float32)

    usual = chosen()
    with rlkern.use_backend("eager"):
        with rlkern.use_backend("native"):
            assert chosen() == "native"
        assert chosen() == "eager"
        with pytest.raises(KeyError), rlkern.use_backend("native"):
            raise KeyError
        assert chosen() == "eager"
        with rlkern.use_backend("auto"):
            assert chosen() == usual
    assert chosen() == usual


def test_overlapping_blocks_of_threads_leave_nothing_behind():
    """A enters, B enters, A leaves, B leaves: each takes away its own choice."""
    from rlkern import _backend

    def chosen():
        return _backend.choose("token_logprobs", "cpu", torch.float32)

    usual = chosen()
    turn = [threading.Event() for _ in range(3)]
    seen = {}

    def first():
        with rlkern.use_backend("eager"):
            turn[0].set()
            turn[1].wait(60)
            seen["the last entered holds in every thread"] = chosen()
        turn[2].set()

    thread = threading.Thread(target=first)
    thread.start()
    turn[0].wait(60)
    with rlkern.use_backend("native"):
        turn[1].set()
        turn[2].wait(60)
        seen["another's end changes nothing"] = chosen()
    thread.join()
    assert set(seen.values()) == {"native"} and len(seen) == 2
    assert chosen() == usual


def test_a_compiled_function_is_traced_once_per_backend():
    logits, ids = example()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(rlkern.token_logprobs, fullgraph=True, backend=counter)
    for names in ((), ("eager",), ("native",), ("eager",), ("native", "eager"), ("auto", "native")):
        with contextlib.ExitStack() as blocks:
            for name in names:
                blocks.enter_context(rlkern.use_backend(name))
            compiled(logits, ids)
    assert counter.frame_count == 3


def test_a_block_inside_a_compiled_function():
    from rlkern import _backend

    def inside(logits, ids):
        with rlkern.use_backend("eager"):
            return rlkern.token_logprobs(logits, ids)

    logits, ids = example()
    compiled = torch.compile(inside, fullgraph=True, backend="eager")
    assert torch.equal(compiled(logits, ids), inside(logits, ids))
    assert not _backend._blocks and _backend._chosen is None


def test_an_unknown_or_missing_instruction_set_is_an_error(monkeypatch):
    from rlkern import _native

    logits, ids = example()
    monkeypatch.setenv("RLKERN_CPU_ISA", "sse9")
    with pytest.raises(RuntimeError, match="RLKERN_CPU_ISA: expected auto, .*got 'sse9'"):
        rlkern.token_logprobs(logits, ids)
    for isa in {"avx512", "avx2"} - set(_native.cpu_isas()):
        monkeypatch.setenv("RLKERN_CPU_ISA", isa)
        with pytest.raises(RuntimeError, match=f"this machine has no {isa}"):
            rlkern.token_logprobs(logits, ids)

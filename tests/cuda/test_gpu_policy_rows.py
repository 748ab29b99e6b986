"""policy_rows and PolicyLoss.from_logits on a GPU: what no test without one can see."""

from __future__ import annotations

import math

import gpu
import pytest
import torch
from logit_checks import DTYPES, HALF_ULP, U

import rlkern
from rlkern import PolicyLoss
from rlkern.ops import policy_rows as operator
from rlkern.ops.policy_rows import RowArguments, TokenArguments

pytestmark = gpu.MARKS
LOSS = PolicyLoss.preset("grpo", kl_coef=0.1, entropy_coef=0.05)
# bf16: clusters of 1, 2, 4 and 8 where there are clusters; fp32: of 1, 4, 8 and 8, and two reads.
VOCABULARIES = [1, 7, 32000, 50257, 151936, 262144, 500001]


@pytest.fixture(autouse=True)
def native():
    with rlkern.use_backend("native"):
        yield


def batch(dtype, tokens, vocab, spread=3.0):
    """logits, ids, advantages and the arguments of a call."""
    g = torch.Generator("cuda").manual_seed(vocab)
    logits = torch.randn(*tokens, vocab, generator=g, device="cuda") * spread
    ids = torch.randint(vocab, tokens, generator=g, device="cuda")
    lift = torch.rand(*tokens, 1, generator=g, device="cuda") * (math.log(vocab) + 10)
    logits = logits.scatter_add_(-1, ids[..., None], lift).to(dtype)
    logprobs = logits.double().log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1).float()

    def near(spread):
        return logprobs + spread * torch.randn(tokens, generator=g, device="cuda")

    given = {"old_logprobs": near(0.3), "ref_logprobs": near(0.5)}
    given["mask"] = torch.rand(tokens, generator=g, device="cuda") < 0.8
    given["mask"][..., 0] = True
    advantages = torch.randn(tokens[:1], generator=g, device="cuda")
    return logits, ids, advantages, given


def rows_of(ids):
    """The operator's arguments behind the gradient, of flat tokens."""
    n = ids.numel()
    g = torch.Generator("cuda").manual_seed(n)

    def normal():
        return torch.randn(n, generator=g, device="cuda")

    rows = RowArguments(ids, None, None, 0.9, None)
    scales = torch.rand(n, 2, generator=g, device="cuda") + 0.5
    options = [*LOSS._token_sum_numbers, *[math.nan] * 3]
    tokens = TokenArguments(
        normal(), -normal().abs(), -normal().abs(), None, None, None, scales, options
    )
    return rows, tokens


def call(logits, grad, arguments):
    """logprobs, entropy, upstream."""
    rows, tokens = arguments
    return operator.run("native", logits, grad, rows, tokens, True)


def flat(dtype, n, vocab):
    logits, ids, *_ = batch(dtype, (n,), vocab)
    return logits, rows_of(ids)


def in_double(logits, ids, advantages, given, softcap):
    leaf = logits.double().requires_grad_()
    y = leaf if softcap is None else softcap * torch.tanh(leaf / softcap)
    log_p = (y / 0.8).log_softmax(-1)
    logprobs = log_p.gather(-1, ids[..., None]).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    double = {n: x.double() if x.is_floating_point() else x for n, x in given.items()}
    with rlkern.use_backend("eager"):
        out = LOSS(logprobs, advantages.double(), entropy=entropy, **double)
    of_logits, of_logprobs = torch.autograd.grad(out.loss, (leaf, logprobs))
    return out.loss.detach(), of_logits, of_logprobs.abs().max()


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64_and_in_place(dtype, vocab, softcap):
    logits, ids, advantages, given = batch(dtype, (2, 3), vocab)
    wanted, exact, upstream = in_double(logits, ids, advantages, given, softcap)
    found = []
    for inplace in (False, True):
        made = logits.clone().requires_grad_() * 1
        out = LOSS.from_logits(
            made, ids, advantages, temperature=0.8, softcap=softcap, inplace=inplace, **given
        )
        (gradient,) = torch.autograd.grad(out.loss, made)
        found.append((out.loss.detach(), gradient))
        assert (gradient.data_ptr() == made.data_ptr()) == inplace
    (loss, gradient), (_, over) = found
    assert torch.equal(gradient, over)
    bound = (5 * math.log(max(vocab, 2)) + 34 + 12 * (softcap or 0.0) / 0.8) * U
    assert (loss - wanted).abs() <= 64 * bound * (1 + wanted.abs())
    # The loss moves with the log-probability as r A does, |r A| < 32; the rest is 1 / temperature.
    allowed = HALF_ULP[dtype] * exact.abs() + 64 * bound * (upstream + 1e-3) + 2.0**-25
    assert ((gradient.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_alignment_and_strides(dtype):
    """Rows of an odd length cut from [B, T + 1, V] at every offset: the bits of an aligned copy."""
    dense, arguments = flat(dtype, 4, 40003)
    grad = torch.empty_like(dense)
    expected = (*call(dense, grad, arguments), grad)
    for offset in range(8):
        buffer = torch.full((5 * 40003 + 8,), torch.nan, dtype=dtype, device="cuda")
        rows = buffer[offset : offset + 5 * 40003].view(5, 40003)[:-1]
        rows.copy_(dense)
        out = torch.full_like(buffer, torch.nan)[8 - offset :][: 4 * 40003].view(4, 40003)
        for to in (out, rows):
            for a, b in zip((*call(rows, to, arguments), to), expected, strict=True):
                assert torch.equal(a, b)
        assert buffer[:offset].isnan().all() and buffer[offset + 4 * 40003 :].isnan().all()


@pytest.mark.skipif(
    not gpu.REASON and torch.cuda.get_device_capability()[0] not in (9, 10),
    reason="clusters are compiled for sm_90a and sm_100f",
)
def test_clusters_are_used_where_a_row_fits():
    from torch.profiler import ProfilerActivity, profile

    for dtype, vocab, kernel in (
        (torch.bfloat16, 151936, "policy_rows_cluster"),
        (torch.float32, 262144, "policy_rows_cluster"),
        (torch.float32, 500001, "policy_rows_two_reads"),
    ):
        logits, arguments = flat(dtype, 4, vocab)
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            call(logits, torch.empty_like(logits), arguments)
            torch.cuda.synchronize()
        names = [e.key for e in seen.key_averages() if "policy_rows" in e.key]
        assert len(names) == 1 and kernel in names[0], names


def test_against_the_emulated_kernels():
    """The same code on a CPU: they may differ by the approximate instructions, and no more."""
    from emulated_kernels import why_not
    from emulated_policy_rows import EmulatedPolicyRows, module

    if reason := why_not():
        pytest.skip(reason)
    logits, (rows, tokens) = flat(torch.bfloat16, 4, 50257)
    rows.token_ids[1] = -1
    out = torch.empty_like(logits)
    found = (*call(logits, out, (rows, tokens)), out)
    clusters = torch.cuda.get_device_capability()[0] in (9, 10)
    kernel = EmulatedPolicyRows(module(), 2 if clusters else 0)
    there = [x if not isinstance(x, torch.Tensor) else x.cpu() for x in (*rows, *tokens)]
    same = torch.empty_like(logits, device="cpu")
    expected = kernel.run(
        logits.cpu(), same, RowArguments(*there[:5]), TokenArguments(*there[5:]), True
    )
    for a, b in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=8 * U, atol=1e-4, equal_nan=True)
    torch.testing.assert_close(found[2].cpu(), expected[2], rtol=1e-3, atol=1e-4, equal_nan=True)
    torch.testing.assert_close(out.cpu(), same, rtol=2.0**-7, atol=1e-5, equal_nan=True)


def test_ids_outside_and_masked_rows():
    logits, (rows, tokens) = flat(torch.bfloat16, 5, 151936)
    right = torch.empty_like(logits)
    call(logits, right, (rows, tokens))
    rows = rows._replace(mask=torch.tensor([True, True, False, True, True], device="cuda"))
    rows.token_ids[1], rows.token_ids[2] = 2**62, -5
    logits[2] = torch.nan
    out = torch.empty_like(logits)
    logprobs, entropy, upstream = call(logits, out, (rows, tokens))
    assert logprobs[1].isnan() and out[1].isnan().all() and entropy[1].isfinite()
    for result in (logprobs, entropy, upstream, out):
        assert (result[2] == 0).all()
    kept = [0, 3, 4]
    assert torch.equal(out[kept], right[kept])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_upstream_gradient(dtype):
    """Is multiplied in on the GPU: in place, into a copy where the graph is kept, or not at all."""
    logits, ids, advantages, given = batch(dtype, (3, 2), 40003)
    found = {}
    for upstream in (1.0, -0.75):
        for inplace, kept in ((False, False), (False, True), (True, False)):
            made = logits.clone().requires_grad_() * 1
            loss = LOSS.from_logits(made, ids, advantages, inplace=inplace, **given).loss
            (gradient,) = torch.autograd.grad(upstream * loss, made, retain_graph=kept)
            if kept:
                (again,) = torch.autograd.grad(loss, made)
                assert torch.equal(again, found[1.0])
            assert torch.equal(gradient, found.setdefault(upstream, gradient))
    assert torch.equal(found[-0.75], found[1.0] * -0.75)


def test_outputs_are_written_whatever_memory_held():
    """The caching allocator hands out what was freed: NaN."""
    logits, arguments = flat(torch.bfloat16, 64, 40000)
    for _ in range(3):
        gpu.poison_freed_memory(64, 64, 128, logits.numel() // 2)
        grad = torch.empty_like(logits)
        assert all(x.isfinite().all() for x in (*call(logits, grad, arguments), grad))


def test_the_same_call_twice_and_a_row_alone():
    logits, (rows, tokens) = flat(torch.bfloat16, 300, 151936)
    results = []
    for _ in range(2):
        grad = torch.empty_like(logits)
        results.append((*call(logits, grad, (rows, tokens)), grad))
    one = slice(123, 124)
    alone = torch.empty_like(logits[one])
    few = call(
        logits[one].clone(), alone, (rows._replace(token_ids=rows.token_ids[one]), tokens.rows(one))
    )
    for a, b, c in zip(*results, (*few, alone), strict=True):
        assert torch.equal(a, b) and torch.equal(a[one], c)


def test_the_current_stream_is_used():
    logits, arguments = flat(torch.bfloat16, 256, 151936)
    grad = torch.empty_like(logits)
    expected = call(logits, grad, arguments)[0]
    found = gpu.on_another_stream([logits], lambda x: call(x, grad, arguments)[0])
    assert torch.equal(found, expected)


@gpu.needs_two_gpus
def test_the_tensors_device_is_used():
    logits, (rows, tokens) = flat(torch.bfloat16, 5, 50257)
    expected = call(logits, torch.empty_like(logits), (rows, tokens))
    there = [x if not isinstance(x, torch.Tensor) else x.to("cuda:1") for x in (*rows, *tokens)]
    moved = logits.to("cuda:1")
    arguments = RowArguments(*there[:5]), TokenArguments(*there[5:])
    found = call(moved, torch.empty_like(moved), arguments)
    assert torch.cuda.current_device() == 0
    for a, b in zip(found, expected, strict=True):
        assert a.device.index == 1 and torch.equal(a.cpu(), b.cpu())


def test_nothing_waits_for_the_gpu():
    logits, ids, advantages, given = batch(torch.bfloat16, (4, 2), 50257)
    leaf = logits.requires_grad_()

    def step():
        LOSS.from_logits(leaf * 1, ids, advantages, inplace=True, **given).loss.backward()

    gpu.assert_nothing_waits(step)


def test_graph_capture():
    logits, arguments = flat(torch.bfloat16, 16, 151936)
    static = logits.clone()
    graph, captured = gpu.captured(lambda: call(static, static, arguments))
    other = flat(torch.bfloat16, 16, 151936)[0] * 0.5
    for values in (logits, other):
        static.copy_(values)
        graph.replay()
        grad = torch.empty_like(values)
        expected = call(values, grad, arguments)
        for a, b in zip((*captured, static), (*expected, grad), strict=True):
            assert torch.equal(a, b)


def test_more_than_two_to_the_31_elements():
    vocab, n = 151936, 2**31 // 151936 + 64
    free, _ = torch.cuda.mem_get_info()
    need = 2 * n * vocab * 2
    if free < need:
        pytest.skip(f"{need / 2**30:.0f} GiB of GPU memory are needed, {free / 2**30:.0f} are free")
    logits = torch.empty(n, vocab, dtype=torch.bfloat16, device="cuda").normal_()
    ids = torch.randint(vocab, (n,), device="cuda")
    rows, tokens = rows_of(ids)
    last = slice(n - 8, n)
    few = logits[last].clone()
    expected = torch.empty_like(few)
    call(few, expected, (rows._replace(token_ids=ids[last].clone()), tokens.rows(last)))
    call(logits, logits, (rows, tokens))
    assert torch.equal(logits[last], expected)


def test_opcheck():
    logits, (rows, tokens) = flat(torch.bfloat16, 3, 65)
    torch.library.opcheck(
        torch.ops.rlkern.policy_rows.default,
        (logits, torch.empty_like(logits), *rows, *tokens, True),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compiles_whole():
    logits, ids, advantages, given = batch(torch.bfloat16, (2, 4), 1000)

    def run(x):
        return LOSS.from_logits(x, ids, advantages, **given).loss

    gpu.assert_compiles_whole(run, logits)


def test_tensors_of_two_devices_are_refused():
    logits, (rows, tokens) = flat(torch.bfloat16, 4, 10)
    grad = torch.empty_like(logits)
    for wrong in (
        (logits, grad.cpu(), rows, tokens),
        (logits, grad, rows._replace(token_ids=rows.token_ids.cpu()), tokens),
        (logits, grad, rows, tokens._replace(advantages=tokens.advantages.cpu())),
    ):
        with pytest.raises(RuntimeError, match="device"):
            call(wrong[0], wrong[1], wrong[2:])

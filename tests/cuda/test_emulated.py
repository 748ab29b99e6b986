"""The CUDA kernels' bodies, run on the CPU, against the reference in float64 (logit_checks.py)."""

from __future__ import annotations

import math

import pytest
import torch
from logit_checks import (
    DTYPES,
    Inputs,
    check_backward,
    check_forward,
    close,
    random_inputs,
    unreadable,
    upstream,
)

from rlkern.ops._checks import ELSEWHERE


def check(emulated, inputs, entropy=True, inplace=True):
    """Forward and both backwards of one set of inputs; returns all results."""
    results = emulated.forward(*inputs.args(), return_entropy=entropy)
    check_forward(inputs, results)
    g, h = upstream(inputs.ids.shape, entropy)
    if not entropy:
        results = (results[0], torch.zeros(inputs.ids.shape), results[2])
    gradient = emulated.backward(g, h, *inputs.args(), *results)
    check_backward(inputs, g, h, results, gradient)
    if inplace:
        over = inputs.logits.clone()
        args = (over, *inputs.args()[1:])
        emulated.backward(g, h, *args, *results, out=over)
        # Equal whatever the bits of a NaN.
        close(over, gradient, 0.0)
    return *results, gradient


# ---- shapes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 7, 8, 9, 31, 1000, 4099])
def test_small_vocabularies(emulated, dtype, vocab):
    check(emulated, random_inputs(dtype, (3,), vocab))
    check(
        emulated, random_inputs(dtype, (2, 2), vocab, softcap=5.0, temperature=0.7), entropy=False
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vocabularies_of_several_slices(emulated, dtype):
    assert emulated.module.plan(50257, 8)[0] == 2
    assert emulated.module.plan(151936, 8) == (5, 4096, 256)
    check(emulated, random_inputs(dtype, (2,), 50257), inplace=False)
    check(emulated, random_inputs(dtype, (1,), 151936, softcap=30.0), inplace=False)


@pytest.mark.parametrize("tokens", [(), (0,), (1,), (3,), (0, 4), (2, 3)])
def test_leading_shapes(emulated, tokens):
    check(emulated, random_inputs(torch.bfloat16, tokens, 50))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", range(8))
def test_every_alignment(emulated, dtype, offset):
    """A row at any element's address, in a buffer whose other elements are NaN; and the result of
    an aligned copy, bit by bit, since sums run over the same elements in the same order."""
    dense = random_inputs(dtype, (2, 2), 1003)
    stride = 1003 + 8 + offset
    buffer = torch.full((2 * 2 * stride + offset + 2000,), torch.nan, dtype=dtype)
    rows = buffer.as_strided((2, 2, 1003), (2 * stride, stride, 1), offset)
    rows.copy_(dense.logits)
    inputs = Inputs(rows, dense.ids)
    *results, gradient = check(emulated, inputs, inplace=False)
    *same, same_gradient = check(emulated, dense, inplace=False)
    for a, b in zip((*results, gradient), (*same, same_gradient), strict=True):
        assert torch.equal(a, b)
    before = buffer.clone()
    g, h = upstream((2, 2))
    emulated.backward(g, h, *inputs.args(), *results, out=rows)
    assert torch.equal(rows, gradient)
    rows.copy_(dense.logits)
    assert torch.equal(buffer.isnan(), before.isnan()), "written outside the rows"


def test_sliced_sequences(emulated):
    """logits[:, :-1] of [B, T + 1, V], where source and gradient are aligned differently."""
    for vocab in (1001, 1003):
        whole = random_inputs(torch.bfloat16, (3, 5), vocab)
        view = Inputs(whole.logits[:, :-1], whole.ids[:, 1:])
        dense = Inputs(view.logits.contiguous(), view.ids)
        for a, b in zip(check(emulated, view, inplace=False), check(emulated, dense), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1003, 33001])
def test_nothing_before_a_row_is_read(emulated, dtype, vocab):
    """The first vector of a gradient aligned otherwise than the logits begins some elements into
    the row, and the 16-byte boundary below those elements may lie before the row."""
    dense = random_inputs(dtype, (1,), vocab)
    half = 8 // dense.logits.element_size()  # elements from a boundary to the row
    buffer = torch.full((vocab + 64,), torch.nan, dtype=dtype)
    assert buffer.data_ptr() % 16 == 0
    row = buffer[half : half + vocab].view(1, vocab)
    row.copy_(dense.logits)
    inputs = Inputs(row, dense.ids)
    results = emulated.forward(*dense.args())
    g, h = upstream((1,))
    expected = emulated.backward(g, h, *dense.args(), *results)
    for head in range(1, 2 * half):
        out = torch.empty(vocab + 64, dtype=dtype)[2 * half - head :][:vocab].view(1, vocab)
        with unreadable(buffer[:half]):
            assert torch.equal(expected, emulated.backward(g, h, *inputs.args(), *results, out=out))
    with unreadable(buffer[:half]):
        assert all(map(torch.equal, emulated.forward(*inputs.args()), results))


def test_one_row_for_all(emulated):
    inputs = random_inputs(torch.float32, (1,), 77)
    row = Inputs(inputs.logits.expand(4, 77), torch.arange(4))
    check(emulated, row, inplace=False)


def test_several_grids(emulated):
    """More blocks than one grid may have, with the limit set to two."""
    inputs = random_inputs(torch.bfloat16, (3,), 33000)
    results = emulated.forward(*inputs.args())
    again = emulated.forward(*inputs.args(), max_blocks=2)
    for a, b in zip(results, again, strict=True):
        assert torch.equal(a, b)
    g, h = upstream((3,))
    gradient = emulated.backward(g, h, *inputs.args(), *results)
    assert torch.equal(gradient, emulated.backward(g, h, *inputs.args(), *results, max_blocks=3))


def test_offsets_beyond_32_bits(emulated):
    """Rows 2^31 elements apart; the memory between them is never touched."""
    dense = random_inputs(torch.bfloat16, (2,), 1000)
    apart = 2**31 + 24
    try:
        memory = torch.empty(apart + 1000, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"no address space for 4 GiB: {error}")
    rows = memory.as_strided((2, 1000), (apart, 1))
    rows.copy_(dense.logits)
    inputs = Inputs(rows, dense.ids)
    *results, gradient = check(emulated, inputs, inplace=False)
    g, h = upstream((2,))
    emulated.backward(g, h, *inputs.args(), *results, out=rows)
    assert torch.equal(rows, gradient)


def test_a_row_does_not_depend_on_the_batch(emulated):
    for vocab in (131, 33333):
        inputs = random_inputs(torch.bfloat16, (4,), vocab)
        *results, gradient = check(emulated, inputs, inplace=False)
        alone = Inputs(inputs.logits[2:3], inputs.ids[2:3])
        one = emulated.forward(*alone.args())
        for a, b in zip(results, one, strict=True):
            assert torch.equal(a[2:3], b)
        g, h = upstream((4,))
        assert torch.equal(gradient[2:3], emulated.backward(g[2:3], h[2:3], *alone.args(), *one))


def test_the_same_call_twice_is_the_same(emulated):
    inputs = random_inputs(torch.float16, (1,), 40000, softcap=20.0)
    for a, b in zip(check(emulated, inputs), check(emulated, inputs), strict=True):
        assert torch.equal(a, b)


# ---- arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [130, 40000])
def test_masked_rows_are_not_read(emulated, dtype, vocab):
    inputs = random_inputs(dtype, (5,), vocab)
    inputs.mask = torch.tensor([True, False, True, False, True])
    inputs.token_temperature = torch.tensor([0.5, torch.nan, 1.0, -1.0, 3.0])
    inputs.logits[1] = torch.nan
    inputs.logits[3, ::2] = torch.inf
    inputs.ids[1], inputs.ids[3] = -100, vocab + 7
    logprobs, entropy, state, gradient = check(emulated, inputs)
    for result in (logprobs, entropy, state, gradient):
        assert (result[1] == 0).all() and (result[3] == 0).all()


def test_strided_token_arguments(emulated):
    inputs = random_inputs(torch.float32, (3, 4), 60)
    inputs.mask = torch.rand(4, 3).gt(0.4).t()
    inputs.token_temperature = torch.rand(3, 8)[:, ::2] + 0.3
    inputs.ids = torch.stack([inputs.ids, inputs.ids], -1)[..., 0]
    check(emulated, inputs)


def test_upstream_gradients_are_read_by_stride(emulated):
    inputs = random_inputs(torch.bfloat16, (2, 3), 40)
    results = emulated.forward(*inputs.args())
    g, h = torch.tensor(0.5).expand(2, 3), torch.rand(3, 2).t()
    gradient = emulated.backward(g, h, *inputs.args(), *results)
    check_backward(inputs, g, h, results, gradient)
    only_entropy = emulated.backward(None, h, *inputs.args(), *results)
    check_backward(inputs, None, h, results, only_entropy)


def test_rows_without_upstream_are_zeroed_unread(emulated):
    inputs = random_inputs(torch.bfloat16, (3,), 300)
    results = emulated.forward(*inputs.args())
    # Read, they would show: the forward saw other logits.
    inputs.logits[1] = torch.nan
    g = torch.tensor([1.0, 0.0, -2.0])
    gradient = emulated.backward(g, torch.zeros(3), *inputs.args(), *results)
    assert (gradient[1] == 0).all() and gradient[0].isfinite().all() and gradient[2].any()


@pytest.mark.parametrize(
    "temperature, vocab",
    [(0.0, 20), (-1.0, 20), (torch.nan, 20), (torch.inf, 20), (0.0, 40000)],
)
def test_a_temperature_that_is_not_positive_gives_nan(emulated, temperature, vocab):
    inputs = random_inputs(torch.bfloat16, (3,), vocab)
    inputs.token_temperature = torch.tensor([1.0, temperature, 2.0])
    logprobs, entropy, state = emulated.forward(*inputs.args())
    g, h = upstream((3,))
    gradient = emulated.backward(g, h, *inputs.args(), logprobs, entropy, state)
    for result in (logprobs, entropy, gradient):
        assert result[1].isnan().all() and result[::2].isfinite().all()


@pytest.mark.parametrize(
    "offence, vocab", [(-1, 20), (20, 20), (-(2**62), 20), (2**62, 20), (-1, 40000), (40000, 40000)]
)
def test_an_id_outside_gives_nan_in_its_row(emulated, offence, vocab):
    inputs = random_inputs(torch.bfloat16, (3,), vocab)
    inputs.ids[1] = offence
    *_, gradient = check(emulated, inputs)
    logprobs = emulated.forward(*inputs.args())[0]
    assert logprobs[1].isnan() and gradient[1].isnan().all()
    assert logprobs[::2].isfinite().all() and gradient[::2].isfinite().all()


@pytest.mark.parametrize("vocab", [20, 40000])
def test_a_token_of_other_columns_leaves_the_gradient_of_the_others(emulated, vocab):
    """As of a vocabulary spread over processes: the log-probability comes from elsewhere."""
    inputs = random_inputs(torch.bfloat16, (3,), vocab, softcap=8.0)
    inputs.ids[1] = ELSEWHERE
    logprobs, entropy, state = emulated.forward(*inputs.args())
    assert logprobs.isnan().tolist() == [False, True, False]
    results = (logprobs.nan_to_num(-1.5), entropy, state)
    g, h = upstream((3,))
    gradient = emulated.backward(g, h, *inputs.args(), *results)
    check_backward(inputs, g, h, results, gradient)
    assert gradient[1].isfinite().all()


# ---- extreme values ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_margin_of_17_nats(emulated, dtype):
    """One competitor 17 nats below the answer: -4.1e-8, where z - logsumexp would give 0."""
    logits = torch.full((3, 1000), -torch.inf, dtype=dtype)
    logits[:, 3], logits[:, 900] = 25.0, 8.0
    inputs = Inputs(logits, torch.tensor([3, 900, 3]))
    logprobs, *_, gradient = check(emulated, inputs)
    assert logprobs[0].item() == pytest.approx(-math.log1p(math.exp(-17)), rel=1e-5)
    check(emulated, Inputs(logits, inputs.ids, softcap=1e4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [100, 40000])
def test_large_logits(emulated, dtype, vocab):
    inputs = random_inputs(dtype, (4,), vocab)
    inputs.logits[0] += 1e4
    inputs.logits[1] -= 1e4
    inputs.logits[2, ::2] = 1e4
    inputs.logits[3, 5] = 1e4
    inputs.ids[3] = 5
    check(emulated, inputs)
    if vocab > 100:
        return  # slices change nothing about what follows
    check(emulated, Inputs(inputs.logits, inputs.ids, temperature=0.01))
    check(emulated, Inputs(inputs.logits, inputs.ids, softcap=50.0))


@pytest.mark.parametrize("softcap", [None, 10.0])
@pytest.mark.parametrize("vocab", [24, 40000])
def test_tokens_that_cannot_be_drawn(emulated, softcap, vocab):
    inputs = random_inputs(torch.bfloat16, (5,), vocab, softcap=softcap)
    inputs.logits[0, 1::2] = -torch.inf
    inputs.logits[1] = -torch.inf  # none can
    inputs.logits[2, inputs.ids[2]] = -torch.inf  # the chosen one cannot
    inputs.logits[3] = -torch.inf
    inputs.logits[3, inputs.ids[3]] = 2.0  # nothing but the chosen one
    inputs.logits[4] = -torch.inf
    inputs.logits[4, (inputs.ids[4] + 1) % vocab] = 2.0  # nothing but another
    logprobs, entropy, _, gradient = check(emulated, inputs)
    if softcap is None:
        assert logprobs[1:].tolist() == [-math.inf, -math.inf, 0.0, -math.inf]
        assert entropy[1] == 0 and (gradient[1] == 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["target", "other", "other_beside_minus_infinity"])
@pytest.mark.parametrize("vocab", [24, 33000])
def test_a_logit_that_is_no_number_shows(emulated, value, where, vocab):
    inputs = random_inputs(torch.bfloat16, (3,), vocab)
    if where == "other_beside_minus_infinity":
        inputs.logits[1] = -torch.inf
    at = inputs.ids[1] if where == "target" else (inputs.ids[1] + vocab // 2) % vocab
    inputs.logits[1, at] = value
    logprobs, entropy, state = emulated.forward(*inputs.args())
    g, h = upstream((3,))
    gradient = emulated.backward(g, h, *inputs.args(), logprobs, entropy, state)
    for result in (logprobs, entropy, gradient):
        assert result[1].isnan().all() and result[::2].isfinite().all()

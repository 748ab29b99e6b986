"""The CUDA kernels of masked_moments and whiten, run on the CPU, against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from emulated_advantages import emulated_advantages
from emulated_kernels import poisoned, why_not

from rlkern.reference.whiten import WhitenOptions, masked_moments, whiten

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())
U = 2.0**-24
SIZES = (1, 2, 3, 5, 16, 1000, 4096, 4097, 9001)  # a block takes 4096 values


@pytest.fixture(scope="module")
def built():
    return emulated_advantages()


@pytest.fixture
def kernels(built):
    built.finish_threads = 32
    built.max_blocks = 2**31 - 1
    return built


def values(size, seed=0, shift=0):
    """At an address that is `shift` floats beyond a multiple of 16 bytes."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(size + shift, generator=g)[shift:]
    mask = (torch.rand(size + shift, generator=g) < 0.7)[shift:]
    mask[:2] = True
    return x, mask


def check(kernels, x, mask, options=None):
    """The mean is off by a few 2^-53 of the largest value for each of the twenty joins that a value
    goes through, a deviation by as much and a square by twice that times the deviation. The rest is
    the rounding to fp32, of the value and of a mean that is added back."""
    options = options or WhitenOptions()
    exact = masked_moments(x.double(), mask)
    wanted = whiten(x.double(), mask, exact, options)
    dirty = x if mask is None else x.masked_fill(~mask, float("nan"))
    if mask is not None and x.data_ptr() % 16:
        dirty = torch.cat([torch.zeros(1), dirty])[1:]  # at an odd address as x is
    moments = kernels.masked_moments(dirty, mask)
    counting = (x if mask is None else x[mask]).double()
    off = 40 * 2.0**-53 * float(counting.abs().max())
    squares = 2 * off * float((counting - exact[1]).abs().sum()) + 1e-13 * float(exact[2])
    assert moments[0] == exact[0] and abs(moments[1] - exact[1]) <= off
    assert abs(moments[2] - exact[2]) <= squares
    found = kernels.whiten(dirty, mask, moments, options.numbers())
    torch.testing.assert_close(found.double(), wanted, rtol=2 * U, atol=1e-11, equal_nan=True)
    return moments, found


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("size", SIZES)
def test_sizes_and_alignments(kernels, size, masked, shift):
    x, mask = values(size, shift=shift)
    check(kernels, x, mask if masked else None)


@pytest.mark.parametrize("mode", ["add", "clamp"])
def test_every_option(kernels, mode):
    x, mask = values(700)
    for shift_mean, scale, unbiased in itertools.product((True, False), repeat=3):
        if not shift_mean and not scale:
            continue
        check(kernels, 3 + x, mask, WhitenOptions(shift_mean, scale, unbiased, 1e-3, mode))


def test_a_mean_that_is_large_beside_the_spread(kernels):
    """1e6 + {0, 1}: a variance from sums of squares would have lost it in fp32."""
    x = 1e6 + torch.randint(0, 2, (5000,)).float()
    check(kernels, x, None)
    moments, found = check(kernels, torch.full((5000,), 0.1), None)
    assert moments[2] == 0 and not found.any()


def test_outputs_at_another_alignment(kernels):
    x, mask = values(1003)
    moments, wanted = check(kernels, x, mask)
    for shift in (1, 2, 3):
        out = poisoned(1003 + shift + 1)
        kernels.whiten(x, mask, moments, WhitenOptions().numbers(), out[shift:-1])
        assert torch.equal(out[shift:-1], wanted)
        assert out[:shift].isnan().all() and out[-1].isnan()


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_values(kernels, count):
    """What the caller refuses where it can look at them: NaN, and 0 where masked."""
    x, mask = torch.randn(10), torch.arange(10) < count
    moments = kernels.masked_moments(x, mask)
    assert moments.tolist() == [count, float(x[0]) if count else 0.0, 0.0]
    found = kernels.whiten(x, mask, moments, WhitenOptions().numbers())
    assert found[:count].isnan().all() and not found[count:].any()
    empty = torch.empty(0)
    assert kernels.masked_moments(empty, None).tolist() == [0.0, 0.0, 0.0]
    assert kernels.whiten(empty, None, moments, WhitenOptions().numbers()).shape == (0,)


def test_bits_do_not_depend_on_grids(kernels):
    """One part per block, joined by one thread each or by few."""
    x, mask = values(5 * kernels.module.BLOCK_VALUES + 7)
    first = kernels.masked_moments(x, mask)
    white = kernels.whiten(x, mask, first, WhitenOptions().numbers())
    for blocks in (1, 2):
        kernels.max_blocks = blocks
        assert torch.equal(first, kernels.masked_moments(x, mask))
        assert torch.equal(white, kernels.whiten(x, mask, first, WhitenOptions().numbers()))


def test_more_blocks_than_threads_that_join_them(kernels):
    kernels.finish_threads = 32
    x, mask = values(40 * kernels.module.BLOCK_VALUES, seed=1)
    check(kernels, x, mask)

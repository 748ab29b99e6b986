"""The CUDA kernels of gae, discounted_returns, vtrace and the backward, run on the CPU, against the
loop over time in float64.

They compute in float64 too, so results differ by the rounding to fp32, 2^-24, and by what float64
does to T terms in another order: T 2^-52 of the sum of their sizes.
"""

from __future__ import annotations

import pytest
import torch
from advantage_batches import (
    KINDS,
    LENGTHS,
    close,
    in_double,
    numbers,
    options_of,
    scan_batch,
    terms_of,
    with_garbage,
)
from emulated_advantages import emulated_advantages
from emulated_kernels import why_not

from rlkern.reference.return_scan import ScanBatch, return_scan

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())


@pytest.fixture(scope="module")
def built():
    return emulated_advantages()


@pytest.fixture
def kernels(built):
    built.scan_threads = 0
    built.max_blocks = 2**31 - 1
    return built


def check(kernels, batch, options):
    exact = return_scan(in_double(batch), options)
    if batch.mask is not None:
        batch = with_garbage(batch, float("nan"))
    found = kernels.return_scan(*batch, numbers(options))
    for a, b in zip(found, exact, strict=True):
        close(a, b, terms_of(batch))
    return found


@pytest.mark.parametrize("plain", [False, True], ids=["everything", "plain"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("breaks", [False, True], ids=["carry", "break"])
@pytest.mark.parametrize("kind", KINDS)
def test_return_scan(kernels, kind, breaks, packed, plain):
    kernels.scan_threads = 32  # three tiles
    check(kernels, scan_batch(kind, packed=packed, plain=plain), options_of(kind, breaks))


@pytest.mark.parametrize("mode", ["carry", "break"])
def test_masks_within_a_sequence(kernels, mode):
    """1,1,0,0,1,1, by hand: a masked token hands on, or enters as value 0 and reward 0."""
    ones = torch.ones(1, 6)
    mask = torch.tensor([[True, True, False, False, True, True]])
    batch = ScanBatch(ones, ones, mask=mask)
    found, _ = kernels.return_scan(*batch, [0.5, 0.5, float(mode == "break"), *[torch.inf] * 3])
    # delta is 1 + V'/2 - 1; the last two tokens have advantages 0.5 and 0.
    late = 0.5 + 0.25 * 0.0
    between = late if mode == "carry" else 0.5 * 0.0 + 0.25 * (0.5 * 1.0 + 0.25 * late)
    second = (0.5 if mode == "carry" else 0.0) + 0.25 * between
    first = 0.5 + 0.25 * second
    torch.testing.assert_close(found, torch.tensor([[first, second, 0, 0, late, 0]]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_sequence(kernels, kind):
    """64K tokens and a few, 29 tiles."""
    check(kernels, scan_batch(kind, (65_539,)), options_of(kind, True))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_bits_do_not_depend_on_blocks_grids_or_neighbours(kernels, packed):
    for kind in KINDS:
        # The longest has nine tiles of one warp, three of four warps, two of eight.
        lengths = (*LENGTHS, 2400)
        batch, options = scan_batch(kind, lengths, packed, seed=1), numbers(options_of(kind, True))
        first = kernels.return_scan(*batch, options)
        for threads, blocks in ((32, 1), (128, 2), (256, 4)):
            kernels.scan_threads, kernels.max_blocks = threads, blocks
            again = kernels.return_scan(*batch, options)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        if packed:
            continue
        alone = ScanBatch(*(None if x is None else x[3:4] for x in batch))
        for a, b in zip(first, kernels.return_scan(*alone, options), strict=True):
            assert torch.equal(a[3:4] if a.numel() else a, b)


def test_garbage_under_the_mask_changes_nothing(kernels):
    for kind in KINDS:
        batch = scan_batch(kind, (50, 3, 40))
        for breaks in (False, True):
            results = [
                kernels.return_scan(*with_garbage(batch, value), numbers(options_of(kind, breaks)))
                for value in (0.0, float("nan"), float("inf"), 1e38)
            ]
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_rows_with_a_stride(kernels):
    batch, options = scan_batch("gae", (40, 40, 40)), numbers(options_of("gae"))
    apart = ScanBatch(*(x[:, 3:31] if x is not None and x.dim() == 2 else x for x in batch))
    together = ScanBatch(*(None if x is None else x.contiguous() for x in apart))
    first, second = (kernels.return_scan(*b, options) for b in (apart, together))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("lengths", [(), (0, 0, 0), (1,), (1,) * 40], ids=len)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_no_sequences_no_tokens_and_many(kernels, lengths, packed):
    batch = scan_batch("gae", lengths, packed)
    if batch.rewards.numel():
        check(kernels, batch, options_of("gae"))
    out = kernels.return_scan_bwd(
        batch.rewards, batch.values, batch.mask, batch.dones, batch.lam, batch.offsets,
        numbers(options_of("gae")),
    )  # fmt: skip
    assert out[2].shape == (len(lengths),) and out[2].isfinite().all()


def test_the_block_is_as_large_as_the_sequences_are_long(kernels):
    items = kernels.module.SCAN_ITEMS
    for length, threads in ((0, 32), (32 * items, 32), (32 * items + 1, 128), (10**7, 256)):
        assert kernels.module.scan_threads(5, length, False) == threads
        assert kernels.module.scan_threads(5, 5 * length, True) == threads
    assert kernels.module.scan_threads(0, 0, True) == 32


# ---- past the end of an episode ---------------------------------------------------------------

# In a thread's run, at the ends of a run, a warp's tile, a block's one, and of the sequence.
ENDS = (0, 8, 9, 150, 287, 288, 400, 699)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("breaks", [False, True], ids=["carry", "break"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_enters_past_an_end(kernels, kind, breaks, garbage):
    batch = scan_batch(kind, (700,) * len(ENDS), seed=3)
    at, ends = torch.arange(700), torch.tensor(ENDS)[:, None]
    counts = batch.mask | (at == ends)
    batch = batch._replace(mask=counts, dones=at == ends, bootstrap_value=torch.randn(len(ENDS)))
    dirty = batch._replace(bootstrap_value=torch.full((len(ENDS),), garbage))
    for name in ("rewards", "values", "log_ratios"):
        if getattr(batch, name) is not None:
            dirty = dirty._replace(**{name: getattr(batch, name).where(at <= ends, garbage)})
    options = numbers(options_of(kind, breaks))
    for threads in (32, 256):
        kernels.scan_threads = threads
        clean, found = (kernels.return_scan(*b, options) for b in (batch, dirty))
        for a, b in zip(clean, found, strict=True):
            if a.numel():
                assert torch.equal(a[at <= ends], b[at <= ends])

    upstream = torch.randn(2, *batch.rewards.shape)
    stained = upstream.where(at > ends, garbage)
    rest = batch.mask, batch.dones, batch.lam, None, options
    clean, found = (kernels.return_scan_bwd(*grads, *rest) for grads in (upstream, stained))
    for a, b in zip(clean[:2], found[:2], strict=True):
        assert torch.equal(a[at > ends], b[at > ends])
    assert torch.equal(clean[2], found[2])


# ---- backward ---------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [False, True], ids=["everything", "plain"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("breaks", [False, True], ids=["carry", "break"])
@pytest.mark.parametrize("kind", ["gae", "returns"])
def test_backward(kernels, kind, breaks, packed, plain):
    """Against autograd through the loop."""
    kernels.scan_threads = 32
    batch, options = scan_batch(kind, packed=packed, seed=2, plain=plain), options_of(kind, breaks)
    sequences = len(LENGTHS)
    if batch.bootstrap_value is None:
        batch = batch._replace(bootstrap_value=torch.zeros(sequences))
    exact = in_double(batch)
    names = [n for n in ("rewards", "values", "bootstrap_value") if getattr(exact, n) is not None]
    leaves = [getattr(exact, name).requires_grad_() for name in names]
    outputs = [x for x in return_scan(exact, options) if x.numel()]
    upstream = [torch.randn(batch.rewards.shape) for _ in outputs]
    wanted = torch.autograd.grad(outputs, leaves, [g.double() for g in upstream])

    terms = float(sum(g.abs().sum() for g in upstream)), batch.rewards.shape[-1]
    if batch.mask is not None:
        upstream = [g.masked_fill(~batch.mask, float("nan")) for g in upstream]
    found = kernels.return_scan_bwd(
        upstream[0], upstream[1] if kind == "gae" else None, batch.mask, batch.dones, batch.lam,
        batch.offsets, numbers(options),
    )  # fmt: skip
    if kind == "returns":
        assert found[1].shape == (0,)
        found = (found[0], found[2])
    for a, b in zip(found, wanted, strict=True):
        close(a, b, terms)


def test_bits_of_the_backward_do_not_depend_on_blocks_or_grids(kernels):
    batch, options = scan_batch("gae", (*LENGTHS, 2400)), numbers(options_of("gae", True))
    args = (batch.rewards, batch.values, batch.mask, batch.dones, batch.lam, None, options)
    first = kernels.return_scan_bwd(*args)
    for threads, blocks in ((32, 1), (128, 2), (256, 4)):
        kernels.scan_threads, kernels.max_blocks = threads, blocks
        again = kernels.return_scan_bwd(*args)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


# ---- offsets that lie -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offsets", "wrong"),
    [
        ([0, -5, 7, 12], range(12)),
        ([0, 9, 5, 12], range(12)),
        ([0, 5, 9, 13], range(5, 12)),
        ([1, 5, 9, 12], range(9)),
        ([0, 5, 9, 11], range(5, 12)),
        ([2**62, -(2**62), 2**62, -1], range(12)),
    ],
    ids=str,
)
def test_wrong_offsets_read_nothing_outside_and_show(kernels, offsets, wrong):
    """No value of a GPU tensor can be checked without waiting for it. What lies around the tensors
    is left alone (the address sanitizer sees to that), a sequence whose offsets or neighbour's are
    wrong is NaN, and so is what no sequence holds."""
    options = numbers(options_of("gae"))
    tokens = torch.randn(12), torch.randn(12)
    offsets = torch.tensor(offsets)
    out = kernels.return_scan(*tokens, None, None, None, None, None, offsets, options)
    back = kernels.return_scan_bwd(*tokens, None, None, None, offsets, options)
    wanted = torch.zeros(12, dtype=torch.bool)
    wanted[list(wrong)] = True
    for result in (*out, *back[:2]):
        assert torch.equal(result.isnan(), wanted), result
    assert back[2].isnan().any()


def test_tokens_of_two_sequences_are_a_number_or_nan(kernels):
    """Sequence 0 is sound, and sequence 2 goes back into it: their blocks write in any order."""
    options = numbers(options_of("gae"))
    tokens = torch.randn(8), torch.randn(8)
    offsets = torch.tensor([0, 4, 8, 2, 8])
    out = kernels.return_scan(*tokens, None, None, None, None, None, offsets, options)
    back = kernels.return_scan_bwd(*tokens, None, None, None, offsets, options)
    for result in (*out, *back[:2]):
        assert result[:2].isfinite().all() and result[4:].isnan().all()

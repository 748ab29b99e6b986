"""The scans where inputs are garbage, strided, narrow or far apart, and inside PyTorch."""

from __future__ import annotations

import pytest
import torch
from scan_batches import FUNCTIONS, call, random_batch

import rlkern

functions = pytest.mark.parametrize("function", FUNCTIONS)
modes = pytest.mark.parametrize("mask_mode", ["carry", "break"])
layouts = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
TOKENS = ("rewards", "values", "log_ratios", "mask", "dones")


def assert_same(found: tuple, expected: tuple) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


# ---- what does not count ----------------------------------------------------------------------


@functions
@modes
@layouts
def test_garbage_under_the_mask_changes_nothing(scan_backend, function, mask_mode, packed):
    batch = random_batch(packed)
    plain = call(function, batch, scan_backend.dtype, mask_mode=mask_mode)
    masked = ~batch["mask"]
    for garbage in (float("nan"), float("inf"), -float("inf"), 3e38):
        dirty = dict(batch)
        for name in ("rewards", "values", "log_ratios"):
            dirty[name] = batch[name].masked_fill(masked, garbage)
        dirty["dones"] = batch["dones"] | masked
        assert_same(call(function, dirty, scan_backend.dtype, mask_mode=mask_mode), plain)


@functions
def test_masks_and_dones_may_be_numbers(scan_backend, function):
    batch = random_batch(False)
    plain = call(function, batch, scan_backend.dtype)
    for numbers in (lambda x: x.long() * 7, lambda x: x.to(torch.uint8) * 2):
        given = batch | {name: numbers(batch[name]) for name in ("mask", "dones")}
        assert_same(call(function, given, scan_backend.dtype), plain)


@functions
def test_a_nan_reaches_the_tokens_before_it_and_no_others(scan_backend, function):
    batch = {name: torch.randn(3, 40) for name in ("rewards", "values", "log_ratios")}
    plain = call(function, batch, scan_backend.dtype)
    for at in (39, 38, 32, 20, 17, 0):
        dirty = batch | {"rewards": batch["rewards"].clone()}
        dirty["rewards"][1, at] = float("nan")
        for found, clean in zip(call(function, dirty, scan_backend.dtype), plain, strict=True):
            assert found[1, : at + 1].isnan().all()
            found[1, : at + 1] = clean[1, : at + 1]
            # The first vector sums in another order than single steps do; nothing else moves.
            assert torch.equal(found, clean)


# ---- determinism and independence -------------------------------------------------------------


@functions
@layouts
def test_the_same_call_twice_is_bitwise_equal(scan_backend, poisoned, function, packed):
    batch = random_batch(packed, T=133)
    first = call(function, batch, scan_backend.dtype)
    poisoned(4 * batch["rewards"].numel())
    assert_same(call(function, batch, scan_backend.dtype), first)


@functions
@modes
def test_a_sequence_does_not_feel_its_neighbours(scan_backend, function, mask_mode):
    if not scan_backend.is_kernel:
        pytest.skip("PyTorch's loops take a tensor's last elements by other instructions")
    batch = random_batch(False, T=75)

    def third(rows):
        some = {name: x[rows] for name, x in batch.items()}
        return [x[rows.index(2)] for x in call(function, some, mask_mode=mask_mode)]

    def third_packed(first):
        """It and the ones from `first` on before it, in one row of tokens."""
        some = {name: batch[name][first:3].flatten() for name in TOKENS}
        some["bootstrap_value"] = batch["bootstrap_value"][first:3]
        some["cu_seqlens"] = torch.arange(0, 75 * (3 - first) + 1, 75)
        return [x[-75:] for x in call(function, some, mask_mode=mask_mode)]

    together = third([0, 1, 2, 3, 4, 5, 6])
    assert_same(third([2]), together)
    assert_same(third([6, 5, 2, 0]), together)
    assert_same(third_packed(2), third_packed(0))


@functions
@layouts
def test_any_number_of_threads_gives_the_same(scan_backend, function, packed):
    if scan_backend.name != "native":
        pytest.skip("threads are the native backend's")
    batch = {name: torch.randn(40, 3000) for name in ("rewards", "values", "log_ratios")}
    batch["mask"] = torch.rand(40, 3000) < 0.99
    if packed:
        batch = {name: x.flatten() for name, x in batch.items()}
        lengths = torch.tensor([0, 60_000, *[1000] * 60])
        batch["cu_seqlens"] = lengths.cumsum(0)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(call(function, batch))
    finally:
        torch.set_num_threads(threads)
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


# ---- layout and dtype -------------------------------------------------------------------------


@functions
def test_strided_views(scan_backend, function):
    batch = random_batch(False)
    plain = call(function, batch, scan_backend.dtype)

    def between(x):
        wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]

    def transposed(x):
        return x.t().contiguous().t()

    def rows_apart(x):
        wide = torch.ones(*x.shape[:-1], x.shape[-1] + 5, dtype=x.dtype)
        wide[..., 2:-3] = x
        return wide[..., 2:-3]

    for view in (between, transposed, rows_apart):
        views = batch | {name: view(batch[name]) for name in TOKENS}
        views["bootstrap_value"] = between(batch["bootstrap_value"])
        assert_same(call(function, views, scan_backend.dtype), plain)
    row = {name: x[:1].expand(3, *x.shape[1:]) for name, x in batch.items()}
    copied = {name: x.contiguous() for name, x in row.items()}
    assert_same(call(function, row, scan_backend.dtype), call(function, copied, scan_backend.dtype))


@functions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_widened(scan_backend, function, dtype):
    if scan_backend.dtype == torch.float64:
        pytest.skip("16-bit inputs are computed in fp32")
    batch = random_batch(False)
    lam = {} if function == "discounted_returns" else {"lam": torch.rand(7).to(dtype)}
    found = call(function, batch, dtype, **lam)
    widened = {n: x.to(dtype).float() if x.is_floating_point() else x for n, x in batch.items()}
    lam = {name: x.float() for name, x in lam.items()}
    assert all(x.dtype == torch.float32 for x in found)
    assert_same(found, call(function, widened, **lam))


@functions
def test_float64_goes_to_eager(function):
    batch = random_batch(False)
    found = call(function, batch, torch.float64)
    assert all(x.dtype == torch.float64 for x in found)
    with rlkern.use_backend("eager"):
        assert_same(found, call(function, batch, torch.float64))
    with (
        rlkern.use_backend("native"),
        pytest.raises(RuntimeError, match="its kernels take float32, bfloat16 and float16"),
    ):
        call(function, batch, torch.float64)

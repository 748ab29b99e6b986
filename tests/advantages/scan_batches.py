"""Batches of the scans' tests, and their calls."""

from __future__ import annotations

import torch
from literal_scan import literal

import rlkern

FUNCTIONS = ("gae", "discounted_returns", "vtrace")
GIVEN = {"gae": ("values",), "discounted_returns": (), "vtrace": ("values", "log_ratios")}
PACKED_LENGTHS = (37, 0, 5, 1, 64, 16, 0)
BARS = (1.2, 0.9, 1.1)


def padded_mask(T: int) -> torch.Tensor:
    """Rows that count everything, are padded right, left, have holes, are masked whole, at random,
    and count one token."""
    at = torch.arange(T)
    rows = [
        at >= 0,
        at < T // 2 + 1,
        at >= T // 3,
        (at % 20 < 13) & (at > 1),
        at < 0,
        torch.rand(T) < 0.6,
        at == T // 2,
    ]
    return torch.stack(rows)


def random_batch(packed: bool, T: int = 45, mask: bool = True, dones: bool = True) -> dict:
    batch = {}
    if packed:
        lengths = torch.tensor((0, *PACKED_LENGTHS))
        batch["cu_seqlens"] = lengths.cumsum(0).int()
        shape, sequences = (int(lengths.sum()),), len(PACKED_LENGTHS)
        counts = torch.rand(shape) < 0.8
        counts[:13] = counts[-5:] = False
        counts[48:90] = True
    else:
        counts = padded_mask(T)
        shape, sequences = counts.shape, counts.shape[0]
    batch["rewards"] = torch.randn(shape)
    batch["values"] = torch.randn(shape)
    batch["log_ratios"] = 0.5 * torch.randn(shape)
    if mask:
        batch["mask"] = counts
    if dones:
        batch["dones"] = torch.rand(shape) < 0.06
    batch["bootstrap_value"] = torch.randn(sequences)
    return batch


def used_by(function: str, batch: dict) -> dict:
    """Without the per-token inputs that the function does not take."""
    unused = {"values", "log_ratios"} - set(GIVEN[function])
    return {name: x for name, x in batch.items() if name not in unused}


def cast(batch: dict, dtype: torch.dtype) -> dict:
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.items()}


def call(function: str, batch: dict, dtype: torch.dtype = torch.float32, **options) -> tuple:
    """The results of a public function, one or two tensors."""
    given = cast(used_by(function, batch), dtype)
    if function == "vtrace":
        options |= dict(zip(("rho_bar", "c_bar", "rho_pg_bar"), BARS, strict=True))
    tokens = [given.pop(name) for name in ("rewards", *GIVEN[function])]
    out = getattr(rlkern, function)(*tokens, **given, **options)
    return tuple(out) if isinstance(out, tuple) else (out,)


def expected(function: str, batch: dict, **options):
    """What the literal reading gives for the batch as fp32 holds it, with its scales."""
    if function == "discounted_returns":
        options["lam"] = 1.0
    exact = literal(cast(used_by(function, batch), torch.float64), bars=BARS, **options)
    count = 1 if function == "discounted_returns" else 2
    return exact[:count], exact[2 : 2 + count]


def assert_near(backend, found: tuple, truth: tuple, scales: tuple, steps: int) -> None:
    """Within the rounding of the arithmetic that the backend promises.

    Per step at most 10 roundings enter a result: of gamma, lam and their product, of exp (two ulp),
    of the terms of delta and of the recurrence; each is relative to the recurrence over absolute
    values. All backends do them in float64, and then round the result once to theirs. Where a
    number falls below the smallest normal one, that is the error.
    """
    unit = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
    inner = unit[torch.float64]
    for x, exact, scale in zip(found, truth, scales, strict=True):
        assert x.dtype == backend.dtype and x.shape == exact.shape
        assert x.isfinite().all()
        bound = 10 * (steps + 1) * inner * scale + unit[backend.dtype] * exact.abs()
        bound += (steps + 1) * torch.finfo(backend.dtype).tiny
        excess = (x.double() - exact).abs() - bound
        assert excess.numel() == 0 or excess.max() <= 0, (excess.max(), excess.argmax())
        masked = scale == 0
        assert not x[masked].any()

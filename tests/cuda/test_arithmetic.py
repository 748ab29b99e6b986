"""The plain C++ forms of the kernels' arithmetic: conversions and the softcap."""

from __future__ import annotations

import math

import pytest
import torch


def awkward_floats() -> torch.Tensor:
    """Every exponent, ties of both 16-bit types, subnormals, infinities and NaN."""
    generator = torch.Generator().manual_seed(3)
    bits = torch.randint(-(2**31), 2**31, (3000,), generator=generator)
    ties16 = (bits & ~0xFFFF) | 0x8000
    ties13 = (bits & ~0x1FFF) | 0x1000
    small = torch.randn(500, generator=generator) * 2.0**-20
    some = torch.cat([bits, ties16, ties13]).to(torch.int32).view(torch.float32)
    edges = [0.0, -0.0, math.inf, -math.inf, math.nan, 65504.0, 65519.99, 65520.0, 2.0**-25, 3.4e38]
    return torch.cat([some, small, torch.tensor(edges)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_torchs(emulated, dtype):
    values = awkward_floats()
    name = str(dtype).removeprefix("torch.")
    rounded = [getattr(emulated.module, f"round_{name}")(x) for x in values.tolist()]
    bits = torch.tensor(rounded, dtype=torch.int32).to(torch.int16)
    expected = values.to(dtype)
    numbers = ~expected.isnan()
    assert torch.equal(bits[numbers], expected.view(torch.int16)[numbers])
    assert bits.view(dtype)[~numbers].isnan().all()


def test_every_half_widens_as_torch_widens_it(emulated):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    expected = bits.view(torch.float16).float()
    wide = torch.tensor([emulated.module.widen_float16(int(b) & 0xFFFF) for b in bits])
    assert torch.equal(wide.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_softcap(emulated):
    """Its value to 6 u, its derivative to 8 u and 4 u more for each unit of x / c in the exponent,
    and 0 once exp(-2 x / c) is below the normal numbers."""
    unit, cap = 2.0**-24, 30.0
    x = torch.cat([torch.linspace(-200, 200, 4001), torch.logspace(-30, 3, 500)]).tolist()
    for value in x:
        y, slope = emulated.module.softcap(value, cap)
        value = torch.tensor(value).double()
        expected = cap * torch.tanh(value / cap)
        assert abs(y - expected) <= 6 * unit * abs(expected), value
        wanted = 1 / torch.cosh(value / cap) ** 2
        assert abs(slope - wanted) <= (8 + 4 * abs(value / cap)) * unit * wanted + 2.0**-124, value
    assert emulated.module.softcap(math.inf, cap) == (cap, 0.0)
    assert emulated.module.softcap(-math.inf, cap) == (-cap, 0.0)
    assert math.isnan(emulated.module.softcap(math.nan, cap)[0])

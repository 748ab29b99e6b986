"""The sum in fp32 of parts in fewer bits: each value once, rounded once."""

from __future__ import annotations

import pytest
import torch

from rlkern import _native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["avx512", "avx2", "portable"])
def isa(request, monkeypatch):
    if _native.problems["cpu"]:
        pytest.skip(f"no compiled CPU library: {_native.problems['cpu']}")
    if request.param not in _native.cpu_isas():
        pytest.skip(f"this machine cannot run {request.param}")
    monkeypatch.setenv("RLKERN_CPU_ISA", request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0, 1, 15, 64, 1000, 300_001])
def test_each_value_is_added_once(isa, dtype, size):
    whole = torch.randn(size + 2)
    part = torch.randn(size + 3).to(dtype)[3:]  # at any alignment
    expected = whole[1:-1] + part.float()
    torch.ops.rlkern.add_widened_(whole[1:-1], part)
    assert whole[1:-1].equal(expected)


def test_nothing_beside_it_is_touched(isa):
    whole = torch.zeros(40)
    torch.ops.rlkern.add_widened_(whole[10:27], torch.ones(17, dtype=torch.bfloat16))
    assert whole.nonzero().squeeze(1).tolist() == list(range(10, 27))


@pytest.mark.parametrize(
    "total, part, message",
    [
        (torch.zeros(3), torch.zeros(4), "sum: expected a contiguous tensor of 4 values"),
        (torch.zeros(3).double(), torch.zeros(3), "sum: expected a contiguous tensor"),
        (torch.zeros(3), torch.zeros(3).double(), "part: expected float32, float16 or bfloat16"),
        (torch.zeros(3), torch.zeros(6)[::2], "part: expected a contiguous tensor"),
    ],
)
def test_refuses(isa, total, part, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.rlkern.add_widened_(total, part)


def test_opcheck(isa):
    torch.library.opcheck(
        torch.ops.rlkern.add_widened_, (torch.zeros(8), torch.ones(8, dtype=torch.bfloat16))
    )

"""The CUDA kernel of add_widened_, run on the CPU."""

from __future__ import annotations

import pytest
import torch
from emulated_kernels import build, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())
# A block takes 4096 values of float32 and 8192 of 16 bits.
SIZES = (0, 1, 100, 4096, 8192, 8193, 20_000)


@pytest.fixture(scope="module")
def module():
    return build()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("max_blocks", [1, 2**31 - 1])
def test_each_value_is_added_once(module, dtype, shift, max_blocks):
    for size in SIZES:
        whole = torch.randn(size + 8)
        part = torch.randn(size + shift).to(dtype)[shift:]
        before, total = whole.clone(), whole[4 + shift :][:size]
        expected = total + part.float()
        module.add_widened(
            str(dtype).split(".")[1], total.data_ptr(), part.data_ptr(), size, max_blocks
        )
        assert total.equal(expected)
        assert whole[: 4 + shift].equal(before[: 4 + shift])
        assert whole[4 + shift + size :].equal(before[4 + shift + size :])

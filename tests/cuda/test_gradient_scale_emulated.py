"""The CUDA kernel of scale_, run on the CPU: what is upstream, multiplied into a gradient."""

from __future__ import annotations

import pytest
import torch
from emulated_kernels import DTYPES as NAMES
from emulated_kernels import span, why_not
from logit_checks import DTYPES, unreadable

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())


def scale(built, x, factor, blocks):
    """rlkern::scale_ of rows [outer, inner, width]."""
    number = torch.tensor(factor)
    built.scale(
        NAMES[x.dtype], span(x[..., 0]), *x.shape, number.data_ptr(), blocks
    )  # fmt: skip


@pytest.mark.parametrize("blocks", [1, 3, 50])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_of_rows_in_place(built, dtype, blocks):
    for width, offset in ((1, 3), (1003, 5), (40001, 1)):
        stride = width + 7
        buffer = torch.randn(2 * 3 * stride + 16).to(dtype)
        rows = buffer.as_strided((2, 2, width), (3 * stride, stride, 1), offset)
        expected = buffer.clone()
        expected.as_strided(rows.shape, rows.stride(), offset).mul_(torch.tensor(-0.3))
        scale(built, rows, -0.3, blocks)
        assert torch.equal(buffer, expected)


def test_scale_by_one_touches_nothing(built):
    x = torch.full((1, 2, 3000), torch.nan, dtype=torch.bfloat16)
    with unreadable(x):
        scale(built, x, 1.0, 2)
    assert x.isnan().all()

"""The CUDA kernels of the value loss and the KL penalty, run on the CPU, against float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from emulated_kernels import poisoned
from emulated_policy import emulated_policy, rows

from rlkern.reference.aggregation import AGGREGATIONS, Denominators
from rlkern.reference.kl_penalty import CLAMPS, ESTIMATORS
from rlkern.reference.kl_penalty import kl_penalty as reference_kl
from rlkern.reference.value_loss import SUMS, ValueBatch
from rlkern.reference.value_loss import value_loss as reference_value

LENGTHS = (70, 0, 1, 129)
# Chains of 32 additions in fp32 and a few roundings of each term.
RTOL = 40 * 2**-24


@pytest.fixture(scope="module")
def module():
    return emulated_policy().module


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("max_blocks", [2**31 - 1, 3])
def test_value_loss(module, aggregation, clip, packed, max_blocks):
    shape = (sum(LENGTHS),) if packed else (len(LENGTHS), max(LENGTHS))
    values = torch.randn(shape)
    returns, old = values + torch.randn(shape), values + 0.3 * torch.randn(shape)
    mask = torch.rand(shape) < 0.7
    offsets = torch.tensor((0, *LENGTHS)).cumsum(0) if packed else None
    if not packed:
        mask &= torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    normalizer = 50.0 if aggregation == "seq_mean_token_sum_norm" else None
    skip_empty = aggregation == "seq_mean_token_sum"
    loss = SimpleNamespace(clip=clip, aggregation=aggregation, skip_empty=skip_empty)
    leaf = values.double().requires_grad_()
    batch = ValueBatch(
        leaf, returns.double(), mask, None if clip is None else old.double(), offsets
    )
    expected, vector = reference_value(loss, batch, Denominators(normalizer))
    (slope,) = torch.autograd.grad(expected, leaf)

    given = {"values": values, "returns": returns, "mask": mask}
    for name in ("values", "returns"):  # what masked positions hold must not matter
        given[name] = given[name].where(mask, float("nan"))
    if clip is not None:
        given["old_values"] = old.where(mask, float("inf"))
    if packed:
        given["offsets"] = offsets
    if normalizer is not None:
        given["normalizer"] = torch.tensor(normalizer, dtype=torch.float64)
    given["grad_values"] = grad = poisoned(*shape)
    value, scale = poisoned(1), poisoned(1)
    metrics = poisoned(len(SUMS), dtype=torch.float64)
    totals = poisoned(len(LENGTHS), module.VALUE_TOTALS, dtype=torch.float64)
    options = [
        float("inf") if clip is None else clip,
        float(AGGREGATIONS.index(aggregation)),
        float(skip_empty),
        float("nan"),
        float("nan"),
    ]
    module.value(
        {name: rows(tensor) for name, tensor in given.items()}, len(LENGTHS), shape[-1], options,
        totals.data_ptr(), value.data_ptr(), metrics.data_ptr(), scale.data_ptr(), 32, 32,
        max_blocks,
    )  # fmt: skip
    torch.testing.assert_close(value[0].double(), expected.detach(), rtol=RTOL, atol=0)
    torch.testing.assert_close((grad * scale).double(), slope, rtol=RTOL, atol=1e-12)
    torch.testing.assert_close(metrics, vector, rtol=RTOL, atol=RTOL * float(mask.sum()))


@pytest.mark.parametrize("clamp", [None, *CLAMPS])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_kl_penalty(module, estimator, clamp):
    x = torch.cat([torch.randn(90), torch.tensor([0.0, 1e-4, -30.0, 25.0, -0.36])])
    mask = torch.rand(95) < 0.8
    leaf = torch.zeros(95, dtype=torch.float64, requires_grad=True)
    expected = reference_kl(leaf, x.double(), estimator, clamp)
    upstream = torch.randn(95)
    (slope,) = torch.autograd.grad(expected, leaf, upstream.double())
    logprobs, ref = torch.zeros(95).where(mask, float("nan")), x.where(mask, float("inf"))
    number = 0 if clamp is None else 1 + CLAMPS.index(clamp)
    for given, wanted in ((None, expected.detach()), (upstream, slope)):
        out = poisoned(95)
        module.kl(
            ESTIMATORS.index(estimator), number, 95, logprobs.data_ptr(), ref.data_ptr(),
            mask.data_ptr(), 0 if given is None else given.data_ptr(), out.data_ptr(), 32,
        )  # fmt: skip
        torch.testing.assert_close(out.double(), wanted.where(mask, 0.0), rtol=1e-6, atol=0)

"""csrc/common against float64 PyTorch: values, derivatives, and the states' algebra."""

from __future__ import annotations

import math

import pytest
import torch

INF = float("inf")


def reference_state(values):
    z = torch.tensor(values, dtype=torch.float64)
    top = z.max()
    e = (z - top).exp()
    return top.item(), e.sum().item(), torch.where(e == 0, 0.0, (z - top) * e).sum().item()


def rows():
    generator = torch.Generator().manual_seed(1)
    for size in (1, 2, 3, 17, 400):
        for scale in (0.1, 3.0, 40.0, 1e4):
            yield (scale * torch.randn(size, generator=generator, dtype=torch.float64)).tolist()
    yield [-INF, 0.5, -INF, 2.0]
    yield [1e4, -1e4, 1e4]


@pytest.mark.parametrize("values", list(rows()))
def test_fold_gives_max_sum_and_weighted_sum(common, values):
    expected = reference_state(values)
    state = common.f64.softmax_fold(values)
    # Every rescaling rounds once: a few ulp per value folded.
    assert state == pytest.approx(expected, rel=4e-16 * len(values) + 1e-15, abs=1e-14)


@pytest.mark.parametrize("values", [v for v in rows() if len(v) > 1])
def test_merge_of_parts_is_the_whole(common, values):
    for cut in {1, len(values) // 2, len(values) - 1}:
        parts = [common.f64.softmax_fold(values[:cut]), common.f64.softmax_fold(values[cut:])]
        merged = common.f64.softmax_merge(*parts)
        assert merged == pytest.approx(common.f64.softmax_fold(values), rel=1e-13, abs=1e-13)
        assert merged == common.f64.softmax_merge(*reversed(parts))


def test_empty_states_and_minus_infinity_weigh_nothing(common):
    empty = common.f64.softmax_fold([])
    assert empty == (-INF, 0.0, 0.0)
    some = common.f64.softmax_fold([1.0, 2.0])
    assert common.f64.softmax_merge(empty, some) == some
    assert common.f64.softmax_merge(some, empty) == some
    assert common.f64.softmax_fold([-INF, -INF]) == empty


@pytest.mark.parametrize("values", [[math.nan, 1.0], [1.0, math.nan], [1.0, math.nan, 9.0], [INF]])
def test_nan_and_infinity_show_in_the_sum(common, values):
    for module in (common.f64, common.f32):
        assert math.isnan(module.softmax_fold(values)[1])


def test_a_nan_sum_survives_every_merge(common):
    for module in (common.f64, common.f32):
        for max_ in (-INF, -1e30, 0.0):
            for other in ((1e30, 1.0, 0.0), (-INF, 0.0, 0.0)):
                assert math.isnan(module.softmax_merge((max_, math.nan, 0.0), other)[1])
        assert math.isnan(module.token_logprob((-INF, math.nan, 0.0), 0.0)[0])


@pytest.mark.parametrize("values", list(rows()))
@pytest.mark.parametrize("target", [0, -1])
def test_token_logprob_and_entropy(common, values, target):
    z = torch.tensor(values, dtype=torch.float64)
    logp = z.log_softmax(-1)
    entropy = -torch.where(logp == -INF, 0.0, logp.exp() * logp).sum()
    others = list(values)
    y = others.pop(target)
    state = common.f64.softmax_fold(others)
    top = max(values)
    moved = common.f64.softmax_merge(state, (top, 0.0, 0.0))
    result = common.f64.token_logprob(moved, y - top)
    assert result[0] == pytest.approx(logp[target].item(), rel=1e-13, abs=1e-13)
    assert result[1] == pytest.approx(entropy.item(), rel=1e-12, abs=1e-12)


def test_logprob_keeps_a_competitor_17_nats_below_in_float(common):
    others = common.f32.softmax_fold([-17.0])
    moved = common.f32.softmax_merge(others, (0.0, 0.0, 0.0))
    logprob = common.f32.token_logprob(moved, 0.0)[0]
    assert logprob == pytest.approx(-math.log1p(math.exp(-17)), rel=1e-6)
    # Its gradient, -expm1(logp), must not be the 0 of 1 - p.
    gradient = common.f32.token_gradient(1.0, 0.0, logprob, 0.0, -logprob)
    assert gradient[2] == pytest.approx(-math.expm1(-math.log1p(math.exp(-17))), rel=1e-6)


def test_nothing_can_be_drawn(common):
    assert common.f64.token_logprob((-INF, 0.0, 0.0), math.nan) == (-INF, 0.0, 0.0)
    # Only the target is -inf: no log-probability, but the others have an entropy.
    others = common.f64.softmax_fold([0.0, 0.0])
    logprob, entropy, _ = common.f64.token_logprob(others, -INF)
    assert logprob == -INF and entropy == pytest.approx(math.log(2))


@pytest.mark.parametrize("g,h", [(1.0, 0.0), (0.0, 1.0), (-0.7, 2.5), (0.0, 0.0)])
@pytest.mark.parametrize("values", [v for v in rows() if max(v) - min(v) < 300])
def test_token_gradient_is_the_derivative(common, values, g, h):
    if -INF in values:
        pytest.skip("autograd of float64 log_softmax gives NaN at -inf")
    z = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    logp = z.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum()
    target = len(values) // 2
    (expected,) = torch.autograd.grad(g * logp[target] + h * entropy, z)
    top = z.detach().max()
    log_sum = (z.detach() - top).exp().sum().log()
    constant, slope, whole = common.f64.token_gradient(
        g, h, logp[target].item(), entropy.item(), log_sum.item()
    )
    d = z.detach() - top
    actual = (d - log_sum).exp() * (constant + slope * d)
    actual[target] = whole
    assert torch.allclose(actual, expected, rtol=1e-11, atol=1e-12)


def test_impossible_token_has_no_gradient_whatever_is_upstream(common):
    assert common.f64.token_gradient(math.nan, 0.0, -INF, 0.0, 0.0) == (0.0, 0.0, 0.0)


def test_a_nan_row_has_a_nan_gradient_even_with_nothing_upstream(common):
    assert math.isnan(common.f64.token_gradient(0.0, 0.0, math.nan, math.nan, math.nan)[2])

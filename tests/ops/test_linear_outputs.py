"""What linear_token_logprobs gives beside log-probability and entropy, and logits in fp32.

Tolerances. Products of D = 24 terms in fp32 are good to D 2^-24 of their magnitudes, which the mean
over V logits and the log of a sum of squares take over: 1e-5.
"""

from __future__ import annotations

import pytest
import torch
from trl.kernels import ChunkedLogProbFunction

import rlkern
from rlkern import PolicyLoss
from rlkern.ops.linear_token_logprobs import OUTPUTS

V, D, N = 211, 24, 150
FEW = 64 * V * 4


def inputs(dtype=torch.float32):
    hidden = torch.randn(N, D).to(dtype)
    weight = torch.randn(V, D).to(dtype)
    ids = torch.randint(V, (N,))
    # A third of the tokens are the most probable ones.
    ids[::3] = (hidden.double() @ weight.double().T).argmax(-1)[::3]
    return hidden, weight, ids


def exact(hidden, weight, ids, *, bias=None, temperature=1.0, softcap=None):
    z = hidden.double() @ weight.double().T
    z = z if bias is None else z + bias.double()
    z = z if softcap is None else softcap * (z / softcap).tanh()
    z = z / temperature
    log_p = z.log_softmax(-1)
    return z.mean(-1), z.argmax(-1) == ids, (2 * log_p).logsumexp(-1)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"softcap": 4.0, "temperature": 1.5}], ids=str
)
def test_equal_float64(backend, options):
    hidden, weight, ids = inputs()
    bias, mask = torch.randn(V), torch.rand(N) < 0.8
    hidden[~mask] = torch.nan
    out = rlkern.linear_token_logprobs(
        hidden, weight, ids, bias=bias, mask=mask, outputs=OUTPUTS, memory_budget=FEW, **options
    )
    mean, best, squares = exact(hidden.nan_to_num(), weight, ids, bias=bias, **options)
    # With a bias the chosen tokens are others.
    torch.testing.assert_close(out.mean_logits.double(), mean * mask, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.log_sum_sq_probs.double(), squares * mask, rtol=1e-5, atol=1e-5)
    assert out.is_top1.dtype == torch.bool and out.is_top1.equal(best & mask)
    assert out.entropy is None
    alone = rlkern.linear_token_logprobs(
        hidden, weight, ids, bias=bias, mask=mask, memory_budget=FEW, **options
    )
    assert out.logprobs.equal(alone)


def test_equal_trl(backend):
    hidden, weight, ids = inputs()
    theirs = ChunkedLogProbFunction.apply(hidden, weight, None, ids, 0.9, 64)
    ours = rlkern.linear_token_logprobs(
        hidden, weight, ids, temperature=0.9, return_entropy=True, outputs=OUTPUTS
    )
    logprobs, entropy, squares, mean, best = theirs
    for mine, other in zip(
        (ours.logprobs, ours.entropy, ours.mean_logits, ours.log_sum_sq_probs),
        (logprobs, entropy, mean, squares),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    assert ours.is_top1.equal(best) and 40 <= int(best.sum()) < N


def test_of_equal_logits_the_first_is_the_argmax(backend):
    """As torch.argmax and TRL have it. Long rows, of which the maximum stands in several places."""
    weight = torch.zeros(5000, 1)
    weight[[700, 701, 4999]] = 2.0
    ids = torch.tensor([700, 701, 4999, 3])
    out = rlkern.linear_token_logprobs(torch.ones(4, 1), weight, ids, outputs=("is_top1",))
    assert out.is_top1.tolist() == [True, False, False, False]
    assert out.mean_logits is None and out.log_sum_sq_probs is None


def test_rows_that_are_not_finite(backend):
    """-inf has no probability and makes the mean -inf; a NaN, or a +inf, is seen by all three; a
    row of nothing but -inf has no token, and so no most probable one."""
    inf, nan = torch.inf, torch.nan
    rows = torch.tensor(
        [[1.0, -inf, 2.0], [nan, 3.0, 1.0], [1.0, 3.0, nan], [inf, 0.0, 1.0], [-inf, -inf, -inf]]
    )
    rows = torch.cat([rows, rows[:, :1].repeat(1, 3000)], 1)
    rows[:, 3:] = rows[:, :1].nan_to_num(0.5, 0.5).clamp(-9, 0.5)
    rows[4] = -inf
    ids = torch.tensor([2, 1, 1, 0, 0])
    given = {"outputs": OUTPUTS, "bias": torch.zeros(rows.shape[1])}
    for i in range(5):
        # The bias is the row: hidden states of 0 would make 0 * inf.
        given["bias"] = rows[i]
        hidden, weight = torch.zeros(1, 1), torch.zeros(rows.shape[1], 1)
        out = rlkern.linear_token_logprobs(hidden, weight, ids[i : i + 1], **given)
        assert bool(out.is_top1) == (i == 0)
        exact64 = (2 * rows[i].double().log_softmax(-1)).logsumexp(-1)
        wanted = torch.tensor(-inf).double() if i == 4 else exact64
        torch.testing.assert_close(
            out.log_sum_sq_probs.double()[0], wanted, rtol=1e-5, atol=1e-5, equal_nan=True
        )
        torch.testing.assert_close(out.mean_logits[0], rows[i].mean(), equal_nan=True)


@pytest.mark.parametrize("place", [0, 1, 15, 16, 1023, 1024, 3000])
def test_an_equal_logit_at_any_place_before_the_target(backend, place):
    """Blocks of the row pass are 1024 values, its vectors up to 16."""
    weight = torch.full((3002, 1), -1.0)
    weight[[place, 3001]] = 2.0
    ids = torch.tensor([place, 3001])
    out = rlkern.linear_token_logprobs(torch.ones(2, 1), weight, ids, outputs=("is_top1",))
    assert out.is_top1.tolist() == [True, False]


def test_gradients_pass_them_by(backend):
    hidden, weight, ids = inputs()
    hidden.requires_grad_()
    out = rlkern.linear_token_logprobs(
        hidden, weight, ids, return_entropy=True, outputs=OUTPUTS, memory_budget=FEW
    )
    assert not out.mean_logits.requires_grad and not out.log_sum_sq_probs.requires_grad
    (grad,) = torch.autograd.grad(out.logprobs.sum() + out.entropy.sum(), hidden)
    plain = rlkern.linear_token_logprobs(
        hidden, weight, ids, return_entropy=True, memory_budget=FEW
    )
    (expected,) = torch.autograd.grad(plain.logprobs.sum() + plain.entropy.sum(), hidden)
    assert grad.equal(expected)


@pytest.mark.parametrize(
    "given, error, message",
    [
        ({"outputs": ("top1",)}, ValueError, "outputs: expected one of mean_logits, is_top1"),
        ({"outputs": "is_top1"}, TypeError, "outputs: expected a sequence of names"),
        ({"logits_dtype": torch.bfloat16}, ValueError, "logits_dtype: expected None or torch.f"),
        ({"logits_dtype": "float32"}, ValueError, "logits_dtype: expected None or torch.float32"),
    ],
    ids=str,
)
def test_refuses(given, error, message):
    with pytest.raises(error, match=message):
        rlkern.linear_token_logprobs(*inputs(), **given)


# ---- logits in fp32 --------------------------------------------------------------------------


def unrounded(hidden, weight, ids, bias):
    z = hidden.double() @ weight.double().T + bias.double()
    return z.log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_in_fp32_are_not_rounded(backend, dtype):
    hidden, weight, ids = inputs(dtype)
    bias = torch.randn(V).to(dtype)
    truth = unrounded(hidden, weight, ids, bias)
    given = {"bias": bias, "memory_budget": FEW}
    wide = rlkern.linear_token_logprobs(hidden, weight, ids, logits_dtype=torch.float32, **given)
    narrow = rlkern.linear_token_logprobs(hidden, weight, ids, **given)
    torch.testing.assert_close(wide.double(), truth, rtol=1e-5, atol=1e-5)
    assert (narrow - truth).abs().max() > 30 * (wide - truth).abs().max()


def test_gradients_of_logits_in_fp32(backend):
    """The logits' gradient is rounded for the products, and so is each result: 2^-8 each, in the
    2-norm; from rounded logits they are further off."""
    hidden, weight, ids = (x.requires_grad_(x.is_floating_point()) for x in inputs(torch.bfloat16))
    exact64 = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    zeros = torch.zeros(V, dtype=torch.float64)
    expected = torch.autograd.grad(unrounded(*exact64, ids, zeros).sum(), exact64)
    found = torch.autograd.grad(
        rlkern.linear_token_logprobs(
            hidden, weight, ids, logits_dtype=torch.float32, memory_budget=FEW
        ).sum(),
        (hidden, weight),
    )
    for mine, truth in zip(found, expected, strict=True):
        assert (mine.double() - truth).norm() <= 2.0**-7 * truth.norm()


@pytest.mark.parametrize("preset", ["dapo", "gspo"])
def test_a_loss_on_logits_in_fp32(backend, preset):
    loss = PolicyLoss.preset(preset)
    hidden, weight, ids = inputs(torch.bfloat16)
    hidden, ids = hidden.view(3, 50, D).requires_grad_(), ids.view(3, 50)
    advantages = torch.randn(3)
    truth = unrounded(hidden.detach().view(N, D), weight, ids.view(N), torch.zeros(V)).view(3, 50)
    old = truth.float() + 0.1 * torch.randn(3, 50)
    with rlkern.use_backend("eager"):
        exact_loss = loss(truth, advantages.double(), old_logprobs=old.double()).loss
    given = {"old_logprobs": old, "memory_budget": FEW}
    wide = loss.from_hidden(
        hidden, weight, ids, advantages, logits_dtype=torch.float32, **given
    ).loss
    narrow = loss.from_hidden(hidden, weight, ids, advantages, **given).loss
    assert abs(wide - exact_loss) < 1e-5
    assert abs(narrow - exact_loss) > 10 * abs(wide - exact_loss)
    wide.backward()
    assert hidden.grad.isfinite().all() and hidden.grad.abs().sum() > 0


def test_float32_factors_stay_as_they_are(backend):
    hidden, weight, ids = inputs()
    wide = rlkern.linear_token_logprobs(hidden, weight, ids, logits_dtype=torch.float32)
    assert wide.equal(rlkern.linear_token_logprobs(hidden, weight, ids))


def test_autocast_leaves_fp32_logits_as_they_are():
    hidden, weight, ids = inputs()
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        wide = rlkern.linear_token_logprobs(hidden, weight, ids, logits_dtype=torch.float32)
    rounded = [x.detach().bfloat16() for x in (hidden, weight)]
    truth = unrounded(*rounded, ids, torch.zeros(V))
    torch.testing.assert_close(wide.double(), truth, rtol=1e-5, atol=1e-5)
    wide.sum().backward()
    assert hidden.grad.dtype == torch.float32 and hidden.grad.isfinite().all()


def test_a_transposed_weight_compiles_and_agrees():
    hidden, weight, ids = inputs()
    weight = weight.t().contiguous().t()
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()

    def total(h, w):
        return rlkern.linear_token_logprobs(h, w, ids).sum()

    expected = torch.autograd.grad(total(hidden, weight), (hidden, weight))
    found = torch.autograd.grad(
        torch.compile(total, fullgraph=True)(hidden, weight), (hidden, weight)
    )
    for mine, eager in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, eager)

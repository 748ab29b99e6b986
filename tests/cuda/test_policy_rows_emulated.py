"""The CUDA kernels of policy_rows, run on the CPU, against float64: the log-probabilities as
logit_checks.py bounds them, the loss's gradients with respect to these, and the logits' gradient
for those.

Bound of a loss's gradient at a given log-probability: a log-ratio is one difference, right to
u |d|, |d| < 4 here, its exponential carries that on, and fewer than 20 products and sums follow, of
numbers below 8: 2^8 u of 1 + the gradient's size.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from emulated_kernels import poisoned, why_not
from emulated_policy_rows import EmulatedPolicyRows
from logit_checks import (
    DTYPES,
    Inputs,
    U,
    check_backward,
    close,
    random_inputs,
    sum_bound,
    unreadable,
)

import rlkern
from rlkern import PolicyLoss, RolloutCorrection
from rlkern.ops import policy_rows as operator
from rlkern.ops.policy_rows import RowArguments, TokenArguments
from rlkern.reference import token_logprobs as reference

sys.path.append(str(Path(__file__).parents[1] / "losses"))
from heads import LOSSES, SEPARABLE, HeadBatch, from_logits, in_steps, near  # noqa: E402

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())
KERNELS = {0: "two reads", 1: "cluster of 1", 2: "of 2", 4: "of 4", 8: "of 8"}
LOSS = PolicyLoss.preset("grpo", kl_coef=0.1, entropy_coef=0.05, correction=RolloutCorrection())


@pytest.fixture(params=KERNELS, ids=KERNELS.values())
def kernel(request, built):
    """Each kernel, and clusters of every size."""
    return EmulatedPolicyRows(built, request.param)


@pytest.fixture(params=[0, 4], ids=["two reads", "cluster of 4"])
def either(request, built):
    return EmulatedPolicyRows(built, request.param)


@dataclass
class Case:
    """One call: rows of logits, what the loss asks of their tokens, the loss."""

    inputs: Inputs
    tokens: TokenArguments
    loss: PolicyLoss

    def rows(self) -> RowArguments:
        return RowArguments(*self.inputs.args()[1:])


def case_of(inputs: Inputs, loss: PolicyLoss = LOSS) -> Case:
    shape = inputs.ids.shape
    generator = torch.Generator().manual_seed(len(shape) + inputs.logits.shape[-1])

    def normal(spread=1.0):
        return spread * torch.randn(shape, generator=generator)

    logprobs = reference.forward(*inputs.flat())[0].nan_to_num(-3.0, 0.0, -3.0)
    around = logprobs.clamp(min=-1e3).view(shape).float()
    tokens = TokenArguments(
        normal(),
        around + normal(0.3),
        around + normal(0.5) if loss.kl_coef else None,
        around + normal(0.3) if loss.correction else None,
        torch.rand(shape, generator=generator),
        torch.rand(shape, generator=generator) < 0.8,
        torch.rand(*shape, 2, generator=generator) + 0.5,
        [*loss._token_sum_numbers, *[math.nan] * 3],
    )
    return Case(inputs, tokens, loss)


def exact_upstream(case: Case, logprobs, entropy):
    """The loss's gradients at these log-probabilities and entropies, in float64 eager PyTorch."""
    tokens, n = case.tokens, logprobs.numel()
    entropy = torch.zeros_like(logprobs) if entropy.numel() != n else entropy
    leaves = [x.double().reshape(1, n).requires_grad_() for x in (logprobs, entropy)]
    names = ("old_logprobs", "ref_logprobs", "rollout_logprobs", "token_weights", "entropy_mask")
    given = {x: getattr(tokens, x) for x in names if getattr(tokens, x) is not None}
    given = {x: y.reshape(1, n) if y.dtype == torch.bool else y.reshape(1, n).double()
             for x, y in given.items()}  # fmt: skip
    if case.inputs.mask is not None:
        given["mask"] = case.inputs.mask.reshape(1, n)
    same = "same" if case.loss.entropy_coef else "token_mean"
    plain = replace(case.loss, aggregation="token_sum", entropy_aggregation=same)
    if not case.loss.entropy_coef:
        del given["entropy_mask"]
    with rlkern.use_backend("eager"):
        out = plain(leaves[0], tokens.advantages.reshape(1, n).double(), entropy=leaves[1], **given)
    grads = torch.autograd.grad(out.loss, leaves, allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]
    if case.inputs.mask is not None:
        # The policy loss does not look at what does not count.
        grads = [g.masked_fill(~given["mask"], 0.0) for g in grads]
    if case.loss.entropy_coef:
        grads[1] = grads[1].masked_fill(~given["entropy_mask"], 0.0)
    return torch.stack(grads, -1).view(*logprobs.shape, 2) * case.tokens.scales.double()


def run(kernel, case: Case, inplace=False, entropy=True, out=None):
    """logprobs, entropy, upstream, gradient."""
    logits = case.inputs.logits
    if inplace:
        out = logits = logits.clone()
    elif out is None:
        out = poisoned(*logits.shape, dtype=logits.dtype)
    return *kernel.run(logits, out, case.rows(), case.tokens, entropy), out


def check(kernel, case: Case, entropy=True, inplace=True):
    inputs = case.inputs
    results = run(kernel, case, entropy=entropy)
    logprobs, measured, upstream, gradient = results
    expected = [r.view(inputs.ids.shape + r.shape[1:]) for r in reference.forward(*inputs.flat())]
    bound, vocab = sum_bound(inputs), inputs.logits.shape[-1]
    size = expected[0].abs()
    allowed = torch.where(size < 1e-2, 500 * U * size + vocab * 2.0**-126, bound + 4 * U * size)
    close(logprobs, expected[0], allowed)
    if entropy:
        close(measured, expected[1], bound * (1 + math.log(vocab)))
    wanted = exact_upstream(case, logprobs, measured)
    scales = case.tokens.scales.double()
    close(upstream, wanted, 256 * U * (scales + wanted.abs()))
    given = (logprobs, expected[1] if entropy else torch.zeros_like(logprobs), expected[2])
    g, h = upstream[..., 0], upstream[..., 1]
    check_backward(inputs, g, h, given, gradient, sum_error=bound)
    if inplace:
        for a, b in zip(run(kernel, case, True, entropy), results, strict=True):
            close(a, b, 0.0)  # equal whatever the bits of a NaN
    return results


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- shapes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [1, 2, 3, 17, 1000, 4099])
def test_small_vocabularies(kernel, vocab):
    # A type each: a thread for each of a cluster's makes a call slow.
    dtype, other = DTYPES[vocab % 3], DTYPES[(vocab + 1) % 3]
    check(kernel, case_of(random_inputs(dtype, (2,), vocab)))
    capped = random_inputs(other, (2,), vocab, softcap=5.0, temperature=0.7)
    check(kernel, case_of(capped, PolicyLoss.preset("dapo")), entropy=False, inplace=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_types_and_options(either, dtype, softcap, entropy):
    inputs = random_inputs(dtype, (1, 2), 131, softcap=softcap, temperature=0.7)
    loss = LOSS if entropy else PolicyLoss.preset("dapo")
    check(either, case_of(inputs, loss), entropy=entropy)


def test_a_large_vocabulary(kernel):
    check(kernel, case_of(random_inputs(torch.bfloat16, (1,), 50257)))


def test_a_large_vocabulary_in_fp32(either):
    check(either, case_of(random_inputs(torch.float32, (1,), 50257)), inplace=False)


def test_a_row_in_the_cluster_that_a_gpu_gives_it(built):
    blocks, _, threads, _ = built.plan_cluster(151936, 8, 232448 - 416)
    assert (blocks, threads) == (4, 256)
    kernel = EmulatedPolicyRows(built, blocks)
    check(kernel, case_of(random_inputs(torch.bfloat16, (1,), 151936, softcap=30.0)))


@pytest.mark.parametrize("tokens", [(), (0,), (1,), (3,), (0, 4), (2, 3)])
def test_leading_shapes(either, tokens):
    check(either, case_of(random_inputs(torch.bfloat16, tokens, 50)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_alignment(either, dtype):
    """A row at any element's address, in a buffer whose other elements are NaN; and the result of
    an aligned copy, bit by bit, since sums run over the same elements in the same order."""
    dense = case_of(random_inputs(dtype, (1, 2), 1003))
    expected = check(either, dense, inplace=False)
    for offset in range(16 // dense.inputs.logits.element_size()):
        stride = 1003 + 8 + offset
        buffer = torch.full((2 * stride + offset + 2000,), torch.nan, dtype=dtype)
        rows = buffer.as_strided((1, 2, 1003), (2 * stride, stride, 1), offset)
        rows.copy_(dense.inputs.logits)
        strided = replace(dense, inputs=replace(dense.inputs, logits=rows))
        assert same(run(either, strided), expected)
        before = buffer.clone()
        assert same(run(either, strided, out=rows), expected)
        assert torch.equal(buffer.isnan(), before.isnan()), "written outside the rows"


@pytest.mark.parametrize("vocab", [5, 1001, 1003])
def test_a_gradient_aligned_otherwise(either, vocab):
    """Sequences cut from [B, T + 1, V], and a gradient that begins at any element."""
    whole = random_inputs(torch.bfloat16, (2, 3), vocab)
    view = Inputs(whole.logits[:, :-1], whole.ids[:, 1:])
    dense = case_of(Inputs(view.logits.contiguous(), view.ids))
    expected = run(either, dense)
    for offset in range(0, 8, 3):
        buffer = torch.full((4 * vocab + 64,), torch.nan, dtype=torch.bfloat16)
        out = buffer[offset : offset + 4 * vocab].view(2, 2, vocab)
        assert same(run(either, replace(dense, inputs=view), out=out), expected)
        assert buffer[:offset].isnan().all() and buffer[offset + 4 * vocab :].isnan().all()


def test_nothing_outside_a_row_is_read(kernel):
    """Under the address sanitizer (sanitize.sh) a read of what lies around the row ends the
    process."""
    dense = case_of(random_inputs(torch.bfloat16, (1,), 1003))
    expected = run(kernel, dense)
    buffer = torch.full((1003 + 64,), torch.nan, dtype=torch.bfloat16)
    row = buffer[8:1011].view(1, 1003)
    row.copy_(dense.inputs.logits)
    case = replace(dense, inputs=replace(dense.inputs, logits=row))
    with unreadable(buffer[:8]), unreadable(buffer[1012:]):  # 8 bytes are its grain
        assert same(run(kernel, case), expected)


def test_several_grids(kernel):
    """More rows than one grid may have, with the limit set to two rows."""
    case = case_of(random_inputs(torch.bfloat16, (3,), 300))
    expected = run(kernel, case)
    kernel.max_blocks = 2 * max(kernel.blocks, 1)
    assert same(run(kernel, case), expected)


def test_bits_do_not_depend_on_the_batch(either):
    inputs = random_inputs(torch.float16, (4,), 3001)
    case = case_of(inputs)
    first = run(either, case)
    assert same(run(either, case), first)
    alone = Case(
        Inputs(inputs.logits[2:3].clone(), inputs.ids[2:3]), case.tokens.rows(slice(2, 3)), LOSS
    )
    assert same(run(either, alone), [x[2:3] for x in first])


# ---- the loss ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEPARABLE)
def test_losses(either, name, monkeypatch):
    """Every surrogate that is separable, through PolicyLoss.from_logits."""
    loss = LOSSES[name]
    batch = HeadBatch(loss, sequences=3, length=4, vocab=67, per_token=name == "ppo")

    def instead(backend, logits, grad, rows, tokens, return_entropy):
        return either.run(logits, grad, rows, tokens, return_entropy)

    monkeypatch.setattr(operator, "run", instead)
    with rlkern.use_backend("native"):
        found = from_logits(loss, batch, 1.5, 0.8, inplace=True)
    for mine, truth in zip(found, in_steps(loss, batch, 1.5, 0.8), strict=True):
        near(mine, truth)
    assert either.calls == 1


def test_as_the_cpu_does(either):
    """Within twice the bound of each."""
    case = case_of(random_inputs(torch.float32, (6,), 5003))
    logprobs, entropy, upstream, gradient = run(either, case)
    out = torch.empty_like(case.inputs.logits)
    args = (case.inputs.logits, out, *case.rows(), *case.tokens, True)
    of_cpu = torch.ops.rlkern.policy_rows(*args)
    bound, spread = 2 * sum_bound(case.inputs), 1 + math.log(5003)
    close(logprobs, of_cpu[0], bound + 8 * U * logprobs.abs())
    close(entropy, of_cpu[1], bound * spread)
    # An upstream gradient moves with the log-probability as r A does, |r A| < 16.
    close(upstream, of_cpu[2], 32 * bound + 512 * U * (2 + upstream.abs()))
    size = upstream.abs().sum(-1, keepdim=True) * (40 + spread)
    close(gradient, out, (33 * bound * size + 1000 * U * (2 + size)))


# ---- arguments --------------------------------------------------------------------------------


def test_masked_rows_are_not_read(kernel):
    inputs = random_inputs(torch.bfloat16, (4,), 1300)
    inputs.mask = torch.tensor([True, False, True, False])
    inputs.token_temperature = torch.tensor([0.5, torch.nan, 1.0, -1.0])
    case = case_of(inputs)
    inputs.logits[1] = torch.nan
    inputs.logits[3, ::2] = torch.inf
    inputs.ids[1], inputs.ids[3] = -100, 1307
    for tensor in (*case.tokens[:5], case.tokens.scales):
        tensor[1] = torch.nan
    outputs = run(kernel, case)
    for result in outputs:
        assert (result[1] == 0).all() and (result[3] == 0).all()
    kept = [0, 2]
    counting = Case(
        Inputs(inputs.logits[kept], inputs.ids[kept], None, inputs.token_temperature[kept]),
        case.tokens.rows(torch.tensor(kept)),
        LOSS,
    )
    for found, expected in zip(outputs, check(kernel, counting), strict=True):
        assert torch.equal(found[kept], expected)


def test_strided_row_arguments(either):
    inputs = random_inputs(torch.float32, (3, 4), 60)
    inputs.mask = torch.rand(4, 3).gt(0.4).t()
    inputs.token_temperature = torch.rand(3, 8)[:, ::2] + 0.3
    inputs.ids = torch.stack([inputs.ids, inputs.ids], -1)[..., 0]
    check(either, case_of(inputs))


@pytest.mark.parametrize("temperature", [0.0, -1.0, torch.nan, torch.inf])
def test_a_temperature_that_is_not_positive_gives_nan(either, temperature):
    inputs = random_inputs(torch.bfloat16, (3,), 400)
    case = case_of(inputs)
    inputs.token_temperature = torch.tensor([1.0, temperature, 2.0])
    for result in run(either, case, inplace=True):
        assert result[::2].isfinite().all()
    logprobs, entropy, _, gradient = run(either, case)
    assert logprobs[1].isnan() and entropy[1].isnan() and gradient[1].isnan().all()


@pytest.mark.parametrize("offence", [-1, 400, -(2**62), 2**62])
def test_an_id_outside_gives_nan_in_its_row(either, offence):
    inputs = random_inputs(torch.bfloat16, (3,), 400)
    case = case_of(inputs)
    right = run(either, case)
    inputs.ids[1] = offence
    logprobs, entropy, upstream, gradient = run(either, case)
    assert logprobs[1].isnan() and gradient[1].isnan().all() and entropy[1].isfinite()
    for found, expected in zip((logprobs, entropy, upstream, gradient), right, strict=True):
        assert torch.equal(found[::2], expected[::2])


# ---- extreme values ---------------------------------------------------------------------------


def test_a_margin_of_17_nats(kernel):
    """One competitor 17 nats below the answer: -4.1e-8, where z - logsumexp would give 0."""
    logits = torch.full((2, 1000), -torch.inf, dtype=torch.bfloat16)
    logits[:, 3], logits[:, 900] = 25.0, 8.0
    case = case_of(Inputs(logits, torch.tensor([3, 900])))
    logprobs = check(kernel, case)[0]
    assert logprobs[0].item() == pytest.approx(-math.log1p(math.exp(-17)), rel=1e-5)


@pytest.mark.parametrize("softcap", [None, 10.0])
def test_tokens_that_cannot_be_drawn(either, softcap):
    inputs = random_inputs(torch.bfloat16, (5,), 240, softcap=softcap)
    inputs.logits[0, 1::2] = -torch.inf
    inputs.ids[0] &= -2
    inputs.logits[1] = -torch.inf  # none can
    inputs.logits[2, inputs.ids[2]] = -torch.inf  # the chosen one cannot
    inputs.logits[3] = -torch.inf
    inputs.logits[3, inputs.ids[3]] = 2.0  # nothing but the chosen one
    inputs.logits[4] = -torch.inf
    inputs.logits[4, (inputs.ids[4] + 1) % 240] = 2.0  # nothing but another
    # Without a KL or an entropy term: of a log-probability of -inf these are infinite.
    found = check(either, case_of(inputs, PolicyLoss.preset("dapo")))
    if softcap is None:
        assert found[0][1:].tolist() == [-math.inf, -math.inf, 0.0, -math.inf]
        assert (found[3][1:] == 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_a_number_shows_in_its_row_alone(either, value):
    case = case_of(random_inputs(torch.bfloat16, (4,), 3000))
    right = run(either, case)
    case.inputs.logits[0, 2999] = value
    case.inputs.logits[2, case.inputs.ids[2]] = value
    found = run(either, case)
    for mine, expected in zip(found, right, strict=True):
        assert torch.equal(mine[1::2], expected[1::2])
    for mine in (found[0], found[1], found[3]):
        assert mine[0].isnan().all() and mine[2].isnan().all()


def test_large_logits(either):
    inputs = random_inputs(torch.float32, (4,), 1100)
    inputs.logits[0] += 1e4
    inputs.logits[1] -= 1e4
    inputs.logits[2, ::2] = 1e4
    inputs.ids[2] &= -2
    inputs.logits[3, 5] = 1e4
    inputs.ids[3] = 5
    check(either, case_of(inputs))

"""The policy loss's CUDA kernels on a GPU: what no test without one can see."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import gpu
import pytest
import torch

import rlkern
from rlkern import PolicyLoss
from rlkern.losses import PRESETS
from rlkern.ops import policy_loss as operator

sys.path.append(str(Path(__file__).parents[1] / "losses"))
from batches import call, close, random_batch, used_by  # noqa: E402

pytestmark = gpu.MARKS
TOLERANCE = 1e-5  # as in test_policy_loss_emulated.py


@pytest.fixture(autouse=True)
def native():
    with rlkern.use_backend("native"):
        yield


def batch_of(B, T, loss, **options):
    batch = random_batch(B, T, **options)
    for name in ("token_weights", "rollout_logprobs"):
        del batch[name]
    return used_by(loss, batch)


def on_gpu(batch):
    return {n: x.cuda() for n, x in batch.items()}


def needed(loss):
    return {"normalizer": 37.0} if loss.aggregation == "seq_mean_token_sum_norm" else {}


def call_on_gpu(loss, batch, **given):
    return call(loss, on_gpu(batch), **given)


def near(actual, expected, message):
    if math.isnan(expected):
        assert math.isnan(actual), message
    elif actual != expected:
        error = abs(actual - expected)
        assert error <= TOLERANCE * (1 + abs(expected)), (message, actual, expected)


def compare(actual, expected):
    near(float(actual.loss), float(expected.loss), "loss")
    close(actual.grad.cpu(), expected.grad.cpu(), TOLERANCE, "gradient ")
    if actual.entropy_grad is not None:
        close(actual.entropy_grad.cpu(), expected.entropy_grad.cpu(), 4e-6, "entropy gradient ")
    found, wanted = actual.metrics.item_dict(), expected.metrics.item_dict()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        near(found[name], value, name)


def in_double(loss, batch, **given):
    with rlkern.use_backend("eager"):
        return call(loss, on_gpu(batch), torch.float64, **given)


@pytest.mark.parametrize("per_token", [False, True], ids=["A[B]", "A[B,T]"])
@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset, per_token):
    loss = PolicyLoss.preset(preset, kl_coef=0.1, entropy_coef=0.01)
    batch = batch_of(5, 1000, loss, per_token=per_token, seed=len(preset))
    compare(call_on_gpu(loss, batch, **needed(loss)), in_double(loss, batch, **needed(loss)))


@pytest.mark.parametrize("preset", ["dapo", "gspo", "gmpo"])
def test_packed(preset):
    loss = PolicyLoss.preset(preset)
    batch = {n: x[0] for n, x in batch_of(1, 700, loss, per_token=True).items()}
    offsets = torch.tensor([0, 0, 1, 300, 300, 699, 700, 700])
    batch["cu_seqlens"] = offsets
    compare(call_on_gpu(loss, batch), in_double(loss, batch))


@pytest.mark.parametrize("shape", [(1, 1_000_001), (100_000, 3), (3, 1), (0, 4), (3, 0)], ids=str)
def test_long_many_and_none(shape):
    """Log-ratios are small, so that a long sequence's sums stay within what fp32 terms allow."""
    B, T = shape
    loss = PolicyLoss.preset("grpo")
    batch = batch_of(B, max(T, 1), loss, spread=0.1, empty=False)
    batch = {n: x[:, :T] if x.dim() == 2 else x for n, x in batch.items()}
    compare(call_on_gpu(loss, batch), in_double(loss, batch))


def test_outputs_are_written_whatever_memory_held():
    """The caching allocator hands out what was freed: NaN."""
    loss = PolicyLoss.preset("gspo", entropy_coef=0.1)
    batch = on_gpu(batch_of(64, 300, loss))
    for _ in range(3):
        gpu.poison_freed_memory(1, 2, 64, 4096, *[batch["logprobs"].numel()] * 4)
        called = call(loss, batch)
        assert called.loss.isfinite() and called.grad.isfinite().all()
        assert called.entropy_grad.isfinite().all()


def test_the_same_call_twice_and_a_sequence_alone():
    loss = PolicyLoss.preset("gspo", aggregation="seq_mean_token_sum")
    batch = on_gpu(batch_of(300, 700, loss))
    first, again = call(loss, batch), call(loss, batch)
    assert torch.equal(first.loss, again.loss) and torch.equal(first.grad, again.grad)
    assert first.metrics.item_dict() == again.metrics.item_dict()
    alone = call(loss, {n: x[123:124] for n, x in batch.items()}, num_sequences=300.0)
    assert torch.equal(first.grad[123:124], alone.grad)


def test_garbage_under_the_mask_changes_nothing():
    for preset in PRESETS:
        loss = PolicyLoss.preset(preset)
        batch = on_gpu(batch_of(4, 50, loss))
        names = ("logprobs", "old_logprobs", "ref_logprobs", "entropy")
        dirty = {
            n: x.masked_fill(~batch["mask"], math.nan) if n in names else x
            for n, x in batch.items()
        }
        a, b = call(loss, batch, **needed(loss)), call(loss, dirty, **needed(loss))
        assert torch.equal(a.loss, b.loss) and torch.equal(a.grad, b.grad), preset


def test_wrong_offsets_give_nan():
    loss = PolicyLoss.preset("gspo")
    options = operator.options(loss, operator.Denominators(None, None, None))
    for offsets in ([0, -5, 7, 12], [0, 9, 5, 12], [0, 5, 9, 2**60], [0, 5, 9, 11]):
        tensors = [torch.randn(12, device="cuda"), torch.randn(12, device="cuda"), None]
        tensors += [torch.randn(12, device="cuda"), *[None] * 5]
        tensors += [torch.tensor(offsets, device="cuda"), None, None, None]
        out = torch.ops.rlkern.policy_loss(*tensors, options, True, False)
        assert out[0].isnan() and out[4].isnan().all()


def test_the_current_stream_is_used():
    loss = PolicyLoss.preset("gspo")
    batch = on_gpu(batch_of(64, 4096, loss))
    expected = call(loss, batch).loss
    found = gpu.on_another_stream(
        batch.values(), lambda *late: call(loss, dict(zip(batch, late, strict=True))).loss
    )
    assert torch.equal(found, expected)


@gpu.needs_two_gpus
def test_the_tensors_device_is_used():
    loss = PolicyLoss.preset("gspo")
    batch = batch_of(8, 100, loss)
    expected = call(loss, on_gpu(batch))
    found = call(loss, {n: x.to("cuda:1") for n, x in batch.items()})
    assert torch.cuda.current_device() == 0 and found.grad.device.index == 1
    assert torch.equal(found.grad.cpu(), expected.grad.cpu())


def test_nothing_waits_for_the_gpu():
    loss = PolicyLoss.preset("grpo", entropy_coef=0.1)
    batch = on_gpu(batch_of(8, 500, loss))
    logprobs = batch.pop("logprobs").requires_grad_()
    advantages = batch.pop("advantages")
    normalizer = torch.tensor(100.0, device="cuda")

    def step():
        out = loss(logprobs, advantages, num_sequences=normalizer, **batch)
        out.loss.backward()
        return out.metrics["clip_frac"]  # stays on the GPU

    gpu.assert_nothing_waits(step)


def test_graph_capture():
    loss = PolicyLoss.preset("gspo")
    options = operator.options(loss, operator.Denominators(None, None, None))
    batch = on_gpu(batch_of(16, 300, loss))
    static = batch["logprobs"].clone()
    upstream = torch.tensor(1.5, device="cuda")

    def step():
        tensors = [static, batch["advantages"], batch["mask"], batch["old_logprobs"]]
        tensors += [None] * 9
        out = torch.ops.rlkern.policy_loss(*tensors, options, True, False)
        grads = torch.ops.rlkern.policy_loss_bwd(upstream, *out[2:])
        return out[0], out[1], grads[0]

    graph, captured = gpu.captured(step)
    for shift in (0.0, 0.01):
        static.copy_(batch["logprobs"] + shift)
        graph.replay()
        for a, b in zip(captured, step(), strict=True):
            assert torch.equal(a, b)


def test_against_the_emulated_kernels():
    """The same code on a CPU: exp and log differ in their last bits, and no more."""
    from emulated_kernels import why_not
    from emulated_policy import emulated_policy

    if reason := why_not():
        pytest.skip(reason)
    kernels = emulated_policy()
    kernels.threads = 256
    loss = PolicyLoss.preset("gspo")
    options = operator.options(loss, operator.Denominators(None, None, None))
    batch = batch_of(4, 500, loss)
    tensors = [batch[n] for n in ("logprobs", "advantages", "mask", "old_logprobs")]
    args = [*tensors, *[None] * 9]
    expected = kernels.forward(*args, options, True, False)
    args = [x if x is None else x.cuda() for x in args]
    found = torch.ops.rlkern.policy_loss(*args, options, True, False)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-6)


def test_opcheck():
    loss = PolicyLoss.preset("grpo")
    options = operator.options(loss, operator.Denominators(None, None, None))
    batch = on_gpu(batch_of(3, 20, loss))
    logprobs = batch["logprobs"].requires_grad_()
    tensors = [logprobs, batch["advantages"], batch["mask"], batch["old_logprobs"]]
    tensors += [batch["ref_logprobs"], *[None] * 8]
    torch.library.opcheck(torch.ops.rlkern.policy_loss.default, (*tensors, options, True, False))


def test_compiles_whole():
    loss = PolicyLoss.preset("dapo", kl_coef=0.1)
    batch = on_gpu(batch_of(4, 100, loss))
    advantages, logprobs = batch.pop("advantages"), batch.pop("logprobs")

    def run(x):
        return loss(x, advantages, **batch).loss

    gpu.assert_compiles_whole(run, logprobs)


def test_tensors_of_two_devices_are_refused():
    loss = PolicyLoss.preset("dapo")
    options = operator.options(loss, operator.Denominators(None, None, None))
    x = torch.randn(4, 5, device="cuda")
    for place, value in (
        (1, torch.randn(4)),
        (3, torch.randn(4, 5)),
        (10, torch.tensor(1.0, dtype=torch.float64)),
    ):
        tensors = [x, torch.randn(4, device="cuda"), *[None] * 11]
        tensors[place] = value
        with pytest.raises(RuntimeError, match="device"):
            torch.ops.rlkern.policy_loss(*tensors, options, True, False)

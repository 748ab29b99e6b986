"""The GPU benchmark's case, on the CPU: its inputs, its judgement, and how it calls the peers."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch.utils._pytree import tree_map

import rlkern
from benchmarks.gpu import bench_token_logprobs as bench
from benchmarks.gpu import contestants, registry, run
from rlkern import _native

pytestmark = pytest.mark.skipif(bool(_native.problems["cpu"]), reason="_C is absent")


@pytest.fixture
def case():
    return bench.TokenLogprobs("cpu", True)


def right(errors):
    return all(value <= limit for value, limit in errors.values())


def judged(case, task, build):
    return case.errors(task, build()(*case.prepare(task)))


def test_no_contestant_sees_what_another_wrote(case):
    """The backward in place leaves gradients where the logits were."""
    assert right(judged(case, bench.INPLACE, bench.ours_inplace("native")))
    for task, build in (
        (bench.BOTH, bench.with_backward(bench.ours("native"))),
        (bench.FORWARD, bench.no_grad(bench.ours("native"))),
        (bench.ENTROPY, bench.no_grad(bench.ours("native", entropy=True))),
    ):
        assert right(judged(case, task, build)), task
        case.logits.zero_()


def test_wrong_results_are_seen(case):
    def off(logits, ids, *_):
        return rlkern.token_logprobs(logits, ids) * (1 + 1e-3)

    assert not right(judged(case, bench.FORWARD, lambda: off))
    both = bench.with_backward(lambda: lambda x, ids: rlkern.token_logprobs(x, ids) * 1.02)
    found = judged(case, bench.BOTH, both)
    assert all(value > limit for value, limit in found.values()), found


def selective(logits, input_ids, temperature=0.9, mask=None):
    """As liger_kernel.ops.grpo_loss.fused_selective_log_softmax: no gradient, and the last row of a
    sequence predicts what is not asked for."""
    assert logits.is_contiguous() and mask is None
    with torch.no_grad():
        z = logits[:, :-1].float() / temperature
        ids = input_ids[:, -z.shape[1] :, None]
        return z.log_softmax(-1).gather(-1, ids).squeeze(-1)


class OverTheLogits(torch.autograd.Function):
    """As Liger's cross entropy: the gradient is written over the logits in the forward pass."""

    @staticmethod
    def forward(ctx, logits, ids):
        loss = torch.nn.functional.cross_entropy(logits.float(), ids, reduction="none")
        if logits.requires_grad:
            logits.copy_(logits.float().softmax(-1) - torch.eye(logits.shape[1])[ids])
            ctx.save_for_backward(logits.detach())
        return loss.to(logits.dtype)

    @staticmethod
    def backward(ctx, g):
        return ctx.saved_tensors[0] * g[:, None], None


def over_the_logits(input, target, weight=None, size_average=None, ignore_index=-100, reduce=None,
                    reduction="mean"):  # fmt: skip
    assert reduction == "none"
    return OverTheLogits.apply(input, target)


def flash(logits, labels, precomputed_lse=None, label_smoothing=0.0, logit_scale=1.0):
    losses = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    return losses, torch.zeros_like(losses)


def quack(x, target, lse_partial=None, weight=None, ignore_index=-100, reduction="mean"):
    return torch.nn.functional.cross_entropy(x.float(), target, reduction=reduction)


def trl(logits, index, temperature=1.0, row_mask=None):
    logp = logits.float().log_softmax(-1) / temperature
    entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(-1, index[..., None]).squeeze(-1), entropy


# Where each peer's function stands, and one of the same signature and meaning for the CPU.
STAND_INS = {
    "liger_kernel.ops.grpo_loss": {"fused_selective_log_softmax": selective},
    "liger_kernel.transformers.functional": {"liger_cross_entropy": over_the_logits},
    "flash_attn.ops.triton.cross_entropy": {"cross_entropy_loss": flash},
    "quack": {"cross_entropy": quack},
    "trl.kernels.logprob_entropy": {"selective_log_softmax_and_entropy": trl},
}


@pytest.mark.parametrize(
    "contestant",
    [c for c in bench.TokenLogprobs.contestants if not c.ours and c.dry],
    ids=lambda c: f"{c.task}/{c.name}",
)
def test_peers_are_called_as_their_signatures_say(case, contestant, monkeypatch):
    for path, functions in STAND_INS.items():
        parts = path.split(".")
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        vars(sys.modules[path]).update(functions)
    for _ in range(2):
        found = judged(case, contestant.task, contestant.build)
        assert right(found), found


@pytest.mark.parametrize("case_type", registry.discover(), ids=lambda case: case.operator)
def test_every_case_knows_right_from_wrong(case_type, monkeypatch):
    """Of what eager PyTorch and what ours, on whichever backend this machine has, give."""
    monkeypatch.setattr(contestants, "on_backend", lambda backend, ours: ours)
    case = case_type("cpu", True)
    assert case.bytes_moved(case.contestants[0].task) > 0 and case.shape()
    judged_tasks = set()
    for contestant in case.contestants:
        if not contestant.dry or contestant.name not in ("eager", "rlkern native"):
            continue
        outputs = contestant.build()(*case.prepare(contestant.task))
        errors = case.errors(contestant.task, outputs)
        assert right(errors), (contestant, errors)
        if contestant.name == "eager":
            judged_tasks.add(contestant.task)
            wrong = tree_map(lambda x: x * 1.1, outputs)
            assert not right(case.errors(contestant.task, wrong)), contestant
    assert judged_tasks


def test_a_case_that_cannot_be_made_leaves_the_others_to_be_measured(monkeypatch):
    """As one whose inputs do not fit into the GPU's memory."""

    class Large(bench.TokenLogprobs):
        operator = "large"

        def __init__(self, device, tiny):
            raise MemoryError("no room")

    class Small(bench.TokenLogprobs):
        contestants = (registry.Contestant(bench.FORWARD, "eager", lambda: bench.eager),)

    monkeypatch.setattr(registry, "discover", lambda: [Large, Small])
    said = []
    run.work("cpu", True, set(), said.append)
    entries = {line["key"]: line["entry"] for line in said if "key" in line}
    assert entries.pop("token_logprobs/forward/eager")["status"] == "ok"
    assert entries and {e["reason"] for e in entries.values()} == {"MemoryError: no room"}

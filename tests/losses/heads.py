"""Batches from hidden states, and the same loss computed in steps in float64."""

from __future__ import annotations

import torch

import rlkern
from rlkern import PolicyLoss, RolloutCorrection

D = 12
RTOL = 2e-5  # test_policy_heads.py says why
#: Name -> (loss, arguments of the call that it needs besides).
LOSSES = {
    "ppo": PolicyLoss.preset("ppo", dual_clip=3.0),
    "grpo": PolicyLoss.preset("grpo", entropy_coef=0.01),
    "dr_grpo": PolicyLoss.preset("dr_grpo", kl_coef=0.1, kl_estimator="k2"),
    "dapo, corrected": PolicyLoss.preset("dapo", correction=RolloutCorrection()),
    "dapo, entropy as the rest": PolicyLoss.preset(
        "dapo", entropy_coef=0.02, entropy_aggregation="same"
    ),
    "bnpo, per sequence": PolicyLoss.preset(
        "bnpo", aggregation="seq_mean_token_mean", skip_empty=True
    ),
    "cispo": PolicyLoss.preset("cispo"),
    "sapo": PolicyLoss.preset("sapo", kl_coef=0.1, kl_ratio_weighted=True),
    "dppo_kl": PolicyLoss.preset("dppo_kl"),
    "dppo_tv": PolicyLoss.preset("dppo_tv", aggregation="token_sum"),
    "reinforce": PolicyLoss.preset("reinforce", entropy_coef=0.01),
    # These couple the tokens of a sequence.
    "gspo": PolicyLoss.preset("gspo", clip_low=0.05, clip_high=0.05, kl_coef=0.1),
    "rloo": PolicyLoss.preset("rloo"),
    "gmpo": PolicyLoss.preset("gmpo", entropy_coef=0.01),
    "vespo": PolicyLoss.preset("vespo"),
    "off policy": PolicyLoss.preset("dapo", off_policy_threshold=0.05),
}
SEPARABLE = tuple(LOSSES)[:11]


class HeadBatch:
    """hidden, weight, token_ids, advantages and the arguments of a call."""

    def __init__(
        self,
        loss: PolicyLoss,
        *,
        sequences=4,
        length=19,
        vocab=101,
        packed=False,
        per_token=False,
        dtype=torch.float32,
    ):
        shape = (sequences, length)
        self.hidden = torch.randn(*shape, D).to(dtype)
        self.weight = (torch.randn(vocab, D) / 2).to(dtype)
        self.ids = torch.randint(vocab, shape)
        # The mask has holes, and one sequence is empty.
        mask = torch.rand(shape) < 0.8
        mask[1:2] = False
        self.advantages = torch.randn(shape if per_token else (sequences,))
        # Half a nat around the policy that is differentiated, so that some ratios are clipped.
        logits = (self.hidden.double() @ self.weight.double().t()).log_softmax(-1)
        logprobs = logits.gather(-1, self.ids[..., None]).squeeze(-1).float()

        def near(spread):
            return (logprobs + spread * torch.randn(shape)).clamp(max=-1e-3)

        self.given = {"old_logprobs": near(0.3), "mask": mask}
        if loss.kl_coef:
            self.given["ref_logprobs"] = near(0.5)
        if loss.correction is not None:
            self.given["rollout_logprobs"] = near(0.3)
        if loss.aggregation == "seq_mean_token_sum_norm":
            self.given["normalizer"] = 30.0
        if loss.surrogate != "gmpo":
            self.given["token_weights"] = torch.rand(shape)
        if packed:
            self._pack(sequences, length, per_token)

    def _pack(self, sequences, length, per_token):
        """Without the last tokens of each sequence, a different number each."""
        keep = torch.arange(length) < (length - 3 * torch.arange(sequences))[:, None]
        self.hidden, self.ids = self.hidden[keep], self.ids[keep]
        if per_token:
            self.advantages = self.advantages[keep]
        for name, value in self.given.items():
            if isinstance(value, torch.Tensor):
                self.given[name] = value[keep]
        ends = keep.sum(1).cumsum(0)
        self.given["cu_seqlens"] = torch.cat([torch.zeros(1), ends]).int()


def in_steps(loss, batch, upstream=1.0, temperature=1.0):
    """Loss, metrics' vector, gradients of logits, hidden and weight, in float64 eager PyTorch."""
    hidden, weight = (x.double().clone().requires_grad_() for x in (batch.hidden, batch.weight))
    logits = hidden @ weight.t()
    logits.retain_grad()
    log_p = (logits / temperature).log_softmax(-1)
    logprobs = log_p.gather(-1, batch.ids[..., None]).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    given = {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in batch.given.items()
    }
    with rlkern.use_backend("eager"):
        out = loss(logprobs, batch.advantages.double(), entropy=entropy, **given)
    (upstream * out.loss).backward()
    return out.loss.detach(), out.metrics.vector, logits.grad, hidden.grad, weight.grad


def near(actual, expected, rtol=RTOL):
    """In the largest entry, with infinities in the same places."""
    actual = actual.double()
    finite = expected.isfinite()
    assert torch.equal(actual[~finite], expected[~finite])
    if finite.any():
        error = (actual - expected)[finite].abs().max()
        assert error <= rtol * expected[finite].abs().max().clamp(min=1e-3), (error, rtol)


def from_logits(loss, batch, upstream=1.0, temperature=1.0, **options):
    hidden, weight = (x.clone().requires_grad_() for x in (batch.hidden, batch.weight))
    logits = hidden @ weight.t()
    seen = []
    logits.register_hook(seen.append)
    out = loss.from_logits(
        logits, batch.ids, batch.advantages, temperature=temperature, entropy=True, **options,
        **batch.given,
    )  # fmt: skip
    (upstream * out.loss).backward()
    return out.loss.detach(), out.metrics.vector, seen[0], hidden.grad, weight.grad


def from_hidden(loss, batch, upstream=1.0, temperature=1.0, **options):
    hidden, weight = (x.clone().requires_grad_() for x in (batch.hidden, batch.weight))
    out = loss.from_hidden(
        hidden, weight, batch.ids, batch.advantages, temperature=temperature, entropy=True,
        **{"memory_budget": 1} | options, **batch.given,
    )  # fmt: skip
    (upstream * out.loss).backward()
    vector = out.metrics.vector if out.metrics is not None else None
    return out.loss.detach(), vector, hidden.grad, weight.grad


def opcheck_all(monkeypatch, names, run):
    """Runs torch's opcheck on each call of the operators of these names that `run` makes."""
    calls = []
    for name in names:
        packet = getattr(torch.ops.rlkern, name)
        monkeypatch.setattr(
            torch.ops.rlkern, name, lambda *args, packet=packet: calls.append((packet, args)) or
            packet(*args),
        )  # fmt: skip
    run()
    monkeypatch.undo()
    assert {packet for packet, _ in calls} == {getattr(torch.ops.rlkern, n) for n in names}
    for packet, args in calls:
        args = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
                for x in args]  # fmt: skip
        torch.library.opcheck(packet, args)
    return len(calls)


def single(dtype):
    """The kernels' tests run in fp32; the fp64 backend runs in fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32

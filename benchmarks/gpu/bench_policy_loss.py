"""policy_loss on a GPU: dapo with a k3 KL term and gspo, forward and backward with every metric,
beside the few lines of eager PyTorch that a trainer has for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.contestants import usual, with_gradient
from benchmarks.gpu.registry import GpuCase, register

DAPO = "dapo, k3 KL, forward + backward"
GSPO = "gspo, forward + backward"
KL_COEF = 0.04
#: Those whose values are held to float64.
METRICS = ("policy_loss", "approx_kl", "kl", "clip_frac_low", "clip_frac_high", "ratio_mean")


def objective(task: str):
    from rlkern import PolicyLoss

    if task == DAPO:
        return PolicyLoss.preset("dapo", kl_coef=KL_COEF)
    return PolicyLoss.preset("gspo")


def ours(task: str):
    def call(logprobs, advantages, old, ref, mask):
        loss = objective(task)
        return loss(
            logprobs,
            advantages,
            old_logprobs=old,
            ref_logprobs=ref if loss.kl_coef else None,
            mask=mask,
        )

    return call


# ---- eager, as trainers write it ----------------------------------------------------------------


def eager_dapo(logprobs, advantages, old, ref, mask):
    m, A = mask.to(logprobs.dtype), advantages[:, None]
    tokens = m.sum().clamp(min=1)
    d = logprobs - old
    ratio = d.exp()
    policy = -torch.min(ratio * A, ratio.clamp(0.8, 1.28) * A)
    x = ref - logprobs
    kl = x.exp() - x - 1
    loss = ((policy + KL_COEF * kl) * m).sum() / tokens
    with torch.no_grad():
        low = ((ratio < 0.8) & (A < 0)).to(m.dtype) * m
        high = ((ratio > 1.28) & (A > 0)).to(m.dtype) * m
        metrics = {
            "policy_loss": (policy * m).sum() / tokens,
            "kl": (kl * m).sum() / tokens,
            "clip_frac_low": low.sum() / tokens,
            "clip_frac_high": high.sum() / tokens,
            "ratio_mean": (ratio * m).sum() / tokens,
            "ratio_min": ratio.where(mask, torch.inf).min(),
            "ratio_max": ratio.where(mask, -torch.inf).max(),
        }
        return loss, metrics | common(d, m, low, high)


def eager_gspo(logprobs, advantages, old, ref, mask):
    m, A = mask.to(logprobs.dtype), advantages[:, None]
    length = m.sum(1).clamp(min=1)
    d = logprobs - old
    ratio = ((d * m).sum(1) / length).exp()[:, None]
    policy = -torch.min(ratio * A, ratio.clamp(1 - 3e-4, 1 + 4e-4) * A)
    loss = ((policy * m).sum(1) / length).mean()
    with torch.no_grad():
        low = ((ratio < 1 - 3e-4) & (A < 0)).to(m.dtype) * m
        high = ((ratio > 1 + 4e-4) & (A > 0)).to(m.dtype) * m
        metrics = {
            "policy_loss": loss,
            "clip_frac_low": (low.sum(1) / length).mean(),
            "clip_frac_high": (high.sum(1) / length).mean(),
            "ratio_mean": ratio.mean(),
            "ratio_min": ratio.min(),
            "ratio_max": ratio.max(),
        }
        return loss, metrics | common(d, m, low, high)


def common(d, m, low, high):
    length = m.sum(1).clamp(min=1)
    shares = {"low": low.sum(1) / length, "high": high.sum(1) / length}
    metrics = {"approx_kl": ((d.exp() - 1 - d) * m).sum() / m.sum().clamp(min=1)}
    for side, share in shares.items():
        metrics[f"clip_frac_{side}_min"] = share.min()
        metrics[f"clip_frac_{side}_max"] = share.max()
    return metrics


EAGER = {DAPO: eager_dapo, GSPO: eager_gspo}


# ---- the case -----------------------------------------------------------------------------------


def small_call(device: str, backend: str, preset: str, packed: bool, sequences: int, length: int):
    """With every tensor that there is, and garbage under the mask."""
    import rlkern
    from rlkern import PolicyLoss, RolloutCorrection

    loss = PolicyLoss.preset(
        preset,
        kl_coef=0.1,
        entropy_coef=0.01,
        off_policy_threshold=0.1,
        correction=RolloutCorrection(level="token"),
    )
    mask = torch.rand(sequences, length, device=device) < 0.7
    values = torch.where(mask, -torch.rand(6, sequences, length, device=device), torch.nan)
    rows: dict[str, Any] = {"mask": mask, "entropy_mask": mask}
    if packed:
        values, rows = values.flatten(1), {n: x.flatten() for n, x in rows.items()}
        rows["cu_seqlens"] = torch.arange(sequences + 1, device=device) * length
    names = ("old_logprobs", "ref_logprobs", "rollout_logprobs", "token_weights")
    rows |= dict(zip(names, values[2:], strict=True))
    logprobs, entropy = (x.clone().requires_grad_() for x in values[:2])
    advantages = torch.randn(sequences, device=device)
    with rlkern.use_backend(backend):
        out = loss(logprobs, advantages, entropy=entropy, **rows)
        out.loss.backward()
    assert logprobs.grad is not None and logprobs.grad.isfinite().all()
    assert entropy.grad is not None and entropy.grad.isfinite().all()


@register
class PolicyLosses(GpuCase):
    operator = "policy_loss"
    contestants = tuple(
        contestant
        for task in (DAPO, GSPO)
        for contestant in usual(task, ours(task), EAGER[task], wrap=with_gradient)
    )

    @staticmethod
    def small_calls(device: str) -> None:
        from rlkern import _backend

        for backend in ("native", "triton"):
            if _backend.why_not("policy_loss", backend, device, torch.float32):
                continue
            for preset in ("dapo", "gspo", "gmpo"):
                for sequences, length in ((3, 1), (2, 1031)):
                    for packed in (False, True):
                        small_call(device, backend, preset, packed, sequences, length)

    def __init__(self, device: str, tiny: bool) -> None:
        super().__init__(device, tiny)
        self.sequences, self.length = (4, 64) if tiny else (64, 4096)
        shape = self.sequences, self.length
        g = torch.Generator(device).manual_seed(0)

        def normal(*size):
            return torch.randn(*size, generator=g, device=device)

        self.logprobs = -normal(*shape).abs()
        # The mean over a sequence lies at both sides of gspo's bounds, some tokens beyond dapo's.
        spread = 0.1 * torch.rand(self.sequences, 1, generator=g, device=device) + 0.05
        self.old = self.logprobs + spread * normal(*shape)
        self.ref = self.logprobs + 0.1 * normal(*shape)
        self.advantages = normal(self.sequences)
        lengths = torch.randint(1, self.length + 1, (self.sequences, 1), generator=g, device=device)
        self.mask = torch.arange(self.length, device=device) < lengths

    def shape(self) -> str:
        return f"{self.sequences} x {self.length} float32"

    def bytes_moved(self, task: str) -> int:
        """Log-probabilities, old ones, with a KL the reference's, the mask; the gradient."""
        floats = 4 if task == DAPO else 3
        return self.sequences * self.length * (4 * floats + 1)

    def arguments(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaf = self.logprobs.detach().to(dtype).requires_grad_()
        return leaf, self.advantages.to(dtype), self.old.to(dtype), self.ref.to(dtype), self.mask

    def prepare(self, task: str) -> tuple[Any, ...]:
        return self.arguments(torch.float32)

    def errors(self, task: str, outputs: Any) -> dict[str, tuple[float, float]]:
        """Against the same eager lines in float64. A KL written as exp(x) - x - 1 is right in fp32
        to 1e-7 absolute. A token at a bound may fall to either side of it: one in 64 x 4096 is
        2e-3 of the gradient's norm, 4e-6 of a clip fraction."""
        loss, gradient, metrics = outputs
        wanted, exact, truth = with_gradient(EAGER[task])(*self.arguments(torch.float64))
        off = (gradient.double() - exact).norm() / exact.norm()
        found = {
            "loss": ((loss.double() - wanted).abs() / (1 + wanted.abs()), 1e-5),
            "gradient": (off, 5e-3),
        }
        for name in METRICS:
            if name in truth:
                error = (metrics[name].double() - truth[name]).abs() / (1 + truth[name].abs())
                found[name] = (error, 1e-5)
        return {name: (error.item(), limit) for name, (error, limit) in found.items()}

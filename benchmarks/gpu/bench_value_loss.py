"""value_loss and kl_penalty on a GPU, forward and backward, beside eager PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.contestants import relative, usual, with_gradient
from benchmarks.gpu.registry import GpuCase, register

BOTH = "forward + backward"


def ours_value(values, returns, old, mask):
    from rlkern import ValueLoss

    return ValueLoss(clip=0.2)(values, returns, old_values=old, mask=mask)


def eager_value(values, returns, old, mask):
    m = mask.to(values.dtype)
    tokens = m.sum().clamp(min=1)
    bounded = values.clamp(old - 0.2, old + 0.2)
    free, clipped = (values - returns) ** 2, (bounded - returns) ** 2
    loss = 0.5 * (torch.max(free, clipped) * m).sum() / tokens
    with torch.no_grad():

        def variance(x):
            mean = (x * m).sum() / tokens
            return ((x - mean) ** 2 * m).sum() / tokens

        metrics = {
            "value_loss": loss,
            "value_clip_frac": ((clipped > free) * m).sum() / tokens,
            "explained_variance": 1 - variance(returns - values) / variance(returns),
        }
    return loss, metrics


def ours_kl(logprobs, ref, mask, upstream):
    import rlkern

    kl = rlkern.kl_penalty(logprobs, ref, estimator="k3", mask=mask)
    return (kl * upstream).sum(), kl.detach()


def eager_kl(logprobs, ref, mask, upstream):
    x = ref - logprobs
    kl = (x.exp() - x - 1) * mask
    return (kl * upstream).sum(), kl.detach()


class Tokens(GpuCase):
    """Right-padded sequences of random lengths."""

    def __init__(self, device: str, tiny: bool) -> None:
        super().__init__(device, tiny)
        self.sequences, self.length = (4, 64) if tiny else (64, 4096)
        self.generator = torch.Generator(device).manual_seed(0)
        lengths = torch.randint(
            1, self.length + 1, (self.sequences, 1), generator=self.generator, device=device
        )
        self.mask = torch.arange(self.length, device=device) < lengths

    def normal(self) -> Tensor:
        shape = self.sequences, self.length
        return torch.randn(*shape, generator=self.generator, device=self.device)

    def shape(self) -> str:
        return f"{self.sequences} x {self.length} float32"


@register
class ValueLosses(Tokens):
    operator = "value_loss"
    contestants = usual(BOTH, ours_value, eager_value, backends=("native",), wrap=with_gradient)

    @staticmethod
    def small_calls(device: str) -> None:
        from rlkern import ValueLoss

        for aggregation in ("token_mean", "seq_mean_token_mean"):
            for length in (1, 1031):
                values = torch.randn(3, length, device=device, requires_grad=True)
                mask = torch.rand(3, length, device=device) < 0.7
                loss = ValueLoss(aggregation=aggregation)
                old = values.detach() + 0.1
                loss(values, torch.randn_like(old), old_values=old, mask=mask).loss.backward()

    def __init__(self, device: str, tiny: bool) -> None:
        super().__init__(device, tiny)
        self.values, self.returns = self.normal(), self.normal()
        self.old = self.values + 0.3 * self.normal()

    def bytes_moved(self, task: str) -> int:
        """Values, old ones, returns, the mask; the gradient."""
        return self.sequences * self.length * (4 * 4 + 1)

    def arguments(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaf = self.values.detach().to(dtype).requires_grad_()
        return leaf, self.returns.to(dtype), self.old.to(dtype), self.mask

    def prepare(self, task: str) -> tuple[Any, ...]:
        return self.arguments(torch.float32)

    def errors(self, task: str, outputs: Any) -> dict[str, tuple[float, float]]:
        """A token whose squares are the same to fp32 may fall to either side, and has a gradient
        or none: one of 64 x 4096 is 2e-3 of the gradient's norm, 4e-6 of the clip fraction."""
        loss, gradient, metrics = outputs
        wanted, exact, truth = with_gradient(eager_value)(*self.arguments(torch.float64))
        with torch.no_grad():
            found = {
                "loss": (float((loss.double() - wanted).abs() / wanted.abs()), 1e-5),
                "gradient": (relative(gradient, exact), 5e-3),
            }
            for name, value in truth.items():
                found[name] = (float((metrics[name].double() - value).abs()), 1e-4)
        return found


@register
class KlPenalty(Tokens):
    operator = "kl_penalty"
    contestants = usual(BOTH, ours_kl, eager_kl, backends=("native",), wrap=with_gradient)

    @staticmethod
    def small_calls(device: str) -> None:
        import rlkern

        for size in (1, 1031):
            logprobs = torch.randn(3, size, device=device, requires_grad=True)
            mask = torch.rand(3, size, device=device) < 0.7
            ref = torch.randn(3, size, device=device)
            rlkern.kl_penalty(logprobs, ref, mask=mask).sum().backward()

    def __init__(self, device: str, tiny: bool) -> None:
        super().__init__(device, tiny)
        self.logprobs = -self.normal().abs()
        self.ref = self.logprobs + 0.3 * self.normal()
        self.upstream = self.normal()

    def bytes_moved(self, task: str) -> int:
        """Both log-probabilities and the mask twice, the upstream gradient; KL and its gradient."""
        return self.sequences * self.length * (2 * (4 * 2 + 1) + 4 + 4 * 2)

    def arguments(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaf = self.logprobs.detach().to(dtype).requires_grad_()
        return leaf, self.ref.to(dtype), self.mask, self.upstream.to(dtype)

    def prepare(self, task: str) -> tuple[Any, ...]:
        return self.arguments(torch.float32)

    def errors(self, task: str, outputs: Any) -> dict[str, tuple[float, float]]:
        """exp(x) - x - 1 in fp32 is right to 1e-7 of 1, where KL is about 0.05."""
        _, gradient, kl = outputs
        _, exact, truth = with_gradient(eager_kl)(*self.arguments(torch.float64))
        return {"kl": (relative(kl, truth), 1e-5), "gradient": (relative(gradient, exact), 1e-5)}

"""PolicyLoss.from_logits on a GPU: dapo with a k3 KL term from logits of 152 thousand tokens, the
gradient over the logits or beside them, and the same in two calls of ours and in eager PyTorch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.bench_policy_loss import DAPO, eager_dapo, objective
from benchmarks.gpu.contestants import on_backend, with_gradient
from benchmarks.gpu.registry import Contestant, GpuCase, register

INPLACE = "dapo, k3 KL, gradient over the logits"
BESIDE = "dapo, k3 KL, gradient beside the logits"
# Of what is computed in fp32, and of a gradient that is then rounded to bf16, in the 2-norm.
EXACT, GRADIENT = 1e-4, 5e-3


def ours(inplace: bool):
    def call(logits, ids, advantages, old, ref, mask):
        return objective(DAPO).from_logits(
            logits, ids, advantages, inplace=inplace, old_logprobs=old, ref_logprobs=ref, mask=mask
        )

    return call


def two_calls(logits, ids, advantages, old, ref, mask):
    import rlkern

    logprobs = rlkern.token_logprobs(logits, ids, mask=mask, inplace_backward=True)
    return objective(DAPO)(logprobs, advantages, old_logprobs=old, ref_logprobs=ref, mask=mask)


def eager(logits, ids, *rest):
    logprobs = logits.float().log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    return eager_dapo(logprobs, *rest)


def contestant(task: str, name: str, call, backend: str | None = None, **options: Any):
    def build():
        return with_gradient(call if backend is None else on_backend(backend, call))

    return Contestant(task, name, build, **options)


class Made(torch.autograd.Function):
    """Logits as a model makes them, no leaf of the graph, in memory that is there already."""

    @staticmethod
    def forward(ctx: Any, cause: Tensor, memory: Tensor) -> Tensor:
        made = memory.new_empty(0)
        return made.set_(
            memory.untyped_storage(), memory.storage_offset(), memory.shape, memory.stride()
        )

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise AssertionError("the gradient is asked for at the logits")


def small_call(device: str, dtype: torch.dtype, vocab: int, softcap: float | None):
    """Rows at every alignment, some masked, the gradient over the logits and elsewhere."""
    from dataclasses import replace

    import rlkern

    loss = objective(DAPO)
    if softcap is not None:
        loss = replace(loss, entropy_coef=0.1)
    leaf = torch.randn(2, 3, vocab, device=device).to(dtype).requires_grad_()
    ids = torch.randint(vocab, (2, 3), device=device)
    mask = torch.tensor([[True, True, False], [False, True, True]], device=device)
    given = {"mask": mask, "softcap": softcap, "temperature": torch.rand(2, 3, device=device) + 0.5}
    given |= {name: -torch.rand(2, 3, device=device) for name in ("old_logprobs", "ref_logprobs")}
    with rlkern.use_backend("native"):
        for inplace in (False, True):
            leaf.grad = None
            out = loss.from_logits(
                leaf * 1, ids, torch.randn(2, device=device), inplace=inplace, **given
            )
            out.loss.backward()
            assert leaf.grad is not None and leaf.grad.isfinite().all()


@register
class FromLogits(GpuCase):
    operator = "from_logits"
    contestants = (
        contestant(INPLACE, "rlkern native", ours(True), "native", target=0.85),
        contestant(INPLACE, "rlkern triton", ours(True), "triton"),
        contestant(INPLACE, "rlkern native, two calls", two_calls, "native"),
        contestant(BESIDE, "rlkern native", ours(False), "native"),
        contestant(BESIDE, "rlkern triton", ours(False), "triton"),
        contestant(BESIDE, "eager", eager),
        Contestant(
            BESIDE,
            "torch.compile",
            lambda: with_gradient(torch.compile(eager, dynamic=False)),
            dry=False,
        ),
    )

    @staticmethod
    def small_calls(device: str) -> None:
        # On a GPU with clusters: of one block, and of 2, 4 or 8.
        vocabularies = (1, 7, 1003, 40003, 153601) if device == "cuda" else (1, 7, 1003)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for vocab in vocabularies:
                for softcap in (None, 30.0):
                    small_call(device, dtype, vocab, softcap)

    def __init__(self, device: str, tiny: bool) -> None:
        super().__init__(device, tiny)
        self.shape_ = (2, 4, 1000) if tiny else (16, 512, 151936)
        sequences, length, vocab = self.shape_
        g = torch.Generator(device).manual_seed(0)

        def normal(*size):
            return torch.randn(*size, generator=g, device=device)

        self.ids = torch.randint(vocab, (sequences, length), generator=g, device=device)
        self.pristine = torch.empty(self.shape_, dtype=torch.bfloat16, device=device)
        self.pristine.normal_(generator=g)
        # Chosen tokens from hopeless to nearly certain, as sampled text has them.
        lift = torch.rand(sequences, length, 1, generator=g, device=device)
        lift = lift.mul(math.log(vocab) + 2).bfloat16()
        self.pristine.scatter_add_(-1, self.ids[..., None], lift)
        self.logits = torch.zeros_like(self.pristine)
        self.exact = torch.cat([self.logprobs_of(i) for i in range(sequences)])
        self.old = (self.exact + 0.1 * normal(sequences, length)).float()
        self.ref = (self.exact + 0.1 * normal(sequences, length)).float()
        self.advantages = normal(sequences)
        self.mask = torch.ones(sequences, length, dtype=torch.bool, device=device)

    def logprobs_of(self, sequence: int) -> Tensor:
        """In float64, [1, length]; a few rows at a time, for their memory."""
        parts = []
        for rows, ids in zip(
            self.pristine[sequence].split(64), self.ids[sequence].split(64), strict=True
        ):
            log_p = rows.double().log_softmax(-1)
            parts.append(log_p.gather(-1, ids[:, None]).squeeze(-1))
        return torch.cat(parts)[None]

    def shape(self) -> str:
        return f"{' x '.join(map(str, self.shape_))} bfloat16"

    def bytes_moved(self, task: str) -> int:
        """One read of the logits and one write of their gradient."""
        return 2 * self.pristine.numel() * 2

    def prepare(self, task: str) -> tuple[Any, ...]:
        # Whoever was timed before may have written over them.
        self.logits.copy_(self.pristine)
        cause = torch.zeros((), device=self.device, requires_grad=True)
        logits = Made.apply(cause, self.logits)
        return logits, self.ids, self.advantages, self.old, self.ref, self.mask

    def errors(self, task: str, outputs: Any) -> dict[str, tuple[float, float]]:
        """The loss against float64, and the gradient over up to 64 rows from all parts of the
        batch: the chosen tokens' entries and, apart from them, the others', in the 2-norm.

        A ratio at a bound may fall to either side of it in fp32, which happens to none of these in
        a few million: its distance from float64 is 1e-5.
        """
        loss, gradient = (x.detach() for x in outputs[:2])
        leaf = self.exact.clone().requires_grad_()
        rest = (self.advantages.double(), self.old.double(), self.ref.double(), self.mask)
        wanted, of_logprobs, _ = with_gradient(eager_dapo)(leaf, *rest)
        wanted = wanted.detach()
        count = self.exact.numel()
        pick = torch.linspace(0, count - 1, min(count, 64), device=self.device).long()
        ids = self.ids.flatten()[pick, None]
        exact = -self.pristine.flatten(0, 1)[pick].double().softmax(-1)
        exact.scatter_add_(1, ids, torch.ones_like(exact[:, :1]))
        exact *= of_logprobs.flatten()[pick, None]
        off = gradient.flatten(0, 1)[pick].double() - exact
        found = {
            "loss": ((loss.double() - wanted).abs() / (1 + wanted.abs()), EXACT),
            "target gradient": (off.gather(1, ids).norm() / exact.gather(1, ids).norm(), GRADIENT),
        }
        for tensor in (off, exact):
            tensor.scatter_(1, ids, 0.0)
        found["other gradients"] = (off.norm() / exact.norm(), GRADIENT)
        return {name: (error.item(), limit) for name, (error, limit) in found.items()}

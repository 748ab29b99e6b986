"""The lm_head-fused operators on a GPU: dapo from hidden states, with a head that is trained or
frozen, and log-probabilities with their gradients, beside the bare products of matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks import linear_contestants as heads
from benchmarks.gpu.registry import Contestant, GpuCase, register
from benchmarks.objective import draw_ratios, objective

TRAINED = "dapo, gradients of hidden and weight"
FROZEN = "dapo, gradient of hidden (frozen head)"
LOGPROBS = "log-probabilities, gradients of hidden and weight"
LENGTH = 512
# bf16 logits, up to 5 in size, are off by up to 2^-7, and so are a ratio and its gradient; rounding
# the logits' gradient and the results adds twice 2^-9. A log-probability near -12 is off by as
# much, and by 2^-9 of itself where it is handed out in bf16.
LOSS, GRADIENT, LOGPROB = 1e-2, 2e-2, 8e-3
#: Rows of hidden, and of the weight, whose gradients are looked at.
ROWS = 64
#: Sequences at a time: the logits of 2048 tokens, in fp32, are a gigabyte.
LIGER_CHUNK = 4


def build_cut_cross_entropy():
    from cut_cross_entropy import linear_cross_entropy

    def run(hidden, weight, token_ids):
        # Without the filter, which leaves out small gradients.
        return -linear_cross_entropy(hidden, weight, token_ids, reduction="none", filter_eps=None)

    return run


def of_task(task: str, wrap: Any, ours: Any, builders: dict[str, Any]) -> list[Contestant]:
    """Ours on each backend, those who stand on the CPU too, and the bare products."""
    found = []
    for backend in ("native", "triton"):
        # Of a square product's speed; what products of this shape reach stands in the last line.
        target = 0.9 if backend == "native" and task == TRAINED else None
        build = wrap(lambda backend=backend: ours(backend=backend))
        found.append(Contestant(task, f"rlkern {backend}", build, target=target))
    for name, build in builders.items():
        found.append(Contestant(task, name, wrap(build), dry=name == "eager"))
    return [*found, Contestant(task, "products", heads.build_products)]


def contestants() -> tuple[Contestant, ...]:
    losses = {name: build for name, build in heads.LOSSES.items() if name != "rlkern"}
    losses["Liger"] = lambda: heads.build_liger(LIGER_CHUNK)
    logprobs = heads.LOGPROBS | {"cut-cross-entropy": build_cut_cross_entropy}
    return (
        *of_task(TRAINED, heads.with_gradients, heads.build_rlkern, losses),
        *of_task(FROZEN, heads.with_gradients, heads.build_rlkern, losses),
        *of_task(LOGPROBS, heads.with_upstream, heads.build_rlkern_logprobs, logprobs),
    )


@register
class Heads(GpuCase):
    operator = "heads"
    contestants = contestants()

    @staticmethod
    def small_calls(device: str) -> None:
        """A chunk, several with an accumulator, a masked row, a bias, each factor alone."""
        import rlkern

        objective = rlkern.PolicyLoss.preset("dapo")
        for dtype in (torch.float32, torch.bfloat16):
            hidden = torch.randn(2, 80, 16, device=device).to(dtype).requires_grad_()
            weight = torch.randn(40, 16, device=device).to(dtype).requires_grad_()
            bias = torch.randn(40, device=device).to(dtype).requires_grad_()
            ids = torch.randint(40, (2, 80), device=device)
            mask = torch.rand(2, 80, device=device) < 0.8
            advantages = torch.randn(2, device=device)
            with rlkern.use_backend("native"):
                for budget in (None, 64 * 40 * 4):
                    for frozen in (False, True):
                        factors = (hidden,) if frozen else (hidden, weight, bias)
                        w, b = (f.detach() if frozen else f for f in (weight, bias))
                        given = {"bias": b, "mask": mask, "memory_budget": budget}
                        out = rlkern.linear_token_logprobs(hidden, w, ids, **given)
                        loss = objective.from_hidden(hidden, w, ids, advantages, **given).loss
                        for grad in torch.autograd.grad(out.sum() + loss, factors):
                            assert grad.isfinite().all()

    def __init__(self, device: str, tiny: bool) -> None:
        super().__init__(device, tiny)
        self.sizes = (2, 32, 64, 512) if tiny else (16, LENGTH, 4096, 131072)
        sequences, length, width, vocab = self.sizes
        g = torch.Generator(device).manual_seed(0)

        def normal(*size):
            return torch.randn(*size, generator=g, device=device)

        self.hidden = normal(sequences, length, width).bfloat16()
        self.weight = torch.empty(vocab, width, dtype=torch.bfloat16, device=device)
        self.weight.normal_(std=width**-0.5, generator=g)
        self.ids = torch.randint(vocab, (sequences, length), generator=g, device=device)
        self.advantages = normal(sequences)
        # Exact in bf16, so that every contestant is given the same one.
        self.upstream = normal(sequences, length).bfloat16().float()
        self.lse, exact = self.sums()
        self.exact = exact.view(sequences, length)
        self.old = (self.exact - draw_ratios((sequences, length), g).log()).float()
        self.picks = [
            torch.linspace(0, n - 1, min(n, ROWS), device=device).long()
            for n in (sequences * length, vocab)
        ]

    def sums(self) -> tuple[Tensor, Tensor]:
        """log sum exp and the log-probability of every token, in float64, some at a time."""
        wide, found = self.weight.double(), []
        ids = self.ids.flatten()
        for rows, chosen in zip(self.hidden.flatten(0, 1).split(256), ids.split(256), strict=True):
            logits = rows.double() @ wide.t()
            lse = logits.logsumexp(-1)
            found.append((lse, logits.gather(-1, chosen[:, None]).squeeze(-1) - lse))
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))  # type: ignore

    def shape(self) -> str:
        sequences, length, width, vocab = self.sizes
        return f"{sequences * length} x {width} x {vocab} bfloat16"

    def bytes_moved(self, task: str) -> int:
        """Factors read and their gradients written."""
        moved = 2 * self.hidden.nbytes + self.weight.nbytes
        return moved if task == FROZEN else moved + self.weight.nbytes

    def flop(self, task: str) -> int:
        sequences, length, width, vocab = self.sizes
        return (2 if task == FROZEN else 3) * 2 * sequences * length * width * vocab

    def prepare(self, task: str) -> tuple[Any, ...]:
        hidden = self.hidden.detach().requires_grad_()
        weight = self.weight.detach().requires_grad_(task != FROZEN)
        rows = (self.ids.numel(),) * 2  # of the bare products
        if task == LOGPROBS:
            return hidden, weight, self.ids, self.upstream, rows
        return hidden, weight, self.ids, self.old, self.advantages, rows

    def errors(self, task: str, outputs: Any) -> dict[str, tuple[float, float]]:
        """Results against float64, and the gradients' rows that `picks` names, in the 2-norm."""
        first, (of_hidden, *of_weight) = outputs
        if first is None:  # the bare products, of which nothing but their shape is right or wrong
            return {"shape": (float(of_hidden.shape[-1] != self.sizes[2]), 0.5)}
        first = first.detach()
        leaf = self.exact.clone().requires_grad_()
        if task == LOGPROBS:
            upstream = self.upstream.double()
            off = (first.double() - self.exact).abs() / self.exact.abs().clamp(min=1)
            found = {"logprob": (off.max().item(), LOGPROB)}
        else:
            loss = objective(leaf, self.old.double(), self.advantages.double())
            (upstream,) = torch.autograd.grad(loss, leaf)
            off = (first.double() - loss.detach()).abs() / self.advantages.double().abs().mean()
            found = {"loss": (off.item(), LOSS)}
        for name, gradient, exact in (
            ("hidden", of_hidden.flatten(0, 1), self.hidden_rows),
            ("weight", of_weight[0] if of_weight else None, self.weight_rows),
        ):
            if gradient is not None:
                pick, wanted = exact(upstream.flatten())
                error = (gradient[pick].double() - wanted).norm() / wanted.norm()
                found[name] = (error.item(), GRADIENT)
        return found

    def hidden_rows(self, upstream: Tensor) -> tuple[Tensor, Tensor]:
        pick, wide = self.picks[0], self.weight.double()
        probs = (self.hidden.flatten(0, 1)[pick].double() @ wide.t() - self.lse[pick, None]).exp()
        exact = wide[self.ids.flatten()[pick]] - probs @ wide
        return pick, exact * upstream[pick, None]

    def weight_rows(self, upstream: Tensor) -> tuple[Tensor, Tensor]:
        pick, hidden = self.picks[1], self.hidden.flatten(0, 1).double()
        probs = (hidden @ self.weight[pick].double().t() - self.lse[:, None]).exp()
        chosen = (self.ids.flatten()[:, None] == pick).double()
        return pick, ((chosen - probs) * upstream[:, None]).t() @ hidden

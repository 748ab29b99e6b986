"""PolicyLoss.from_hidden against eager PyTorch and Liger-Kernel's chunked loss, in bf16.

The objective is dapo on tokens that an older policy sampled. Beside them stand the bare products
that no implementation can do without: logits, hidden gradient and weight gradient, of the whole
batch at once, and only the first two where the head is frozen.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.case import Case, Contestant, Floor

TRAINED = "loss + gradients of hidden and weight"
FROZEN = "loss + gradient of hidden (frozen head)"
HALF = "loss + gradients, half of the groups at zero advantage"
HALF_BARE = "the same without metrics"
SHAPE = {"tokens": 1024, "width": 1024, "vocab": 32768}
QUICK_SHAPE = {"tokens": 64, "width": 32, "vocab": 512}
LENGTH = 32
# In the 2-norm. bf16 logits of a few units are rounded by 2^-9 of themselves in every contestant,
# so a token in 300 falls on the other side of its clip bound: with its whole gradient, sqrt(1/300).
TOLERANCE = 1e-1


def eager(hidden, weight, token_ids, old_logprobs, advantages):
    logprobs = (hidden @ weight.t()).float().log_softmax(-1)
    logprobs = logprobs.gather(-1, token_ids[..., None]).squeeze(-1)
    ratio = (logprobs - old_logprobs).exp()
    a = advantages[:, None]
    return -torch.min(ratio * a, ratio.clamp(0.8, 1.28) * a).mean()


def build_eager():
    return eager


def build_products():
    def run(hidden, weight, *rest):
        flat = hidden.detach().flatten(0, 1)
        logits = flat @ weight.detach().t()
        gradients = [logits @ weight.detach()]
        if weight.requires_grad:
            gradients.append(logits.t() @ flat)
        return None, gradients

    return run


def build_rlkern(metrics: bool = True, compact: bool | None = None):
    import rlkern

    loss = rlkern.PolicyLoss.preset("dapo")

    def run(hidden, weight, token_ids, old_logprobs, advantages):
        with rlkern.use_backend("native"):
            return loss.from_hidden(
                hidden, weight, token_ids, advantages, old_logprobs=old_logprobs,
                metrics=metrics, compact=compact,
            ).loss  # fmt: skip

    return run


def build_liger():
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    fused = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, epsilon_low=0.2, epsilon_high=0.28, loss_type="dapo"
    )

    def run(hidden, weight, token_ids, old_logprobs, advantages):
        mask = torch.ones_like(token_ids)
        loss, _ = fused(
            hidden, weight, token_ids, mask, advantages, old_per_token_logps=old_logprobs
        )
        return loss

    return run


def with_gradients(build):
    def build_task():
        function = build()

        def run(hidden, weight, *rest):
            loss = function(hidden, weight, *rest)
            wanted = [factor for factor in (hidden, weight) if factor.requires_grad]
            return loss, torch.autograd.grad(loss, wanted)

        return run

    return build_task


def contestants():
    whole = {"rlkern": build_rlkern, "eager": build_eager, "Liger": build_liger}
    found = [
        Contestant(task, name, with_gradients(build))
        for task in (TRAINED, FROZEN)
        for name, build in whole.items()
    ]
    found += [
        Contestant(TRAINED, "three products", build_products),
        Contestant(FROZEN, "two products", build_products),
        Contestant(HALF, "rlkern", with_gradients(build_rlkern)),
        Contestant(HALF_BARE, "rlkern", with_gradients(lambda: build_rlkern(metrics=False))),
    ]
    return tuple(found)


class FromHidden(Case):
    """Sequences of LENGTH tokens' hidden states and an lm_head, in bf16."""

    operator = "from_hidden"
    contestants = contestants()
    bounds = {task: ("copy",) for task in (TRAINED, FROZEN, HALF, HALF_BARE)}

    def __init__(self, tokens: int, width: int, vocab: int) -> None:
        self.tolerance = TOLERANCE
        generator = torch.Generator().manual_seed(0)
        shape = (tokens // LENGTH, LENGTH)

        def normal(*size):
            return torch.randn(*size, generator=generator)

        self.hidden = normal(*shape, width).bfloat16()
        self.bulk = (normal(vocab, width) / width**0.5).bfloat16()
        self.token_ids = torch.randint(vocab, shape, generator=generator)
        log_p = (self.hidden.float() @ self.bulk.float().t()).log_softmax(-1)
        logprobs = log_p.gather(-1, self.token_ids[..., None]).squeeze(-1)
        self.old = logprobs + 0.1 * normal(*shape)
        self.advantages = normal(shape[0])
        self.truth: dict[str, tuple] = {}

    @staticmethod
    def floors(**params: Any) -> tuple[Floor, ...]:
        if params != SHAPE:
            return ()
        ours = f"{TRAINED}/rlkern"
        return (
            Floor(ours, (f"{TRAINED}/three products",), 1 / 1.25),
            Floor(f"{FROZEN}/rlkern", (f"{FROZEN}/two products",), 1 / 1.25),
            Floor(ours, (f"{TRAINED}/eager",), 1),
            Floor(ours, (f"{TRAINED}/Liger",), 4),
            Floor(f"{HALF}/rlkern", (ours,), 1 / 0.72),
            Floor(f"{HALF_BARE}/rlkern", (ours,), 1 / 0.6),
        )

    def _advantages(self, task: str) -> torch.Tensor:
        if task not in (HALF, HALF_BARE):
            return self.advantages
        return self.advantages.where(torch.arange(len(self.advantages)) % 2 == 0, 0.0)

    def prepare(self, task: str) -> tuple[torch.Tensor, ...]:
        # The scaling of a ceiling may have passed over it.
        weight = self.bulk.detach().clone().requires_grad_(task != FROZEN)
        hidden = self.hidden.detach().clone().requires_grad_()
        return hidden, weight, self.token_ids, self.old, self._advantages(task)

    def _expected(self, task: str) -> tuple:
        if task not in self.truth:
            hidden, weight, *rest = self.prepare(task)
            wide = [hidden.detach().double(), weight.detach().double()]
            for factor, leaf in zip(wide, (hidden, weight), strict=True):
                factor.requires_grad_(leaf.requires_grad)
            log_p = (wide[0] @ wide[1].t()).log_softmax(-1)
            logprobs = log_p.gather(-1, rest[0][..., None]).squeeze(-1)
            ratio = (logprobs - rest[1].double()).exp()
            a = rest[2].double()[:, None]
            loss = -torch.min(ratio * a, ratio.clamp(0.8, 1.28) * a).mean()
            wanted = [factor for factor in wide if factor.requires_grad]
            self.truth[task] = loss.item(), torch.autograd.grad(loss, wanted)
        return self.truth[task]

    def errors(self, task: str, outputs: Any) -> dict[str, float]:
        """Errors against float64: of the loss, absolute; of the gradients, in the 2-norm. The bare
        products are no loss: only their shapes are looked at."""
        loss, gradients = outputs
        true_loss, expected = self._expected(task)
        shapes = [tuple(g.flatten(0, -2).shape) for g in gradients]
        assert shapes == [tuple(e.flatten(0, -2).shape) for e in expected]
        if loss is None:
            return {"shape": 0.0}
        names = ("hidden", "weight")
        return {"loss": abs(loss.item() - true_loss)} | {
            name: ((g.double() - e).norm() / e.norm()).item()
            for name, g, e in zip(names, gradients, expected, strict=False)
        }


@pytest.mark.parametrize("contestant", [c.key for c in FromHidden.contestants])
def test_from_hidden(contest, quick, contestant):
    contest(FromHidden, QUICK_SHAPE if quick else SHAPE, contestant)

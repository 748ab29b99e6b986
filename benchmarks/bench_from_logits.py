"""PolicyLoss.from_logits against eager, torch.compile, TRL, verl and OpenRLHF: loss and gradient.

The objective is dapo on tokens that an older policy sampled. In place the gradient takes the place
of the logits; "in steps" is token_logprobs, with its in-place backward, and then the loss.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import bench_token_logprobs as rows
from benchmarks.bench_token_logprobs import Produce
from benchmarks.case import Case, Contestant, Floor
from benchmarks.objective import draw_ratios, objective

TASK = "loss + gradient"
SHAPE = {"rows": 4, "tokens": 128, "vocab": 151936}
QUICK_SHAPE = {"rows": 2, "tokens": 16, "vocab": 4096}
# Of the gradient in the 2-norm, and of the loss over the mean |A|. In bf16 eager's log-probability
# near -12 is rounded by up to 1/32, which its ratio, and so both of them, take over: 3.2e-2; the
# ratio, its product with A and the gradient are rounded by 2^-9 each.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}


def with_loss(logprobs_of):
    """The objective on log-probabilities."""

    def function(logits, token_ids, old_logprobs, advantages):
        return objective(logprobs_of(logits, token_ids), old_logprobs, advantages)

    return function


def build_eager():
    return with_loss(rows.eager)


def build_compiled():
    return torch.compile(build_eager(), dynamic=False)


#: Trainers whose functions give log-probabilities; the same lines follow.
TRAINERS = ("TRL", "verl", "OpenRLHF")


def build_rlkern(inplace: bool, steps: bool = False):
    import rlkern

    loss = rlkern.PolicyLoss.preset("dapo")

    def run(logits, token_ids, old_logprobs, advantages):
        with rlkern.use_backend("native"):
            if steps:
                logprobs = rlkern.token_logprobs(logits, token_ids, inplace_backward=inplace)
                return loss(logprobs, advantages, old_logprobs=old_logprobs).loss
            return loss.from_logits(
                logits, token_ids, advantages, old_logprobs=old_logprobs, inplace=inplace
            ).loss

    return run


def with_gradient(build):
    def build_task():
        function = build()

        def run(logits, *rest):
            loss = function(logits, *rest)
            (gradient,) = torch.autograd.grad(loss, logits)
            return loss, gradient

        return run

    return build_task


class FromLogits(Case):
    """Logits [rows, tokens, vocab] as a trainer holds them."""

    operator = "from_logits"
    contestants = (
        Contestant(TASK, "rlkern in place", with_gradient(lambda: build_rlkern(True))),
        Contestant(TASK, "rlkern", with_gradient(lambda: build_rlkern(False))),
        Contestant(TASK, "rlkern in steps", with_gradient(lambda: build_rlkern(True, True))),
        Contestant(TASK, "eager", with_gradient(build_eager)),
        Contestant(TASK, "torch.compile", with_gradient(build_compiled)),
        *(
            Contestant(TASK, name, with_gradient(lambda name=name: with_loss(rows.PEERS[name]())))
            for name in TRAINERS
        ),
    )
    bounds = {TASK: ("scale",)}

    def __init__(self, rows: int, tokens: int, vocab: int, dtype: str) -> None:
        kind = getattr(torch, dtype)
        self.tolerance = TOLERANCE[kind]
        generator = torch.Generator().manual_seed(0)
        shape = (rows, tokens)
        self.token_ids = torch.randint(vocab, shape, generator=generator)
        self.pristine = torch.randn(*shape, vocab, generator=generator).to(kind)
        self.bulk = self.pristine.clone()
        picked = self.pristine.gather(-1, self.token_ids[..., None]).squeeze(-1).float()
        near = picked - self.pristine.float().logsumexp(-1)
        self.old = near - draw_ratios(shape, generator).log()
        self.advantages = torch.randn(rows, generator=generator)
        self.weight = torch.zeros((), requires_grad=True)

    @staticmethod
    def floors(**params: Any) -> tuple[Floor, ...]:
        if {name: params[name] for name in SHAPE} != SHAPE:
            return ()
        ours = f"{TASK}/rlkern in place"
        return (
            Floor(ours, ("scale",), 0.6 if params["dtype"] == "float32" else 0.35),
            Floor(ours, (f"{TASK}/eager",), 8),
            Floor(ours, (f"{TASK}/torch.compile",), 6),
        )

    def prepare(self, task: str) -> tuple[torch.Tensor, ...]:
        self.bulk.copy_(self.pristine)
        logits = Produce.apply(self.weight, self.bulk)
        return logits, self.token_ids, self.old, self.advantages

    @torch.no_grad()
    def errors(self, task: str, outputs: Any) -> dict[str, float]:
        """Errors against float64. loss: over the mean |A|. gradient: in the 2-norm of all rows."""
        loss, gradient = outputs
        rows = range(self.token_ids.numel())
        flat = self.pristine.flatten(0, 1)
        count, total, errors, norms = len(rows), 0.0, [], []
        for i in rows:
            log_p = flat[i].double().log_softmax(-1)
            token = self.token_ids.flatten()[i]
            a = self.advantages[i // self.token_ids.shape[1]].double()
            ratio = (log_p[token] - self.old.flatten()[i].double()).exp()
            free, held = ratio * a, ratio.clamp(0.8, 1.28) * a
            total -= torch.min(free, held).item() / count
            upstream = -free / count if free <= held else 0 * free
            expected = log_p.exp_().mul_(-upstream)
            expected[token] += upstream
            errors.append((gradient.flatten(0, 1)[i].double() - expected).norm())
            norms.append(expected.norm())
        error = torch.stack(errors).norm() / torch.stack(norms).norm()
        scale = self.advantages.abs().mean().item()
        return {"loss": abs(loss.item() - total) / scale, "gradient": error.item()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("contestant", [c.key for c in FromLogits.contestants])
def test_from_logits(contest, quick, dtype, contestant):
    contest(FromLogits, (QUICK_SHAPE if quick else SHAPE) | {"dtype": dtype}, contestant)

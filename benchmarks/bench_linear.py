"""The lm_head-fused operators against their peers, and what memory they hold.

from_hidden: dapo on tokens that an older policy sampled, a fifth of them clipped, beside the bare
matrix products that no implementation can do without. linear_token_logprobs: log-probabilities, and
their gradients for an upstream one of every token. The last table is extra memory by the number of
tokens: that it does not grow is what a chunk's logits are for.

The products that cannot be avoided are those of the rows that count. A loss needs the logits of
every row that enters it. The gradients of hidden states and weight need only rows whose
log-probability has a gradient: not those of a sequence at zero advantage, nor those that the clip
holds. A row at zero advantage enters the loss as 0 whatever its logits are, so without metrics it
needs no product at all; metrics (how far the ratio has gone, how many are clipped) are over all
tokens and need all logits. A clipped row's logits are always needed: they say that it is clipped.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from benchmarks import linear_memory
from benchmarks.case import Case, Contestant, Floor, Plan
from benchmarks.linear_contestants import (
    LOGPROBS,
    LOSSES,
    build_products,
    build_rlkern,
    build_rlkern_logprobs,
    chosen,
    eager_counting_rows,
    with_gradients,
    with_upstream,
    without_gradients,
)
from benchmarks.objective import draw_ratios, learns, objective

TRAINED = "loss + gradients of hidden and weight"
FROZEN = "loss + gradient of hidden (frozen head)"
HALF = "loss + gradients, half of the groups at zero advantage"
HALF_BARE = "the same without metrics"
VALUES = "log-probabilities"
GRADIENTS = "log-probabilities + gradients of hidden and weight"
COUNTING = "products of the rows that count"
SHAPE = {"tokens": 1024, "width": 1024, "vocab": 32768}
QUICK_SHAPE = {"tokens": 64, "width": 32, "vocab": 512}
#: from_hidden in fp32, and with a vocabulary of today's models.
SIDE_SHAPES = (
    {"tokens": 256, "width": 512, "vocab": 32768, "dtype": "float32"},
    {"tokens": 256, "width": 256, "vocab": 151936, "dtype": "bfloat16"},
)
SEQUENCES = 4
#: A call takes a third of a second, a slow peer's ten times that. Two processes, in which the
#: slow ones get two rounds, and fewer of all beside the main shape, keep this file to minutes.
PLAN = Plan(processes=2, rounds=5, seconds=1.0, least=2)
BESIDE = Plan(processes=2, rounds=3, seconds=0.5, least=2)
# Log-probabilities and gradients in the 2-norm, the loss over the mean of |A|.
# bf16: who returns log-probabilities in bf16 has rounded the log-sum-exp and the result, near 11
# both, by up to 1/32 each: 1.8e-2 in the mean square, and sqrt(2) of that together. It is the error
# of a ratio, so of a row's gradient: 2.6e-2 in the 2-norm, beside which what bf16 logits and
# results add (three roundings of 2^-9) is small, and of the log-probabilities 2.6e-2 / 11. A sixth
# more is allowed, and twice that of the latter, as rows are few. In the loss these errors meet with
# either sign: three sigma of the quick shape's 64 rows are 1e-2.
# fp32: a sum of n products is off by up to sqrt(n) * 2^-24, 2.3e-5 over the larger vocabulary.
TOLERANCE = {
    torch.bfloat16: {"loss": 1e-2, "logprobs": 5e-3, "hidden": 3e-2, "weight": 3e-2, "shape": 0.0},
    torch.float32: {"loss": 3e-5, "logprobs": 3e-5, "hidden": 3e-5, "weight": 3e-5, "shape": 0.0},
}


class Head(Case):
    """Hidden states of a few sequences and an lm_head."""

    def __init__(self, tokens: int, width: int, vocab: int, dtype: str = "bfloat16") -> None:
        kind = getattr(torch, dtype)
        self.tolerance = TOLERANCE[kind]
        self.generator = torch.Generator().manual_seed(0)
        self.shape = (SEQUENCES, tokens // SEQUENCES)
        self.hidden = self.normal(*self.shape, width).to(kind)
        self.weight = (self.normal(vocab, width) / width**0.5).to(kind)
        self.bulk = self.weight.clone()  # which the ceilings scale
        self.token_ids = torch.randint(vocab, self.shape, generator=self.generator)
        self.truth: dict[Any, tuple] = {}

    def normal(self, *size: int) -> torch.Tensor:
        return torch.randn(*size, generator=self.generator)

    def factors(self, task: str) -> tuple[torch.Tensor, torch.Tensor]:
        weight = self.weight.clone().requires_grad_(task not in (FROZEN, VALUES))
        return self.hidden.detach().clone().requires_grad_(task != VALUES), weight

    def exact(self, task: str, function: Any, upstream: torch.Tensor | None = None) -> tuple:
        """`function` of float64 log-probabilities, and the gradients of factors that need one."""
        factors = self.factors(task)
        wide = [x.detach().double().requires_grad_(x.requires_grad) for x in factors]
        found = function(chosen(wide[0] @ wide[1].t(), self.token_ids))
        wanted = [factor for factor in wide if factor.requires_grad]
        return found.detach(), torch.autograd.grad(found, wanted, upstream) if wanted else ()

    @staticmethod
    def off(gradients: Any, expected: Any) -> dict[str, float]:
        """In the 2-norm."""
        return {
            name: ((g.double() - e).norm() / e.norm()).item()
            for name, g, e in zip(("hidden", "weight"), gradients, expected, strict=False)
        }

    @staticmethod
    def bare(gradients: Any, expected: Any) -> dict[str, float]:
        """The bare products compute no loss: one for each gradient, of the same width."""
        assert [g.shape[-1] for g in gradients] == [e.shape[-1] for e in expected]
        return {"shape": 0.0}


class FromHidden(Head):
    """A policy loss with its gradients."""

    operator = "from_hidden"
    contestants = (
        *(Contestant(TRAINED, name, with_gradients(build)) for name, build in LOSSES.items()),
        Contestant(TRAINED, COUNTING, build_products),
        *(Contestant(FROZEN, name, with_gradients(build)) for name, build in LOSSES.items()),
        Contestant(FROZEN, COUNTING, build_products),
        Contestant(HALF, "rlkern", with_gradients(build_rlkern)),
        Contestant(HALF, COUNTING, build_products),
        Contestant(HALF_BARE, "rlkern", with_gradients(lambda: build_rlkern(metrics=False))),
        Contestant(
            HALF_BARE, "eager, counting rows only", with_gradients(lambda: eager_counting_rows)
        ),
        Contestant(HALF_BARE, COUNTING, build_products),
    )
    bounds = {task: (f"{task}/{COUNTING}",) for task in (TRAINED, FROZEN, HALF, HALF_BARE)}

    def __init__(self, **params: Any) -> None:
        super().__init__(**params)
        logprobs = chosen(self.hidden.double() @ self.weight.double().t(), self.token_ids)
        self.ratio = draw_ratios(self.shape, self.generator)
        self.old = (logprobs - self.ratio.double().log()).float()
        self.advantages = self.normal(SEQUENCES)

    @staticmethod
    def floors(**params: Any) -> tuple[Floor, ...]:
        if not SHAPE.items() <= params.items():
            return ()
        ours, frozen = f"{TRAINED}/rlkern", f"{FROZEN}/rlkern"
        # Of fewer products than the promise, which is against those of all rows.
        return (
            Floor(ours, (f"{TRAINED}/{COUNTING}",), 1 / 1.25),
            Floor(frozen, (f"{FROZEN}/{COUNTING}",), 1 / 1.25),
            Floor(ours, (f"{TRAINED}/eager",), 1),
            Floor(ours, (f"{TRAINED}/Liger",), 4),
            Floor(f"{HALF}/rlkern", (ours,), 1 / 0.72),
            Floor(f"{HALF_BARE}/rlkern", (ours,), 1 / 0.6),
        )

    def _advantages(self, task: str) -> torch.Tensor:
        if task not in (HALF, HALF_BARE):
            return self.advantages
        return self.advantages.where(torch.arange(SEQUENCES) % 2 == 0, 0.0)

    def rows(self, task: str) -> tuple[int, int]:
        """How many rows need logits, and how many of them gradients."""
        a = self._advantages(task)[:, None].expand(self.shape)
        needed = (a != 0).sum().item() if task == HALF_BARE else a.numel()
        return needed, learns(self.ratio, a).sum().item()

    def prepare(self, task: str) -> tuple[Any, ...]:
        given = *self.factors(task), self.token_ids, self.old, self._advantages(task)
        return *given, self.rows(task)

    def _expected(self, task: str) -> tuple:
        key = HALF if task == HALF_BARE else task
        if key not in self.truth:
            old, advantages = self.old.double(), self._advantages(task).double()
            self.truth[key] = self.exact(
                task, lambda logprobs: objective(logprobs, old, advantages)
            )
        return self.truth[key]

    def errors(self, task: str, outputs: Any) -> dict[str, float]:
        """Errors against float64: of the loss, over the mean of |A|; of the gradients, in the
        2-norm."""
        expected, gradients = self._expected(task)
        loss, found = outputs
        if loss is None:
            return self.bare(found, gradients)
        scale = self._advantages(task).abs().mean().item()
        return {"loss": abs(loss.item() - expected.item()) / scale} | self.off(found, gradients)


class LinearTokenLogprobs(Head):
    """Log-probabilities of one token a row."""

    operator = "linear_token_logprobs"
    contestants = (
        *(
            Contestant(task, name, wrap(build))
            for task, wrap in ((GRADIENTS, with_upstream), (VALUES, without_gradients))
            for name, build in ({"rlkern": build_rlkern_logprobs} | LOGPROBS).items()
        ),
        Contestant(GRADIENTS, "three products", build_products),
        Contestant(VALUES, "one product", build_products),
    )
    bounds = {GRADIENTS: (f"{GRADIENTS}/three products",), VALUES: (f"{VALUES}/one product",)}

    def __init__(self, **params: Any) -> None:
        super().__init__(**params)
        # Exact in bf16, so that whatever dtype a result has, its upstream gradient is the same.
        self.upstream = self.normal(*self.shape).bfloat16().float()

    def prepare(self, task: str) -> tuple[Any, ...]:
        given = (*self.factors(task), self.token_ids)
        rows = (self.token_ids.numel(),) * 2
        return (*given, rows) if task == VALUES else (*given, self.upstream, rows)

    def errors(self, task: str, outputs: Any) -> dict[str, float]:
        """Errors against float64, in the 2-norm."""
        if task not in self.truth:
            upstream = None if task == VALUES else self.upstream.double()
            self.truth[task] = self.exact(task, lambda logprobs: logprobs, upstream)
        logprobs, expected = self.truth[task]
        found, gradients = (outputs, ()) if isinstance(outputs, torch.Tensor) else outputs
        if found is None:
            return self.bare(gradients, expected)
        error = ((found.double() - logprobs).norm() / logprobs.norm()).item()
        return {"logprobs": error} | self.off(gradients, expected)


@pytest.mark.parametrize("contestant", [c.key for c in FromHidden.contestants])
def test_from_hidden(contest, quick, contestant):
    shape = QUICK_SHAPE if quick else SHAPE
    contest(FromHidden, shape | {"dtype": "bfloat16"}, contestant, PLAN)


@pytest.mark.parametrize("shape", SIDE_SHAPES, ids=["fp32", "vocab 151936"])
@pytest.mark.parametrize("contestant", [c.key for c in FromHidden.contestants])
def test_from_hidden_beside(contest, quick, shape, contestant):
    if quick:
        shape = QUICK_SHAPE | {"dtype": shape["dtype"]}
    contest(FromHidden, shape, contestant, BESIDE)


@pytest.mark.parametrize("contestant", [c.key for c in LinearTokenLogprobs.contestants])
def test_linear_token_logprobs(contest, quick, contestant):
    contest(LinearTokenLogprobs, QUICK_SHAPE if quick else SHAPE, contestant, PLAN)


def test_memory(quick, pytestconfig):
    """Extra memory by the number of tokens, and that ours does not grow."""
    start = time.perf_counter()
    measured = linear_memory.measure(quick)
    linear_memory.show(pytestconfig, measured, time.perf_counter() - start)
    if not quick:
        for name in linear_memory.OURS:
            extra = [point["beyond"][name] for point in measured]
            assert max(extra) <= linear_memory.MOST, f"{name}: {extra} bytes"

"""The lm_head-fused operators against their peers, in bf16, and what memory they hold.

from_hidden: dapo on tokens that an older policy sampled, beside the bare products that no
implementation can do without: logits, hidden gradient and weight gradient, of the whole batch at
once, and only the first two where the head is frozen. linear_token_logprobs: log-probabilities, and
their gradients for an upstream one of every token. The last table is extra memory by the number of
tokens: that it does not grow is what a chunk's logits are for.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import linear_memory
from benchmarks.case import Case, Contestant, Floor, Plan

TRAINED = "loss + gradients of hidden and weight"
FROZEN = "loss + gradient of hidden (frozen head)"
HALF = "loss + gradients, half of the groups at zero advantage"
HALF_BARE = "the same without metrics"
LOGPROBS = "log-probabilities"
GRADIENTS = "log-probabilities + gradients of hidden and weight"
SHAPE = {"tokens": 1024, "width": 1024, "vocab": 32768}
QUICK_SHAPE = {"tokens": 64, "width": 32, "vocab": 512}
LENGTH = 32
#: Columns of the vocabulary that TRL's trainers work on at a time.
TRL_TILE = 32768
#: A call takes a third of a second, a slow peer's five times that. Two processes, in which the
#: slow ones get two rounds, and the peers that a frozen head does not change stand in one task:
#: all of this file then ends in six minutes on two cores.
PLAN = Plan(processes=2, rounds=5, seconds=1.0, least=2)
# In the 2-norm. bf16 logits of a few units are rounded by 2^-9 of themselves in every contestant,
# so a token in 300 falls on the other side of its clip bound: with its whole gradient, sqrt(1/300).
TOLERANCE = 1e-1


def token_logprobs(hidden, weight, token_ids):
    log_p = (hidden @ weight.t()).float().log_softmax(-1)
    return log_p.gather(-1, token_ids[..., None]).squeeze(-1)


def objective(logprobs, old_logprobs, advantages):
    ratio, a = (logprobs - old_logprobs).exp(), advantages[:, None]
    return -torch.min(ratio * a, ratio.clamp(0.8, 1.28) * a).mean()


def eager(hidden, weight, token_ids, old_logprobs, advantages):
    return objective(token_logprobs(hidden, weight, token_ids), old_logprobs, advantages)


def compiled(function):
    return lambda: torch.compile(function, dynamic=False)


def build_products(gradients: bool = True):
    def run(hidden, weight, *rest):
        flat = hidden.detach().flatten(0, 1)
        logits = flat @ weight.detach().t()
        if not gradients:
            return None
        found = [logits @ weight.detach()]
        if weight.requires_grad:
            found.append(logits.t() @ flat)
        return None, found

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


def build_rlkern_logprobs():
    import rlkern

    def run(*args):
        with rlkern.use_backend("native"):
            return rlkern.linear_token_logprobs(*args)

    return run


def build_torch_chunked():
    """torch's own, in chunks of tokens; its results are in bf16."""
    function, options = torch.nn.functional.linear_cross_entropy, torch.nn.LinearCrossEntropyOptions

    def run(hidden, weight, token_ids):
        flat, ids = hidden.flatten(0, 1), token_ids.flatten()
        loss = function(flat, weight, ids, reduction="none", options=options())
        return -loss.view(token_ids.shape)

    return run


def build_trl():
    from trl.kernels import ChunkedLogProbFunction

    def run(hidden, weight, token_ids):
        found = ChunkedLogProbFunction.apply(
            hidden.flatten(0, 1), weight, None, token_ids.flatten(), 1.0, TRL_TILE, None, 1.0, ()
        )
        return found[0].view(token_ids.shape)

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


def with_upstream(build):
    def build_task():
        function = build()

        def run(hidden, weight, token_ids, upstream):
            logprobs = function(hidden, weight, token_ids)
            wanted = (hidden, weight)
            return logprobs, torch.autograd.grad(logprobs, wanted, upstream.to(logprobs.dtype))

        return run

    return build_task


def without_gradients(build):
    def build_task():
        function = build()

        def run(*args):
            with torch.no_grad():
                return function(*args)

        return run

    return build_task


class Head(Case):
    """Sequences of LENGTH tokens' hidden states and an lm_head, in bf16."""

    tolerance = TOLERANCE

    def __init__(self, tokens: int, width: int, vocab: int) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.shape = (tokens // LENGTH, LENGTH)
        self.hidden = self.normal(*self.shape, width).bfloat16()
        self.weight = (self.normal(vocab, width) / width**0.5).bfloat16()
        self.bulk = self.weight.clone()  # which the ceilings scale
        self.token_ids = torch.randint(vocab, self.shape, generator=self.generator)
        self.truth: dict[Any, tuple] = {}

    def normal(self, *size: int) -> torch.Tensor:
        return torch.randn(*size, generator=self.generator)

    def factors(self, task: str) -> tuple[torch.Tensor, torch.Tensor]:
        weight = self.weight.clone().requires_grad_(task not in (FROZEN, LOGPROBS))
        return self.hidden.detach().clone().requires_grad_(task != LOGPROBS), weight

    def exact(self, task: str, function: Any, upstream: torch.Tensor | None = None) -> tuple:
        """`function` of the factors in float64, and its gradients, for as many as need one."""
        factors = self.factors(task)
        wide = [x.detach().double().requires_grad_(x.requires_grad) for x in factors]
        found = function(*wide)
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
    def shapes_only(outputs: Any, expected: Any) -> dict[str, float]:
        """The bare products compute no loss."""
        found = outputs[1] if outputs else ()
        shapes = [tuple(g.flatten(0, -2).shape) for g in found]
        assert shapes == [tuple(e.flatten(0, -2).shape) for e in expected]
        return {"shape": 0.0}


class FromHidden(Head):
    """A policy loss with its gradients."""

    operator = "from_hidden"
    contestants = (
        *(
            Contestant(TRAINED, name, with_gradients(build))
            for name, build in {
                "rlkern": build_rlkern,
                "eager": lambda: eager,
                "torch.compile": compiled(eager),
                "Liger": build_liger,
            }.items()
        ),
        Contestant(TRAINED, "three products", build_products),
        Contestant(FROZEN, "rlkern", with_gradients(build_rlkern)),
        Contestant(FROZEN, "eager", with_gradients(lambda: eager)),
        Contestant(FROZEN, "two products", build_products),
        Contestant(HALF, "rlkern", with_gradients(build_rlkern)),
        Contestant(HALF_BARE, "rlkern", with_gradients(lambda: build_rlkern(metrics=False))),
    )
    bounds = {
        TRAINED: (f"{TRAINED}/three products",),
        FROZEN: (f"{FROZEN}/two products",),
        HALF: (f"{TRAINED}/three products",),
        HALF_BARE: (f"{TRAINED}/three products",),
    }

    def __init__(self, **shape: int) -> None:
        super().__init__(**shape)
        logprobs = token_logprobs(self.hidden.float(), self.weight.float(), self.token_ids)
        self.old = logprobs + 0.1 * self.normal(*self.shape)
        self.advantages = self.normal(self.shape[0])

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
        return *self.factors(task), self.token_ids, self.old, self._advantages(task)

    def _expected(self, task: str) -> tuple:
        key = HALF if task == HALF_BARE else task
        if key not in self.truth:
            old, advantages = self.old.double(), self._advantages(task).double()
            self.truth[key] = self.exact(
                task, lambda h, w: eager(h, w, self.token_ids, old, advantages)
            )
        return self.truth[key]

    def errors(self, task: str, outputs: Any) -> dict[str, float]:
        """Errors against float64: of the loss, absolute; of the gradients, in the 2-norm."""
        loss, expected = self._expected(task)
        if outputs[0] is None:
            return self.shapes_only(outputs, expected)
        return {"loss": abs(outputs[0].item() - loss.item())} | self.off(outputs[1], expected)


class LinearTokenLogprobs(Head):
    """Log-probabilities of one token a row."""

    operator = "linear_token_logprobs"
    contestants = (
        *(
            Contestant(GRADIENTS, name, with_upstream(build))
            for name, build in {
                "rlkern": build_rlkern_logprobs,
                "eager": lambda: token_logprobs,
                "torch.compile": compiled(token_logprobs),
                "linear_cross_entropy": build_torch_chunked,
                "TRL": build_trl,
            }.items()
        ),
        Contestant(GRADIENTS, "three products", build_products),
        *(
            Contestant(LOGPROBS, name, without_gradients(build))
            for name, build in {
                "rlkern": build_rlkern_logprobs,
                "eager": lambda: token_logprobs,
                "TRL": build_trl,
            }.items()
        ),
        Contestant(LOGPROBS, "one product", lambda: build_products(gradients=False)),
    )
    bounds = {
        GRADIENTS: (f"{GRADIENTS}/three products",),
        LOGPROBS: (f"{LOGPROBS}/one product",),
    }

    def __init__(self, **shape: int) -> None:
        super().__init__(**shape)
        self.upstream = self.normal(*self.shape)

    def prepare(self, task: str) -> tuple[torch.Tensor, ...]:
        given = (*self.factors(task), self.token_ids)
        return given if task == LOGPROBS else (*given, self.upstream)

    def errors(self, task: str, outputs: Any) -> dict[str, float]:
        """Errors against float64, in the 2-norm."""
        if task not in self.truth:
            upstream = None if task == LOGPROBS else self.upstream.double()
            self.truth[task] = self.exact(
                task, lambda h, w: token_logprobs(h, w, self.token_ids), upstream
            )
        logprobs, expected = self.truth[task]
        if outputs is None or outputs[0] is None:
            return self.shapes_only(outputs, expected)
        found, gradients = (outputs, ()) if task == LOGPROBS else outputs
        error = ((found.double() - logprobs).norm() / logprobs.norm()).item()
        return {"logprobs": error} | self.off(gradients, expected)


@pytest.mark.parametrize("contestant", [c.key for c in FromHidden.contestants])
def test_from_hidden(contest, quick, contestant):
    contest(FromHidden, QUICK_SHAPE if quick else SHAPE, contestant, PLAN)


@pytest.mark.parametrize("contestant", [c.key for c in LinearTokenLogprobs.contestants])
def test_linear_token_logprobs(contest, quick, contestant):
    contest(LinearTokenLogprobs, QUICK_SHAPE if quick else SHAPE, contestant, PLAN)


def test_memory(quick, pytestconfig):
    """Extra memory by the number of tokens, and that ours does not grow."""
    measured = linear_memory.measure(quick)
    linear_memory.show(pytestconfig, measured)
    if not quick:
        for name in linear_memory.OURS:
            extra = [point["beyond"][name] for point in measured]
            assert max(extra) <= linear_memory.MOST, f"{name}: {extra} bytes"

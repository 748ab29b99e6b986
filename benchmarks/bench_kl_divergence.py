"""kl_divergence against eager PyTorch and torch.compile: KL and Jensen-Shannon.

Both with the gradient of the policy's logits, as a distillation or a KL penalty takes it, and the
KL alone, as a metric. Liger-Kernel's Jensen-Shannon is a Triton kernel: a CPU's table says so.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks.case import Case, Contestant

METRIC, KL, JS = "KL", "KL + gradient", "JS + gradient"
SHAPE = {"rows": 256, "vocab": 151936}
QUICK_SHAPE = {"rows": 16, "vocab": 4096}
# Relative, of the values and of the gradient in the 2-norm. fp32: a sum of n terms is off by up to
# sqrt(n) * 2^-24, 2.3e-5 over the vocabulary. bf16: eager rounds each log-probability near -12 by
# up to 1/32, and a difference of two, which is about 1, or half of that to their mixture, by 1/16.
# What is wrong by less than that shows in fp32, where the same code runs.
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 1e-1}


def eager_kl(logits, ref_logits):
    policy, reference = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return F.kl_div(reference, policy, reduction="none", log_target=True).sum(-1)


def eager_js(logits, ref_logits):
    policy, reference = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    mixture = torch.logaddexp(policy, reference) - 0.6931471805599453
    both = F.kl_div(mixture, policy, reduction="none", log_target=True) + F.kl_div(
        mixture, reference, reduction="none", log_target=True
    )
    return 0.5 * both.sum(-1)


def build_rlkern(divergence: str):
    import rlkern

    def run(logits, ref_logits):
        with rlkern.use_backend("native"):
            return rlkern.kl_divergence(logits, ref_logits, divergence=divergence)

    return run


def build_liger():
    # Its Triton kernel has no CPU form, and it returns the batch's mean, no value of each row.
    raise NotImplementedError("Liger-Kernel's LigerJSD runs on a GPU only")


def with_gradient(build):
    def build_task():
        function = build()

        def run(logits, ref_logits):
            value = function(logits, ref_logits)
            (gradient,) = torch.autograd.grad(value.sum(), logits)
            return value.detach(), gradient

        return run

    return build_task


def without_gradient(build):
    def build_task():
        return torch.no_grad()(build())

    return build_task


def contestants(task, ours, eager, wrap):
    return (
        Contestant(task, "rlkern", wrap(lambda: build_rlkern(ours))),
        Contestant(task, "eager", wrap(lambda: eager)),
        Contestant(task, "torch.compile", wrap(lambda: torch.compile(eager, dynamic=False))),
    )


class KlDivergence(Case):
    """Logits [rows, vocab] of a policy and of a reference about one nat apart."""

    operator = "kl_divergence"
    contestants = (
        *contestants(METRIC, "kl", eager_kl, without_gradient),
        *contestants(KL, "kl", eager_kl, with_gradient),
        *contestants(JS, "js", eager_js, with_gradient),
        Contestant(JS, "Liger", build_liger),
    )
    # Two tensors are read; the gradient is written besides.
    bounds = {METRIC: ("read", "read"), KL: ("copy", "read"), JS: ("copy", "read")}

    def __init__(self, rows: int, vocab: int, dtype: str) -> None:
        kind = getattr(torch, dtype)
        self.tolerance = TOLERANCE[kind]
        generator = torch.Generator().manual_seed(0)
        self.pristine = torch.randn(rows, vocab, generator=generator).to(kind)
        self.reference = torch.randn(rows, vocab, generator=generator).to(kind)
        self.bulk = self.pristine.clone()

    def prepare(self, task: str) -> tuple[torch.Tensor, ...]:
        self.bulk.copy_(self.pristine)
        return self.bulk.detach().requires_grad_(task != METRIC), self.reference

    @torch.no_grad()
    def errors(self, task: str, outputs: Any) -> dict[str, float]:
        """Relative errors against float64, the worst row's."""
        value, gradient = outputs if task != METRIC else (outputs, None)
        found: dict[str, list[torch.Tensor]] = {"value": [], "gradient": []}
        for i in range(self.pristine.shape[0]):
            p, q = (x[i].double().log_softmax(-1) for x in (self.pristine, self.reference))
            if task == JS:
                m = torch.logaddexp(p, q) - 0.6931471805599453
                of_p, of_q = (p.exp() * (p - m)).sum(), (q.exp() * (q - m)).sum()
                expected, slope = (of_p + of_q) / 2, p.exp() * (p - m - of_p) / 2
            else:
                expected = (p.exp() * (p - q)).sum()
                slope = p.exp() * (p - q - expected)
            found["value"].append((value[i].double() - expected).abs() / expected)
            if gradient is not None:
                found["gradient"].append((gradient[i].double() - slope).norm() / slope.norm())
        # torch's maximum keeps a NaN of any row.
        return {name: torch.stack(errors).max().item() for name, errors in found.items() if errors}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("contestant", [c.key for c in KlDivergence.contestants])
def test_kl_divergence(contest, quick, dtype, contestant):
    contest(KlDivergence, (QUICK_SHAPE if quick else SHAPE) | {"dtype": dtype}, contestant)

"""PolicyLoss against eager PyTorch, torch.compile and the trainers' own functions.

The eager lines are those that trainers carry (TRL's, with verl's metrics). With metrics, each
contestant returns the loss, the gradient with respect to the log-probabilities and the metrics as
Python numbers, as a log wants them, so that none is left uncomputed. Without, rlkern's are there
all the same, unread: there is no cheaper call.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import peers
from benchmarks.case import FULL, SHORT, Case, Contestant, Floor

TASK = "loss + gradient + metrics"
SHAPE = {"sequences": 64, "tokens": 4096}
QUICK_SHAPE = {"sequences": 8, "tokens": 256}
#: A micro-batch, and as much again as the main shape in few long sequences.
SIDE_SHAPES = ({"sequences": 8, "tokens": 1024}, {"sequences": 8, "tokens": 65536})
#: In both, because at this size a cold call is half the interpreter's and the dispatcher's.
CACHES = ("warm", "cold")
KL_COEF = 0.04
# Of the loss, the metrics and the gradient's largest entry, relative: sums of 1e5 fp32 terms in
# torch's own order are good to about 1e-6, a ratio to 1e-6.
TOLERANCE = 1e-4
OBJECTIVES = {
    "dapo + k3": {"clip": (0.2, 0.28), "kl": True, "sequence": False},
    "gspo": {"clip": (3e-4, 4e-4), "kl": False, "sequence": True},
}
#: Without metrics of anyone's choice, for peers who compute their own or none.
PLAIN = {
    "clip": {"clip": (0.2, 0.28), "kl": False, "sequence": False},
    "clip by sequence": {"clip": (3e-4, 4e-4), "kl": False, "sequence": True},
}
METRICS = ("approx_kl", "clip_frac_low", "clip_frac_high", "ratio_mean", "ratio_min", "ratio_max")


def eager(objective: str, logprobs, old, ref, advantages, mask):
    """Loss and metrics as a trainer writes them."""
    options = (OBJECTIVES | PLAIN)[objective]
    low, high = options["clip"]
    count = mask.sum().clamp(min=1)
    lengths = mask.sum(-1).clamp(min=1)
    log_ratio = (logprobs - old) * mask
    a = advantages[:, None]
    if options["sequence"]:
        ratio = (log_ratio.sum(-1, keepdim=True) / lengths[:, None]).exp()
    else:
        ratio = log_ratio.clamp(-20, 20).exp()
    per_token = -torch.min(ratio * a, ratio.clamp(1 - low, 1 + high) * a)
    kl = None
    if options["kl"]:
        x = (ref - logprobs) * mask
        kl = torch.expm1(x) - x
        per_token = per_token + KL_COEF * kl
    if options["sequence"]:
        loss = ((per_token * mask).sum(-1) / lengths).mean()
    else:
        loss = (per_token * mask).sum() / count

    def mean(x):
        return x.mean() if options["sequence"] else (x * mask).sum() / count

    with torch.no_grad():
        if options["sequence"]:
            least, most = ratio.min(), ratio.max()
        else:
            least = ratio.where(mask, torch.inf).min()
            most = ratio.where(mask, -torch.inf).max()
        metrics = {
            "approx_kl": ((torch.expm1(log_ratio) - log_ratio) * mask).sum() / count,
            "clip_frac_low": mean(((ratio < 1 - low) & (a < 0)).float()),
            "clip_frac_high": mean(((ratio > 1 + high) & (a > 0)).float()),
            "ratio_mean": mean(ratio),
            "ratio_min": least,
            "ratio_max": most,
        }
        if kl is not None:
            metrics["kl"] = (kl * mask).sum() / count
    return loss, metrics


def build_eager(objective: str):
    def run(*tensors):
        return eager(objective, *tensors)

    return run


def build_compiled(objective: str):
    return torch.compile(build_eager(objective), dynamic=False)


def build_rlkern(objective: str):
    import rlkern

    options = (OBJECTIVES | PLAIN)[objective]
    preset = "gspo" if options["sequence"] else "dapo"
    loss = rlkern.PolicyLoss.preset(preset, kl_coef=KL_COEF if options["kl"] else 0.0)

    def run(logprobs, old, ref, advantages, mask):
        with rlkern.use_backend("native"):
            return loss(
                logprobs,
                advantages,
                old_logprobs=old,
                ref_logprobs=ref if options["kl"] else None,
                mask=mask,
            )

    return run


def build_verl(objective: str):
    by_sequence = PLAIN[objective]["sequence"]
    name = "compute_policy_loss_gspo" if by_sequence else "compute_policy_loss_vanilla"
    function = peers.member("verl.trainer.ppo.core_algos", name)
    low, high = PLAIN[objective]["clip"]
    # The class that the function's own module knows: it asks for an instance of that one.
    config = function.__globals__["ActorConfig"](
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_low=low,
        clip_ratio_high=high, clip_ratio_c=1e9,
    )  # fmt: skip

    def run(logprobs, old, ref, advantages, mask):
        a = advantages[:, None].expand_as(logprobs)
        return function(old, logprobs, a, mask, config=config)

    return run


def build_openrlhf(objective: str):
    low, high = PLAIN[objective]["clip"]
    loss = peers.member("openrlhf.models.loss", "PolicyLoss")(
        clip_eps_low=low, clip_eps_high=high,
        policy_loss_type="gspo" if PLAIN[objective]["sequence"] else "ppo",
    )  # fmt: skip

    def run(logprobs, old, ref, advantages, mask):
        return loss(logprobs, old, advantages[:, None].expand_as(logprobs), mask)[0], {}

    return run


def build_plain(objective: str):
    """eager without its metrics."""
    low, high = PLAIN[objective]["clip"]

    def by_token(logprobs, old, ref, advantages, mask):
        ratio, a = (logprobs - old).exp(), advantages[:, None]
        per_token = -torch.min(ratio * a, ratio.clamp(1 - low, 1 + high) * a)
        return (per_token * mask).sum() / mask.sum(), {}

    def by_sequence(logprobs, old, ref, advantages, mask):
        ratio = (((logprobs - old) * mask).sum(-1) / mask.sum(-1)).exp()
        clipped = ratio.clamp(1 - low, 1 + high)
        return -torch.min(ratio * advantages, clipped * advantages).mean(), {}

    return by_sequence if PLAIN[objective]["sequence"] else by_token


def task(objective: str) -> str:
    return f"loss + gradient, {objective}" if objective in PLAIN else f"{TASK}, {objective}"


def as_numbers(metrics: Any) -> dict[str, float]:
    if isinstance(metrics, dict):
        return {name: value.item() for name, value in metrics.items()}
    return metrics.item_dict()


def with_gradient(build, *options, metrics: bool):
    """Of functions that give a loss and metrics: the gradient of their first argument, too, and the
    metrics as numbers where they are asked for."""

    def build_task():
        function = build(*options)

        def run(first, *rest):
            loss, found = function(first, *rest)
            (gradient,) = torch.autograd.grad(loss, first)
            return loss, gradient, as_numbers(found) if metrics else {}

        return run

    return build_task


def contestants():
    builders = {"rlkern": build_rlkern, "eager": build_eager, "torch.compile": build_compiled}
    plain = {
        "rlkern": build_rlkern,
        "eager": build_plain,
        "torch.compile": lambda objective: torch.compile(build_plain(objective), dynamic=False),
        "verl, with its metrics": build_verl,
        "OpenRLHF, with its metrics": build_openrlhf,
        "Liger": lambda objective: peers.gpu_only("Liger-Kernel's grpo_loss")(),
    }
    return tuple(
        Contestant(task(objective), name, with_gradient(build, objective, metrics=metrics))
        for objectives, builders, metrics in ((OBJECTIVES, builders, True), (PLAIN, plain, False))
        for objective in objectives
        for name, build in builders.items()
    )


class PolicyLosses(Case):
    """Ragged sequences of log-probabilities, half as long as the padding or longer."""

    operator = "policy_loss"
    contestants = contestants()
    #: Three inputs are read where there is a KL term, and one gradient is written.
    bounds = {
        task("dapo + k3"): ("read", "read", "copy"),
        task("gspo"): ("copy", "read"),
        task("clip"): ("copy", "read"),
        task("clip by sequence"): ("copy", "read"),
    }

    def __init__(self, sequences: int, tokens: int, cache: str) -> None:
        self.cache = cache
        self.tolerance = TOLERANCE
        generator = torch.Generator().manual_seed(0)
        shape = (sequences, tokens)

        def normal(*size):
            return torch.randn(*size, generator=generator)

        self.logprobs = -normal(*shape).abs()
        self.bulk = self.logprobs.clone()
        self.old = self.logprobs + 0.1 * normal(*shape)
        self.ref = self.logprobs + 0.3 * normal(*shape)
        self.advantages = normal(sequences)
        lengths = torch.randint(tokens // 2, tokens + 1, (sequences, 1), generator=generator)
        self.mask = torch.arange(tokens) < lengths
        self.truth: dict[str, tuple] = {}

    @staticmethod
    def floors(**params: Any) -> tuple[Floor, ...]:
        if {name: params[name] for name in SHAPE} != SHAPE:
            return ()
        promised = {"dapo + k3": (10, 3), "gspo": (4, 2)}
        return tuple(
            Floor(f"{task(objective)}/rlkern", (f"{task(objective)}/{peer}",), least)
            for objective, floors in promised.items()
            for peer, least in zip(("eager", "torch.compile"), floors, strict=True)
        )

    def prepare(self, task: str) -> tuple[torch.Tensor, ...]:
        # The ceilings scale the bulk in place.
        self.bulk.copy_(self.logprobs)
        leaf = self.bulk.detach().requires_grad_()
        return leaf, self.old, self.ref, self.advantages, self.mask

    def _expected(self, objective: str) -> tuple:
        if objective not in self.truth:
            tensors = (self.logprobs, self.old, self.ref, self.advantages)
            leaf, *rest = (x.double() for x in tensors)
            leaf.requires_grad_()
            loss, metrics = eager(objective, leaf, *rest, self.mask)
            (gradient,) = torch.autograd.grad(loss, leaf)
            self.truth[objective] = loss.item(), gradient, as_numbers(metrics)
        return self.truth[objective]

    def errors(self, task_name: str, outputs: Any) -> dict[str, float]:
        """Errors against float64. loss and metrics: relative above 1. gradient: of the worst
        entry, over the largest one."""
        objective = task_name.rpartition(", ")[2]
        loss, gradient, metrics = outputs
        true_loss, true_gradient, true_metrics = self._expected(objective)

        difference = (gradient.double() - true_gradient).abs().max()
        found = {
            "loss": relative(loss.item(), true_loss),
            "gradient": (difference / true_gradient.abs().max()).item(),
        }
        if objective in OBJECTIVES:
            found |= {name: relative(metrics[name], truth) for name, truth in true_metrics.items()}
        return found


def relative(value: float, truth: float) -> float:
    return abs(value - truth) / max(abs(truth), 1.0)


SHAPES = [(SHAPE | {"cache": "warm"}, FULL), (SHAPE | {"cache": "cold"}, SHORT)]
SHAPES += [(shape | {"cache": "warm"}, SHORT) for shape in SIDE_SHAPES]


@pytest.mark.parametrize("shape, plan", SHAPES, ids=[str([*s.values()]) for s, _ in SHAPES])
@pytest.mark.parametrize("contestant", [c.key for c in PolicyLosses.contestants])
def test_policy_loss(contest, quick, shape, plan, contestant):
    if quick:
        shape = QUICK_SHAPE | {"cache": shape["cache"]}
    contest(PolicyLosses, shape, contestant, plan)

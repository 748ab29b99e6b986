"""token_logprobs against eager, torch.compile, TRL, verl and OpenRLHF, forward and with backward.

Forward runs under no_grad, as old and reference log-probabilities are taken. With backward, the
call and the gradient with respect to the logits are one timed region. Peers get the dtype that
trainers give them: bf16 logits stay bf16 throughout, which is why their errors are larger.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from benchmarks import peers
from benchmarks.case import FULL, SHORT, Case, Contestant, Floor, MemoryLimit

FORWARD = "forward"
BACKWARD = "forward + backward"
SHAPE = {"rows": 4, "tokens": 128, "vocab": 151936}
QUICK_SHAPE = {"rows": 2, "tokens": 16, "vocab": 4096}
#: Llama 2, GPT-2 (its rows begin at odd addresses), Llama 3 and Gemma, whose vocabularies they are.
SIDE_SHAPES = (
    {"rows": 4, "tokens": 128, "vocab": 32000},
    {"rows": 4, "tokens": 64, "vocab": 50257},
    {"rows": 4, "tokens": 32, "vocab": 128256},
    {"rows": 4, "tokens": 32, "vocab": 262144},
)
# Relative above 1. In bf16 what is near 12, a log-probability or, in TRL, log sum exp, is rounded
# by up to 1/32, and the gradient's probabilities are taken from that: 3.2e-2, and three roundings
# more by 2^-9 make 3.8e-2. What lies below -16 is rounded twice as much, and weighs little.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def eager(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """The lines that trainers carry, in the dtype of the logits."""
    return torch.gather(logits.log_softmax(-1), -1, token_ids.unsqueeze(-1)).squeeze(-1)


def build_eager():
    return eager


def build_compiled():
    return torch.compile(eager, dynamic=False)


def build_trl():
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax


def build_verl():
    return peers.member("verl.utils.torch_functional", "logprobs_from_logits")


def build_openrlhf():
    return peers.member("openrlhf.models.utils", "log_probs_from_logits")


def build_rlkern(inplace_backward: bool = False):
    import rlkern

    def native(logits, token_ids):
        # Named, so that a machine without the compiled library is reported and not timed in eager.
        with rlkern.use_backend("native"):
            return rlkern.token_logprobs(logits, token_ids, inplace_backward=inplace_backward)

    return native


def forward(build):
    def build_task():
        return torch.no_grad()(build())

    return build_task


def with_backward(build):
    def build_task():
        function = build()

        def run(logits, token_ids, upstream):
            logprobs = function(logits, token_ids)
            # Asking for the gradient of a non-leaf hands over the tensor that backward made;
            # accumulating into a leaf's .grad could copy it.
            (gradient,) = torch.autograd.grad(logprobs, logits, upstream.to(logprobs.dtype))
            return logprobs, gradient

        return run

    return build_task


class Produce(torch.autograd.Function):
    """Hands out a buffer as logits that a model would have produced, without a copy.

    In-place backward writes over logits that are not a leaf. The fresh tensor over the buffer's
    storage is no view of anything and has a version counter of its own, like a matrix product's
    result.
    """

    @staticmethod
    def forward(ctx, weight, buffer):
        return torch.empty(0, dtype=buffer.dtype, device=buffer.device).set_(buffer)

    @staticmethod
    def backward(ctx, gradient):
        raise AssertionError("no gradient is asked for below the logits")


PEERS = {
    "eager": build_eager,
    "torch.compile": build_compiled,
    "TRL": build_trl,
    "verl": build_verl,
    "OpenRLHF": build_openrlhf,
    # Log-probabilities by its cross entropy, as flash-attn's serve verl.
    "Liger": peers.gpu_only("Liger-Kernel's Triton cross entropy"),
}


class TokenLogprobs(Case):
    """Logits [rows, tokens, vocab] as a trainer holds them, and one chosen token each."""

    operator = "token_logprobs"
    contestants = (
        Contestant(FORWARD, "rlkern", forward(build_rlkern)),
        *(Contestant(FORWARD, name, forward(build)) for name, build in PEERS.items()),
        Contestant(BACKWARD, "rlkern in place", with_backward(lambda: build_rlkern(True))),
        Contestant(BACKWARD, "rlkern", with_backward(build_rlkern)),
        *(Contestant(BACKWARD, name, with_backward(build)) for name, build in PEERS.items()),
    )
    bounds = {FORWARD: ("read",), BACKWARD: ("read", "scale")}

    def __init__(self, rows: int, tokens: int, vocab: int, dtype: str) -> None:
        kind = getattr(torch, dtype)
        self.tolerance = TOLERANCE[kind]
        generator = torch.Generator().manual_seed(0)
        shape = (rows, tokens)
        self.token_ids = torch.randint(vocab, shape, generator=generator)
        logits = torch.randn(*shape, vocab, generator=generator)
        # Chosen tokens from hopeless to nearly certain, as sampled text has them.
        lift = torch.rand(*shape, 1, generator=generator) * (math.log(vocab) + 2)
        self.pristine = logits.scatter_add_(-1, self.token_ids.unsqueeze(-1), lift).to(kind)
        self.bulk = self.pristine.clone()
        # Exact in bf16, so that every dtype is given the same upstream gradient.
        self.upstream = torch.randn(shape, generator=generator).bfloat16().float()
        self.weight = torch.zeros((), requires_grad=True)
        self.truth: tuple[torch.Tensor, torch.Tensor] | None = None

    @staticmethod
    def floors(**params: Any) -> tuple[Floor | MemoryLimit, ...]:
        if {name: params[name] for name in SHAPE} != SHAPE:
            return ()
        inplace = f"{BACKWARD}/rlkern in place"
        fp32 = params["dtype"] == "float32"
        of_read = (Floor("forward/rlkern", ("read",), 0.6),) if fp32 else ()
        return of_read + (
            Floor("forward/rlkern", ("forward/eager",), 4),
            Floor("forward/rlkern", ("forward/torch.compile",), 1.5),
            MemoryLimit("forward/rlkern", 0.01),
            Floor(inplace, ("read", "scale"), 0.5 if fp32 else 0.25),
            Floor(inplace, (f"{BACKWARD}/eager",), 6),
            Floor(inplace, (f"{BACKWARD}/torch.compile",), 5),
        )

    def prepare(self, task: str) -> tuple[torch.Tensor, ...]:
        self.bulk.copy_(self.pristine)
        if task == FORWARD:
            return self.bulk, self.token_ids
        return Produce.apply(self.weight, self.bulk), self.token_ids, self.upstream

    @torch.no_grad()
    def _expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and the gradient's flat rows, from float64.

        The gradient is kept in fp32, whose rounding is far below any tolerance here: in float64
        it would be the largest tensor of all, and every contestant would wait for it again.
        """
        if self.truth is None:
            logprobs, gradient = [], []
            rows, ids = self.pristine.flatten(0, 1), self.token_ids.flatten()
            upstream = self.upstream.flatten().double()
            for start in range(0, len(rows), 16):
                part = slice(start, start + 16)
                log_softmax = rows[part].double().log_softmax(-1)
                picked = torch.arange(len(log_softmax)), ids[part]
                logprobs.append(log_softmax[picked])
                expected = log_softmax.exp_().mul_(-upstream[part, None])
                expected[picked] += upstream[part]
                gradient.append(expected.float())
            self.truth = torch.cat(logprobs), torch.cat(gradient)
        return self.truth

    @torch.no_grad()
    def errors(self, task: str, outputs: Any) -> dict[str, float]:
        """Errors against float64, the worst over rows.

        logprob: absolute, relative above 1. target: of the chosen token's gradient, over the
        upstream one. rest: of the other tokens' gradient, in the 2-norm, over its own norm; apart
        from the target's, beside which all of them together could be missing unnoticed.
        """
        logprobs, gradient = outputs if task == BACKWARD else (outputs, None)
        truth, expected = self._expected()
        found = logprobs.flatten().double()
        worst = {"logprob": ((found - truth).abs() / truth.abs().clamp(min=1)).max().item()}
        if gradient is None:
            return worst
        rows, upstream = gradient.flatten(0, 1), self.upstream.flatten()
        target, rest = [], []
        # A few rows at a time, in the caches.
        for start in range(0, len(rows), 16):
            part = slice(start, start + 16)
            at = self.token_ids.flatten()[part, None]
            difference = rows[part].float().sub(expected[part])
            target.append((difference.gather(1, at).squeeze(1) / upstream[part]).abs())
            own = expected[part].scatter(1, at, 0.0).norm(dim=-1)
            rest.append(difference.scatter_(1, at, 0.0).norm(dim=-1) / own)
        # torch's maximum keeps a NaN, Python's would lose it.
        named = {"target": target, "rest": rest}
        return worst | {name: torch.cat(values).max().item() for name, values in named.items()}


DTYPES = ("float32", "bfloat16")
SHAPES = [(SHAPE, FULL, dtype) for dtype in DTYPES]
SHAPES += [(shape, SHORT, "bfloat16") for shape in SIDE_SHAPES]
# fp32 beside the main shape where it differs most: odd addresses.
SHAPES += [(SIDE_SHAPES[1], SHORT, "float32")]
IDS = [f"{shape['vocab']}-{dtype}" for shape, _, dtype in SHAPES]


@pytest.mark.parametrize("shape, plan, dtype", SHAPES, ids=IDS)
@pytest.mark.parametrize("contestant", [c.key for c in TokenLogprobs.contestants])
def test_token_logprobs(contest, quick, shape, plan, dtype, contestant):
    shape = QUICK_SHAPE if quick else shape
    contest(TokenLogprobs, shape | {"dtype": dtype}, contestant, plan)

"""token_logprobs on a GPU: forward as old and reference log-probabilities are taken, backward in
place over the logits, and both together through autograd, beside the peers."""

from __future__ import annotations

import math
from typing import Any

import torch

from benchmarks.gpu.registry import Contestant, GpuCase, register

FORWARD = "forward"
ENTROPY = "forward with entropy"
INPLACE = "backward in place"
BOTH = "forward + backward"

# Largest errors: of what is computed in fp32, of what is computed in bf16, and of a gradient that
# is computed in fp32 and rounded to bf16.
EXACT, ROUNDED, GRADIENT = 1e-4, 5e-2, 5e-3


def ours(backend: str, entropy: bool = False):
    def build():
        import rlkern

        def call(logits, token_ids, *_):
            # Named, so that a machine that lacks it says so, and nothing else is timed instead.
            with rlkern.use_backend(backend):
                return rlkern.token_logprobs(logits, token_ids, return_entropy=entropy)

        return call

    return build


def ours_inplace(backend: str):
    def build():
        import rlkern
        from rlkern._schema import operator_name

        def op(name):
            return getattr(torch.ops.rlkern, operator_name(name, backend))

        saved: list[Any] = []

        def call(logits, token_ids, upstream):
            if not saved:
                with rlkern.use_backend(backend):
                    rlkern.token_logprobs(logits, token_ids)  # says why, where it cannot
                saved.append(op("token_logprobs")(logits, token_ids, None, None, 1.0, None, False))
            op("token_logprobs_bwd_")(
                upstream, None, logits, token_ids, None, None, 1.0, None, *saved[0]
            )
            return logits

        return call

    return build


def eager(logits, token_ids, *_):
    return torch.gather(logits.log_softmax(-1), -1, token_ids[:, None]).squeeze(-1)


def compiled():
    return torch.compile(eager, dynamic=False)


def trl():
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

    return lambda logits, ids, *_: selective_log_softmax_and_entropy(logits[None], ids[None])


def liger_selective():
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    def call(logits, ids, *_):
        # It leaves out the last row of each sequence: here the spare one behind the logits.
        whole = logits.as_strided((1, len(logits) + 1, logits.shape[1]), (0, logits.stride(0), 1))
        return fused_selective_log_softmax(whole, ids[None], temperature=1.0)

    return call


def liger_cross_entropy():
    from liger_kernel.transformers.functional import liger_cross_entropy

    # Its gradient is written over the logits in the forward pass.
    return lambda logits, ids, *_: -liger_cross_entropy(logits, ids, reduction="none")


def flash_attn():
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return lambda logits, ids, *_: -cross_entropy_loss(logits, ids)[0]


def quack():
    from quack import cross_entropy

    return lambda logits, ids, *_: -cross_entropy(logits, ids, reduction="none")


def no_grad(build):
    return lambda: torch.no_grad()(build())


def with_backward(build):
    def build_both():
        call = build()

        def both(logits, token_ids, upstream):
            out = call(logits, token_ids)
            first = out if isinstance(out, torch.Tensor) else out[0]
            (gradient,) = torch.autograd.grad(
                first, logits, upstream.view(first.shape).to(first.dtype)
            )
            return first, gradient

        return both

    return build_both


PEERS = {
    "eager": lambda: eager,
    "torch.compile": compiled,
    "TRL Triton": trl,
    "flash-attn Triton": flash_attn,
    "QuACK": quack,
}
# The log-probabilities that its GRPO trainers take carry no gradient; its cross entropy does.
FORWARD_PEERS = PEERS | {"Liger Triton": liger_selective}
BOTH_PEERS = PEERS | {"Liger Triton": liger_cross_entropy}


def of_peers(task, wrap, peers):
    return tuple(
        Contestant(task, name, wrap(build), dry=name != "torch.compile")
        for name, build in peers.items()
    )


def small_call(device, dtype, vocab, softcap, entropy):
    """Forward and both backwards of rows at every alignment, gradients at another, some masked."""
    import rlkern

    whole = torch.randn(2, 4, vocab, device=device).to(dtype).requires_grad_()
    ids = torch.randint(vocab, (2, 3), device=device)
    mask = torch.tensor([[True, True, False], [False, True, True]], device=device)
    temperature = torch.rand(2, 3, device=device) + 0.5
    with rlkern.use_backend("native"):
        out = rlkern.token_logprobs(
            whole[:, 1:], ids, mask=mask, temperature=temperature, softcap=softcap,
            return_entropy=True,
        )  # fmt: skip
        loss = out.logprobs.sum() + (out.entropy.sum() if entropy else 0.0)
        loss.backward()
        assert whole.grad is not None and whole.grad.isfinite().all()
        made = whole * 1
        every = torch.zeros(2, 4, dtype=torch.long, device=device)
        rlkern.token_logprobs(made, every, inplace_backward=True).sum().backward()


@register
class TokenLogprobs(GpuCase):
    operator = "token_logprobs"
    contestants = (
        Contestant(FORWARD, "rlkern native", no_grad(ours("native")), target=0.92),
        Contestant(FORWARD, "rlkern triton", no_grad(ours("triton"))),
        *of_peers(FORWARD, no_grad, FORWARD_PEERS),
        Contestant(ENTROPY, "rlkern native", no_grad(ours("native", entropy=True))),
        Contestant(ENTROPY, "rlkern triton", no_grad(ours("triton", entropy=True))),
        Contestant(ENTROPY, "TRL Triton", no_grad(trl)),
        Contestant(INPLACE, "rlkern native", ours_inplace("native"), target=0.92),
        Contestant(INPLACE, "rlkern triton", ours_inplace("triton")),
        Contestant(BOTH, "rlkern native", with_backward(ours("native"))),
        Contestant(BOTH, "rlkern triton", with_backward(ours("triton"))),
        *of_peers(BOTH, with_backward, BOTH_PEERS),
    )

    @staticmethod
    def small_calls(device: str) -> None:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for vocab in (1, 7, 1003, 33001):
                for softcap, entropy in ((None, False), (30.0, True)):
                    small_call(device, dtype, vocab, softcap, entropy)

    def __init__(self, device: str, tiny: bool) -> None:
        super().__init__(device, tiny)
        self.rows, self.vocab = (8, 1000) if tiny else (8192, 151936)
        generator = torch.Generator(device).manual_seed(0)
        self.ids = torch.randint(self.vocab, (self.rows,), generator=generator, device=device)
        self.pristine = torch.empty(self.rows, self.vocab, dtype=torch.bfloat16, device=device)
        self.pristine.normal_(generator=generator)
        # Chosen tokens from hopeless to nearly certain, as sampled text has them.
        lift = torch.rand(self.rows, 1, generator=generator, device=device)
        lift = lift.mul(math.log(self.vocab) + 2).bfloat16()
        self.pristine.scatter_add_(1, self.ids[:, None], lift)
        # One row to spare, for a peer that leaves out the last.
        self.logits = torch.zeros(self.rows + 1, self.vocab, dtype=torch.bfloat16, device=device)[
            :-1
        ]
        # Exact in bf16, so that every peer is given the same upstream gradient.
        self.upstream = torch.randn(self.rows, generator=generator, device=device)
        self.upstream = self.upstream.bfloat16().float()

    def shape(self) -> str:
        return f"{self.rows} x {self.vocab} bfloat16"

    def bytes_moved(self, task: str) -> int:
        once = self.rows * self.vocab * 2
        return {FORWARD: 1, ENTROPY: 1, INPLACE: 2, BOTH: 3}[task] * once

    def prepare(self, task: str) -> tuple[Any, ...]:
        # Whoever was timed before may have written over them, whatever the task.
        self.logits.copy_(self.pristine)
        logits = self.logits.detach()
        return logits.requires_grad_(task == BOTH), self.ids, self.upstream

    def errors(self, task: str, outputs: Any) -> dict[str, tuple[float, float]]:
        """Over up to 64 rows from all parts of the batch: the log-probability, relative above 1;
        the chosen token's gradient and, apart from it, the others' in the 2-norm.

        A peer that computes in bf16 is right to a few of its roundings, 2^-8 each; fp32 arithmetic
        to 1e-4; a gradient rounded to bf16 to 2^-8, of which the norm is less.
        """
        pick = torch.linspace(0, self.rows - 1, min(self.rows, 64), device=self.device).long()
        logits, ids = self.pristine[pick].double(), self.ids[pick]
        truth = logits.log_softmax(-1)
        chosen = truth.gather(1, ids[:, None]).squeeze(1)
        # Eager stays in bf16 throughout, and so does what it is compiled to on some versions.
        exact = ROUNDED
        found: dict[str, tuple[float, float]] = {}
        gradient = None
        if task == INPLACE:
            gradient = outputs
        else:
            first = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
            first = first.reshape(-1)
            exact = EXACT if first.dtype == torch.float32 else ROUNDED
            error = (first[pick] - chosen).abs() / chosen.abs().clamp(min=1)
            found["logprob"] = (error.max().item(), exact)
        if task == ENTROPY:
            entropy = -(truth.exp() * truth).sum(-1)
            found["entropy"] = ((outputs[1].reshape(-1)[pick] - entropy).abs().max().item(), 1e-3)
        if task == BOTH:
            gradient = outputs[1]
        if gradient is not None:
            upstream = self.upstream[pick].double()[:, None]
            wanted = torch.zeros_like(truth).scatter_(1, ids[:, None], 1.0) - truth.exp()
            wanted *= upstream
            off = gradient.reshape(self.rows, -1)[pick].double() - wanted
            target = (off.gather(1, ids[:, None]) / upstream).abs().max().item()
            limit = ROUNDED if task == BOTH and exact == ROUNDED else GRADIENT
            found["target gradient"] = (target, limit)
            for tensor in (off, wanted):
                tensor.scatter_(1, ids[:, None], 0.0)
            rest = (off.norm(dim=-1) / wanted.norm(dim=-1)).max().item()
            found["other gradients"] = (rest, limit)
        return found

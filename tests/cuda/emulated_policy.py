"""Calls the policy loss's CUDA kernels, built for the CPU, on torch tensors, and lets PolicyLoss
run on them."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import torch
from emulated_kernels import build, poisoned

from rlkern.ops import policy_loss as operator

NAMES = (
    "logprobs", "advantages", "mask", "old_logprobs", "ref_logprobs", "rollout_logprobs",
    "entropy", "token_weights", "entropy_mask", "offsets", "normalizer", "num_sequences",
    "entropy_normalizer",
)  # fmt: skip


def rows(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.stride(0) if tensor.dim() == 2 else 0


class EmulatedPolicy:
    """The two operators with the block sizes and the limit of a grid's blocks as attributes."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.threads = 32
        self.finish_threads = 32
        self.max_blocks = 2**31 - 1
        self.calls = 0

    def forward(self, *args):
        """rlkern::policy_loss: arguments and results as in rlkern/_schema.py."""
        self.calls += 1
        *tensors, options, grad_logprobs, grad_entropy = args
        given = {n: x for n, x in zip(NAMES, tensors, strict=True) if x is not None}
        logprobs, offsets = given["logprobs"], given.get("offsets")
        packed = offsets is not None
        sequences = len(offsets) - 1 if packed else logprobs.shape[0]
        if given["advantages"].shape == (sequences,):
            given["sequence_advantages"] = given.pop("advantages")
        out = [poisoned(*(logprobs.shape if g else (0,))) for g in (grad_logprobs, grad_entropy)]
        for name, wanted, grad in zip(
            ("grad_logprobs", "grad_entropy"), (grad_logprobs, grad_entropy), out, strict=True
        ):
            if wanted:
                given[name] = grad
        loss, scale = poisoned(1).squeeze(0), poisoned(2)
        metrics = poisoned(operator.METRICS, dtype=torch.float64)
        totals = poisoned(sequences, self.module.TOTALS, dtype=torch.float64)
        # A tensor without elements has no address, and is given all the same.
        arguments = {n: rows(x) for n, x in given.items() if x.numel() or x.dim() == 0}
        self.module.forward(
            arguments, sequences, logprobs.shape[-1], options, totals.data_ptr(), loss.data_ptr(),
            metrics.data_ptr(), scale.data_ptr(), self.threads, self.finish_threads,
            self.max_blocks,
        )  # fmt: skip
        return loss, metrics, *out, scale

    def backward(self, grad_loss, grad_logprobs, grad_entropy, scale):
        """rlkern::policy_loss_bwd."""
        grads = (grad_logprobs, grad_entropy)
        out = tuple(poisoned(*g.shape) for g in grads)
        aligned = all(t.data_ptr() % 16 == 0 for t in (*grads, *out))
        self.module.backward(
            grad_loss.data_ptr(), scale.data_ptr(), [(g.data_ptr(), g.numel()) for g in grads],
            [t.data_ptr() for t in out], aligned, self.threads, self.max_blocks,
        )  # fmt: skip
        return out

    def serve(self, monkeypatch) -> None:
        """Sends PolicyLoss to these kernels, but for float64, which stays with the reference."""
        overloads = {"policy_loss": self.forward, "policy_loss_bwd": self.backward}
        chosen = {torch.float32: "emulated", torch.float64: "eager"}
        namespace = SimpleNamespace
        monkeypatch.setattr(operator._register, "overload", lambda op, backend: overloads[op])
        monkeypatch.setattr(
            operator, "_backend", namespace(choose=lambda op, device, dtype: chosen[dtype])
        )


def emulated_policy() -> EmulatedPolicy:
    return EmulatedPolicy(build("_emulated_policy", "emulated_policy.cpp"))

"""Calls the CUDA kernels of policy_rows, built for the CPU, on torch tensors."""

from __future__ import annotations

from types import ModuleType

import torch
from emulated_kernels import build, logit_rows, poisoned, span

from rlkern.ops.policy_rows import RowArguments, TokenArguments


class EmulatedPolicyRows:
    """rlkern::policy_rows with the kernel and the limit of a grid's blocks as attributes."""

    def __init__(self, module: ModuleType, blocks: int) -> None:
        self.module = module
        self.blocks = blocks  # of a cluster; 0: the kernel of two reads
        self.max_blocks = 2**31 - 1
        self.calls = 0

    def run(
        self,
        logits: torch.Tensor,
        grad: torch.Tensor,
        rows: RowArguments,
        tokens: TokenArguments,
        return_entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Arguments and results as in rlkern/_schema.py; `grad` may be the logits."""
        self.calls += 1
        shape = logits.shape[:-1]
        logprobs = poisoned(*shape)
        entropy = poisoned(*(shape if return_entropy else (0,)))
        upstream = poisoned(*shape, 2)
        given = {n: x for n, x in tokens._asdict().items() if isinstance(x, torch.Tensor)}
        assert all(x.is_contiguous() for x in given.values())
        given |= {"logprobs": logprobs, "upstream": upstream}
        if return_entropy:
            given["entropy"] = entropy
        self.module.run(
            logit_rows(self.module, logits, *rows, self.max_blocks),
            {n: (x.data_ptr(), 0) for n, x in given.items()},
            span(grad[..., 0]),
            tokens.options,
            self.blocks,
        )
        return logprobs, entropy, upstream


def module() -> ModuleType:
    return build("_emulated_policy_rows", "emulated_policy_rows.cpp")

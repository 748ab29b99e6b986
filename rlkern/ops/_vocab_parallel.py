"""A vocabulary spread over processes: what its parts of a row come to, together.

Each rank runs the row pass over its own columns. Their results are merged relative to the maximum
of all, in float64, so that the sum over all tokens but the chosen one keeps its precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlkern.ops._checks import ELSEWHERE
from rlkern.reference.token_logprobs import wide_dtype


@dataclass(frozen=True)
class Columns:
    """Of a vocabulary of `total` the columns [begin, begin + count), which this rank holds."""

    begin: int
    count: int
    total: int
    group: Any

    @classmethod
    def of(cls, count: int, group: Any, device: torch.device) -> Columns:
        import torch.distributed as dist

        if torch.compiler.is_compiling():
            raise RuntimeError(
                "vocab_group: expected None inside torch.compile, which cannot trace its "
                "collectives, got a process group"
            )
        if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"vocab_group: expected a torch.distributed process group, got "
                f"{type(group).__name__}"
            )
        own = torch.tensor([count], device=device)
        counts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(counts, own, group)
        widths = torch.cat(counts).tolist()
        begin = sum(widths[: dist.get_rank(group)])
        return cls(begin, count, sum(widths), group)

    def own_ids(self, ids: Tensor) -> Tensor:
        """As columns of this rank; ELSEWHERE for those of another."""
        here = (ids >= self.begin) & (ids < self.begin + self.count)
        return torch.where(here, ids - self.begin, ELSEWHERE)

    def summed(self, part: Tensor) -> Tensor:
        """The sum over the ranks, taken in fp32."""
        import torch.distributed as dist

        dtype = wide_dtype(part)
        total = part.to(dtype)
        dist.all_reduce(total, dist.ReduceOp.SUM, self.group)
        return total.to(part.dtype)

    def merged(
        self,
        logprobs: Tensor,
        entropy: Tensor,
        state: Tensor,
        ids: Tensor,
        mask: Tensor | None,
        inverse_temperature: float | Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What token_logprobs returns for the whole rows, the same bits on every rank.

        Args:
            logprobs, entropy, state: of this rank's columns, as the operator returns them; ids are
                those it was given.
            mask: [...] or None.
            inverse_temperature: a number or one per token.
        """
        import torch.distributed as dist

        top, log_sum = state.double().unbind(-1)
        largest = top.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, self.group)
        dead = largest == -torch.inf
        # log of this rank's sum of exponentials, relative to the largest logit of all.
        rise = torch.where(top == -torch.inf, -torch.inf, (top - largest) * inverse_temperature)
        log_mass = rise + log_sum
        mass = log_mass.exp()
        owned = ids != ELSEWHERE
        own = torch.where(owned, logprobs.double(), 0.0)
        parts = [
            # Of all but the chosen token: 1 - p is not formed by subtraction.
            mass * torch.where(owned, -torch.expm1(own), 1.0),
            torch.where(owned, own + log_mass, 0.0),
            owned.double(),
        ]
        if entropy.numel():
            # E[z] - max of the rank's own part, times its mass.
            mean = rise + log_sum - entropy.double()
            parts.append(torch.where(mass == 0, 0.0, mass * mean))
        sums = torch.stack(parts)
        dist.all_reduce(sums, dist.ReduceOp.SUM, self.group)
        others, target, found = sums[:3]
        total = others + target.exp()
        # As the row pass does it: exact where the chosen token carries nearly all.
        alone = torch.log1p(others * (-target).exp())
        merged = torch.where(target > -1, -alone, target - total.log())
        merged = torch.where(dead & ~total.isnan(), -torch.inf, merged).where(found > 0, torch.nan)
        log_total = torch.where(dead & ~total.isnan(), 0.0, total.log())
        result = [merged, log_total]
        if entropy.numel():
            spread = total.log() - sums[3] / total
            result.append(torch.where(dead & ~total.isnan(), 0.0, spread))
        if mask is not None:
            result = [x.where(mask, 0.0) for x in result]
            largest = largest.where(mask, 0.0)
        dtype = state.dtype
        whole = torch.stack([largest, result[1]], -1).to(dtype)
        return result[0].to(dtype), result[2].to(dtype) if entropy.numel() else entropy, whole

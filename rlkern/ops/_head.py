"""The lm_head in chunks of tokens: what the operators on hidden states share.

Only one chunk's logits are ever in memory; how many tokens that is follows from a budget of bytes,
the vocabulary and the dtype, not from how many tokens there are.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rlkern.ops import _checks

#: Bytes of logits that a call holds at a time, unless it says otherwise.
MEMORY_BUDGET = 96 << 20
# Chunks are whole multiples of what the matrix kernels work on at a time.
_ROWS = 64
# Of the weight gradient that one chunk gives, before it is added to the sum.
_PART_BYTES = 16 << 20


def checked_budget(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"memory_budget: expected an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"memory_budget: expected at least 1 byte, got {value}")
    return value


def chunk_rows(vocab: int, element_size: int, memory_budget: int) -> int:
    """Tokens of a chunk: not a matter of how many there are."""
    return max(memory_budget // (vocab * element_size) // _ROWS, 1) * _ROWS


def checked_products(
    hidden: object, weight: object, bias: object, prefix: str = ""
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The factors, under autocast in its dtype. `prefix`: of the arguments' names."""
    of_hidden, of_weight, of_bias = (f"{prefix}{name}" for name in ("hidden", "weight", "bias"))
    h = _checks.require_logits(hidden, of_hidden, "[..., D] with D of at least 1")
    w = _checks.require_logits(weight, of_weight, "[V, D] with D of at least 1")
    if w.dim() != 2 or w.shape[0] == 0 or w.shape[1] != h.shape[-1]:
        raise ValueError(
            f"{of_weight}: expected shape [V, {h.shape[-1]}] ({of_hidden}'s last dimension) with V "
            f"of at least 1, got {list(w.shape)}"
        )
    b = None
    if bias is not None:
        b = _checks.require_logits(bias, of_bias, "[V]")
        if b.shape != w.shape[:1]:
            raise ValueError(
                f"{of_bias}: expected shape [{w.shape[0]}] ({of_weight}'s rows), got "
                f"{list(b.shape)}"
            )
    for name, factor in ((of_hidden, h), (of_weight, w), (of_bias, b)):
        if factor is None:
            continue
        _checks.refuse_tangent(factor, name)
        if factor.device != h.device:
            raise ValueError(
                f"{name}: expected device {h.device} ({of_hidden}'s), got {factor.device}"
            )
    kind = h.device.type
    if torch.is_autocast_enabled(kind) and h.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        return h.to(dtype), w.to(dtype), None if b is None else b.to(dtype)
    for name, factor in ((of_weight, w), (of_bias, b)):
        if factor is not None and factor.dtype != h.dtype:
            raise TypeError(f"{name}: expected {h.dtype} ({of_hidden}'s dtype), got {factor.dtype}")
    return h, w, b


class Chunk:
    """Some tokens: which, their hidden states, and a buffer's worth of their logits."""

    def __init__(self, rows: slice | Tensor, count: int) -> None:
        self.rows, self.count = rows, count

    def of(self, values: Tensor | None) -> Tensor | None:
        return None if values is None else values[self.rows]


def chunks(
    total: int, mask: Tensor | None, rows: int, begin: int = 0, end: int | None = None
) -> Iterator[Chunk]:
    """Chunks of at most `rows` tokens of [begin, end); without the masked ones where nobody waits
    for the count."""
    end = total if end is None else end
    if mask is not None and mask.device.type == "cpu":
        places = mask[begin:end].nonzero().squeeze(1) + begin
        for part in places.split(rows) if len(places) else ():
            yield Chunk(part, part.shape[0])
        return
    for first in range(begin, end, rows):
        last = min(first + rows, end)
        yield Chunk(slice(first, last), last - first)


class Logits:
    """The logits of one chunk after the other, in the same memory: fresh memory is mapped at its
    first write, which takes as long as the row pass does."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: int, invariant: bool
    ) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.rows, self.invariant = rows, invariant
        self.memory = hidden.new_empty(0, weight.shape[0])

    def of(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Hidden states and logits; with `invariant` padded to the shape that every product has.
        The next call writes over the logits."""
        h = self.hidden[chunk.rows]
        if self.invariant and chunk.count < self.rows:
            h = torch.cat([h, h.new_zeros(self.rows - chunk.count, h.shape[1])])
        if self.memory.shape[0] < h.shape[0]:
            self.memory = self.hidden.new_empty(h.shape[0], self.weight.shape[0])
        z = self.memory[: h.shape[0]]
        if self.bias is None:
            torch.mm(h, self.weight.t(), out=z)
        else:
            torch.addmm(self.bias, h, self.weight.t(), out=z)
        return h, z


class GradientSum:
    """A gradient that several chunks give parts of, added in fp32 (fp64 for fp64).

    The first part stays as the product gave it: a single chunk needs no sum.
    """

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.first: Tensor | None = None
        self.sum: Tensor | None = None

    def _begun(self) -> Tensor | None:
        """The sum, with the first part in it; none before that."""
        if self.sum is None and self.first is not None:
            self.sum, self.first = self.first.to(self.wide), None
        return self.sum

    def add_product(self, grads: Tensor, hidden: Tensor) -> None:
        """Of the weight: grads^T hidden."""
        total = self._begun()
        if total is None:
            self.first = torch.mm(grads.t(), hidden)
            return
        if total.dtype == grads.dtype:
            total.addmm_(grads.t(), hidden)
            return
        # By parts of the vocabulary: the product is rounded before it is added, and is not whole
        # in memory beside the sum.
        part = max(_PART_BYTES // (hidden.shape[1] * hidden.element_size()), 1)
        for begin in range(0, total.shape[0], part):
            columns = slice(begin, begin + part)
            total[columns] += torch.mm(grads[:, columns].t(), hidden)

    def add(self, grads: Tensor) -> None:
        """Of the bias."""
        part = grads.sum(0, dtype=self.wide)
        self.sum = part if self.sum is None else self.sum.add_(part)

    def result(self) -> Tensor:
        found = self.first if self.sum is None else self.sum
        return torch.zeros_like(self.like) if found is None else found.to(self.like.dtype)


class HeadGradients:
    """The gradients of hidden, weight and bias, those that are needed, chunk by chunk."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]
    ) -> None:
        self.hidden, self.weight = hidden, weight
        self.of_hidden = torch.zeros_like(hidden) if needs[0] else None
        self.of_weight = GradientSum(weight) if needs[1] else None
        self.of_bias = GradientSum(bias) if needs[2] and bias is not None else None

    def add(self, chunk: Chunk, h: Tensor, z: Tensor) -> None:
        """From the gradient of a chunk's logits, which has taken their place."""
        z[chunk.count :] = 0
        grads = z[: chunk.count]
        if self.of_hidden is not None:
            self.of_hidden[chunk.rows] = torch.mm(z, self.weight)[: chunk.count]
        if self.of_weight is not None:
            self.of_weight.add_product(grads, h[: chunk.count])
        if self.of_bias is not None:
            self.of_bias.add(grads)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """[0] where a gradient is not needed."""
        none = self.hidden.new_empty(0)
        return (
            none if self.of_hidden is None else self.of_hidden,
            none.clone() if self.of_weight is None else self.of_weight.result(),
            none.clone() if self.of_bias is None else self.of_bias.result(),
        )

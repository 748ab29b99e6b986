"""The lm_head in chunks of tokens: what the operators on hidden states share.

A call has one chunk's logits in memory; how many tokens that is follows from a budget of bytes,
the vocabulary and the dtype, not from how many tokens there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlkern.ops import _checks, _register
from rlkern.reference.token_logprobs import wide_dtype

#: Bytes of logits that a call holds at a time, unless it says otherwise. On a GPU chunks of fewer
#: than some 2048 tokens are bound by the traffic of the weight's gradient; a CPU's are not.
MEMORY_BUDGET = {"cpu": 64 << 20, "cuda": 1 << 30}
# Chunks are whole multiples of what the matrix kernels work on at a time.
_ROWS = 64
# What a CPU's 16-bit products take many rows by: of a number between two multiples they take a
# fifth more time, or twice as much (68 ms for 407 rows, 34 for 408, on Zen 5).
_ROW_STEP, _MANY = 4, 256
# Of the weight's gradient that one chunk gives, before it is added to the sum, and of the weight
# widened for logits in fp32.
_PART_BYTES = 12 << 20


class Cut(NamedTuple):
    """How the products with the lm_head are cut, and in what dtype the logits come out."""

    rows: int  # tokens of a chunk, whatever their number
    invariant: bool
    wide: bool  # in float32, though the factors are not


class Head(NamedTuple):
    """The lm_head's factors and how its products are cut."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    cut: Cut


def default_budget(device: torch.device) -> int:
    return MEMORY_BUDGET.get(device.type, MEMORY_BUDGET["cuda"])


def chunk_rows(row_bytes: int, memory_budget: int) -> int:
    """Tokens of a chunk: not a matter of how many there are."""
    return max(memory_budget // row_bytes // _ROWS, 1) * _ROWS


def checked_cut(
    hidden: Tensor,
    weight: Tensor,
    memory_budget: object,
    batch_invariant: object,
    logits_dtype: object = None,
    models: int = 1,
) -> Cut:
    """`models`: how many there are, of each of which a chunk's logits are held."""
    if memory_budget is None:
        memory_budget = default_budget(hidden.device)
    if isinstance(memory_budget, bool) or not isinstance(memory_budget, int):
        raise TypeError(f"memory_budget: expected an int, got {type(memory_budget).__name__}")
    if memory_budget < 1:
        raise ValueError(f"memory_budget: expected at least 1 byte, got {memory_budget}")
    if not isinstance(batch_invariant, bool):
        raise TypeError(f"batch_invariant: expected a bool, got {batch_invariant!r}")
    if logits_dtype is not None and logits_dtype is not torch.float32:
        raise ValueError(f"logits_dtype: expected None or torch.float32, got {logits_dtype!r}")
    if logits_dtype is not None and hidden.dtype == torch.float64:
        raise ValueError("logits_dtype: expected None with float64 hidden, got torch.float32")
    wide = logits_dtype is not None and hidden.dtype != torch.float32
    # Beside wide logits stands their gradient, rounded for the products.
    size = hidden.element_size() + (4 if wide else 0)
    rows = chunk_rows(weight.shape[0] * size * models, memory_budget)
    return Cut(rows, batch_invariant, wide)


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


def product_rows(count: int, like: Tensor, cut: Cut) -> int:
    """Of how many rows a product for `count` tokens is, the last ones zeros."""
    if cut.invariant:
        return cut.rows
    if like.device.type == "cpu" and like.element_size() == 2 and count > _MANY:
        return -(-count // _ROW_STEP) * _ROW_STEP
    return count


def padded(h: Tensor, rows: int) -> Tensor:
    """With rows of zeros behind the others."""
    if h.shape[0] == rows:
        return h
    return torch.cat([h, h.new_zeros(rows - h.shape[0], h.shape[1])])


class Chunk:
    """Some tokens: which, their hidden states, and a buffer's worth of their logits."""

    def __init__(self, rows: slice | Tensor, count: int) -> None:
        self.rows, self.count = rows, count

    def of(self, values: Tensor | None) -> Tensor | None:
        return None if values is None else values[self.rows]


def chunks(
    total: int,
    mask: Tensor | None,
    rows: int,
    begin: int = 0,
    end: int | None = None,
    compact: bool = False,
) -> Iterator[Chunk]:
    """Chunks of at most `rows` tokens of [begin, end); without the masked ones where nobody waits
    for the count, or `compact` says to."""
    end = total if end is None else end
    if mask is not None and (compact or mask.device.type == "cpu"):
        places = mask[begin:end].nonzero().squeeze(1) + begin
        for part in places.split(rows) if len(places) else ():
            yield Chunk(part, part.shape[0])
        return
    for first in range(begin, end, rows):
        last = min(first + rows, end)
        yield Chunk(slice(first, last), last - first)


class Logits:
    """The logits of one chunk after the other, in the same memory: fresh memory is mapped at its
    first write, which takes as long as the row pass does.

    `kept`: the memory of a loop of one chunk, which holds the logits that are asked for first.
    """

    def __init__(self, head: Head, kept: Tensor | None = None) -> None:
        self.hidden, self.weight, self.bias, self.cut = head
        self.dtype = torch.float32 if self.cut.wide else self.hidden.dtype
        self.made = kept is not None
        self.memory = self._room(0) if kept is None else kept

    def _room(self, rows: int) -> Tensor:
        return self.hidden.new_empty(rows, self.weight.shape[0], dtype=self.dtype)

    def of(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Hidden states and logits, of as many rows as their product has. The next call writes
        over the logits."""
        h = self.hidden[chunk.rows]
        h = padded(h, product_rows(chunk.count, h, self.cut))
        if self.memory.shape[0] < h.shape[0]:
            self.memory = self._room(h.shape[0])
        z = self.memory[: h.shape[0]]
        if self.made:
            self.made = False
        elif self.cut.wide:
            self._multiply_wide(h, z)
        elif self.bias is None:
            torch.mm(h, self.weight.t(), out=z)
        else:
            torch.addmm(self.bias, h, self.weight.t(), out=z)
        return h, z

    def _multiply_wide(self, h: Tensor, z: Tensor) -> None:
        if h.device.type == "cuda":
            torch.ops.aten.mm.dtype_out(h, self.weight.t(), torch.float32, out=z)
        else:
            # No product here takes 16-bit factors and keeps fp32 sums: a part of the weight is
            # widened at a time.
            h = h.float()
            part = max(_PART_BYTES // (4 * h.shape[1]), 1)
            for begin in range(0, z.shape[1], part):
                columns = slice(begin, begin + part)
                # Into memory of its own choice autocast would round the product.
                torch.mm(h, self.weight[columns].float().t(), out=z[:, columns])
        if self.bias is not None:
            z += self.bias


class GradientSum:
    """A gradient that several chunks give parts of, added in fp32 (fp64 for fp64).

    The first part stays as the product gave it: a single chunk needs no sum. On a GPU the parts of
    16-bit factors come in fp32; a CPU rounds each to their dtype first.
    """

    def __init__(self, like: Tensor, backend: str, several: bool) -> None:
        self.like, self.backend = like, backend
        self.wide = wide_dtype(like)
        self.unrounded = several and like.device.type == "cuda" and like.element_size() == 2
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
            if self.unrounded:
                self.sum = torch.mm(grads.t(), hidden, out_dtype=torch.float32)
            else:
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
            factors = grads[:, columns].t(), hidden
            if self.unrounded:
                self._add(total[columns], torch.mm(*factors, out_dtype=torch.float32))
            else:
                self._add(total[columns], torch.mm(*factors))

    def _add(self, total: Tensor, part: Tensor) -> None:
        if self.backend == "native":
            # torch's own widens the part in memory first.
            _register.overload("add_widened_", "native")(total, part)
        else:
            total += part

    def add(self, grads: Tensor) -> None:
        """Of the bias."""
        part = grads.sum(0, dtype=self.wide)
        self.sum = part if self.sum is None else self.sum.add_(part)

    def result(self) -> Tensor:
        found = self.first if self.sum is None else self.sum
        if found is None:
            return self.like.new_zeros(self.like.shape)
        return found.to(self.like.dtype)


class HeadGradients:
    """The gradients of hidden, weight and bias, those that are needed, chunk by chunk."""

    def __init__(self, head: Head, backend: str, needs: Sequence[bool]) -> None:
        hidden, weight, bias, cut = head
        self.hidden, self.weight = hidden, weight
        several = hidden.shape[0] > cut.rows
        self.invariant = cut.invariant
        self.of_hidden = hidden.new_zeros(hidden.shape) if needs[0] else None
        self.of_weight = GradientSum(weight, backend, several) if needs[1] else None
        self.of_bias = None
        if needs[2] and bias is not None:
            self.of_bias = GradientSum(bias, backend, several)

    def add(self, chunk: Chunk, h: Tensor, z: Tensor) -> None:
        """From the gradient of a chunk's logits, which has taken their place. h and z have the
        rows of a product, those of h behind the chunk's being zeros."""
        if chunk.count == 0:
            return
        z[chunk.count :] = 0
        z = z.to(h.dtype)
        if self.of_hidden is not None:
            self.of_hidden[chunk.rows] = torch.mm(z, self.weight)[: chunk.count]
        if self.invariant:
            # The weight's gradient is a sum over tokens, which depends on the batch anyway.
            h, z = h[: chunk.count], z[: chunk.count]
        if self.of_weight is not None:
            self.of_weight.add_product(z, h)
        if self.of_bias is not None:
            self.of_bias.add(z)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """[0] where a gradient is not needed."""
        none = self.hidden.new_empty(0)
        return (
            none if self.of_hidden is None else self.of_hidden,
            none.clone() if self.of_weight is None else self.of_weight.result(),
            none.clone() if self.of_bias is None else self.of_bias.result(),
        )


def fake_gradients(factors: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """As HeadGradients.results, without values: contiguous, whatever the factors are."""
    found = []
    for factor, needed in zip(factors, needs, strict=True):
        like = factors[0] if factor is None or not needed else factor
        assert like is not None
        found.append(like.new_empty(like.shape if needed else (0,)))
    return tuple(found)

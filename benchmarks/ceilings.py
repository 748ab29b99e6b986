"""What the machine can do at best with the bytes of a tensor, measured like a contestant.

Every candidate below is timed in the same alternation as the contestants; the fastest one of a
kind, per process, is the ceiling. A single candidate would not do: which of them reaches memory
bandwidth depends on torch's vectorisation for the machine at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import product

import torch


def _both(one: Callable[[], object], two: Callable[[], object]) -> Callable[[], object]:
    return lambda: (one(), two())


def candidates(bulk: torch.Tensor, pairs: Iterable[str] = ()) -> dict[str, Callable[[], object]]:
    """Returns functions by "ceiling/kind/candidate".

    The bytes are taken as fp32 whatever the dtype of `bulk`, so that no conversion of bf16 weighs
    on a figure that stands for memory alone.

    Args:
        bulk: A contiguous tensor whose byte count is a multiple of 8. It is scaled in place: the
            caller restores it before every call.
        pairs: Ceilings of two passes in one call, "read then copy" for example: what the first
            leaves in the caches, the second finds there.
    """
    words = bulk.view(-1).view(torch.float32)
    # Rows of bf16 that are odd in length have no whole number of words: then two or more together.
    rows = words.view(math.gcd(words.numel(), bulk.numel() // bulk.shape[-1]), -1)
    long_words = bulk.view(-1).view(torch.int64)
    copy = torch.empty_like(words).copy_(words)
    kinds: dict[str, dict[str, Callable[[], object]]] = {
        "read": {
            "sum": lambda: words.sum(),
            "sum of rows": lambda: rows.sum(-1),
            "sum of int64": lambda: long_words.sum(),
        },
        "copy": {
            "copy_": lambda: copy.copy_(words),
            "mul": lambda: torch.mul(words, 1.0001, out=copy),
        },
        "scale": {"mul_": lambda: words.mul_(1.0001), "neg_": lambda: words.neg_()},
    }
    for pair in pairs:
        first, second = (kinds[kind].items() for kind in pair.split(" then "))
        kinds[pair] = {
            f"{one}, {two}": _both(run_one, run_two)
            for (one, run_one), (two, run_two) in product(first, second)
        }
    return {
        f"ceiling/{kind}/{name}": call
        for kind, calls in kinds.items()
        for name, call in calls.items()
    }

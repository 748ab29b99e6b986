"""Rows of logits, and how near float64 what a kernel makes of them must be.

Bounds, in units u = 2^-24. An exponential exp(z - max) carries 5 u |z - max| from the rounding of
1 / temperature, of log2(e), of their product and of the difference, and 4 u of its own; weighted
by its probability, |z - max| is at most log V. A sum adds one u for each level of its tree, of
which there are fewer than 30. So log_sum is right to (5 log V + 34) u, the log-probability to that
and 4 u |logp| more, and the entropy, an expectation over |z - max|, to (1 + log V) times as much.
A softcap's value is right to 6 u c.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from dataclasses import dataclass

import emulated_kernels
import torch

from rlkern.reference import token_logprobs as reference

U = 2.0**-24
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF_ULP = {torch.float32: U, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Below it numbers are subnormal, and rounded to a fixed spacing.
SMALLEST = {torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-25}


@dataclass
class Inputs:
    logits: torch.Tensor
    ids: torch.Tensor
    mask: torch.Tensor | None = None
    token_temperature: torch.Tensor | None = None
    temperature: float = 1.0
    softcap: float | None = None

    def args(self):
        return (
            self.logits, self.ids, self.mask, self.token_temperature, self.temperature,
            self.softcap,
        )  # fmt: skip

    def flat(self):
        """What the reference takes: float64 rows, and one value per row."""
        n = self.ids.numel()
        counts = torch.ones(n, dtype=torch.bool) if self.mask is None else self.mask.reshape(n)
        temperature = torch.full((n,), self.temperature, dtype=torch.float64)
        if self.token_temperature is not None:
            temperature = self.token_temperature.reshape(n).double()
        rows = self.logits.double().reshape(n, self.logits.shape[-1])
        return rows, self.ids.reshape(n), counts, temperature, self.softcap


def random_inputs(dtype, tokens, vocab, spread=3.0, **options):
    generator = torch.Generator().manual_seed(vocab * 7 + len(tokens))
    logits = (torch.randn(*tokens, vocab, generator=generator) * spread).to(dtype)
    ids = torch.randint(vocab, tokens, generator=generator)
    # Targets from hopeless to nearly certain.
    lift = torch.rand(*tokens, 1, generator=generator) * (math.log(vocab) + 10)
    logits.scatter_add_(-1, ids[..., None], lift.to(dtype))
    return Inputs(logits, ids, **options)


def upstream(tokens, entropy=True):
    generator = torch.Generator().manual_seed(5)
    g = torch.randn(tokens, generator=generator)
    return g, torch.randn(tokens, generator=generator) if entropy else None


def sum_bound(inputs):
    vocab = inputs.logits.shape[-1]
    lowest = inputs.temperature
    if inputs.token_temperature is not None:
        lowest = inputs.token_temperature[inputs.token_temperature > 0].min().item()
    cap = 12 * (inputs.softcap or 0.0) / lowest
    return (5 * math.log(vocab) + 34 + cap) * U


def close(actual, expected, tolerance):
    actual, expected = actual.double(), expected.double()
    assert actual.shape == expected.shape
    equal = (actual == expected) | (actual.isnan() & expected.isnan())
    bad = ~(equal | ((actual - expected).abs() <= tolerance))
    if bad.any():
        at = bad.nonzero()[0].tolist()
        allowed = torch.as_tensor(tolerance).expand_as(bad)
        raise AssertionError(
            f"{int(bad.sum())} of {bad.numel()} differ, first at {at}: {actual[tuple(at)]}, "
            f"expected {expected[tuple(at)]} +- {allowed[tuple(at)]}"
        )


def check_forward(inputs, results):
    expected = [r.view(inputs.ids.shape + r.shape[1:]) for r in reference.forward(*inputs.flat())]
    logprobs, entropy, state = results
    bound = sum_bound(inputs)
    size = expected[0].abs()
    # The relative error of the sum of the others, up to 90 nats below; what is lower counts as 0.
    relative = 500 * U * size + inputs.logits.shape[-1] * 2.0**-126
    close(logprobs, expected[0], torch.where(size < 1e-2, relative, bound + 4 * U * size))
    if entropy.numel() or not inputs.ids.numel():
        close(entropy, expected[1], bound * (1 + math.log(inputs.logits.shape[-1])))
    close(state[..., 0], expected[2][..., 0], 6 * U * (inputs.softcap or 0.0))
    close(state[..., 1], expected[2][..., 1], bound)
    return expected


def check_backward(inputs, g, h, forward_results, gradient, sum_error=0.0):
    """The gradient, given the log-probabilities and the state that the kernel was given;
    `sum_error`: how far that state may be from the one it had."""
    n, vocab = inputs.ids.numel(), inputs.logits.shape[-1]
    rows, ids, counts, temperature, softcap = inputs.flat()
    logprobs, entropy, state = (
        r.double().reshape(n, *shape)
        for r, shape in zip(forward_results, ((), (), (2,)), strict=True)
    )
    zero = torch.zeros(n, dtype=torch.float64)
    g, h = (zero if x is None else x.double().reshape(n) for x in (g, h))
    expected = reference.backward(
        g, h, rows, ids, counts, temperature, softcap, logprobs, entropy, state
    )
    # Errors of the exponential, of the mean and of the rounding to the logits' type.
    y, _ = reference.capped(rows, softcap)
    z, _ = reference.relative(y, temperature)
    distance = z.nan_to_num().clamp(-1e4, 0).abs()
    p = torch.exp(-distance - state[:, 1:].nan_to_num())
    # The target is given whole: its error is that of 1 - p, no larger than that of the others' sum.
    weight = g.abs()[:, None] + h.abs()[:, None] * (distance + math.log(vocab) + 1)
    cap = 12 * (softcap or 0.0) / temperature[:, None]
    relative = (5 * distance + 5 * math.log(vocab) + 60 + cap) * U + sum_error
    # Below the normal numbers an exponential is 0.
    tolerance = (relative * p + 2.0**-126) * weight / temperature[:, None]
    tolerance += (500 * U + HALF_ULP[gradient.dtype]) * expected.abs() + SMALLEST[gradient.dtype]
    close(gradient.reshape(n, vocab), expected, tolerance)


@contextlib.contextmanager
def unreadable(tensor):
    """Under the address sanitizer (sanitize.sh) a kernel that reads the tensor dies."""
    if emulated_kernels.SANITIZER != "address":
        yield
        return
    process = ctypes.CDLL(None)
    region = ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes)
    process.__asan_poison_memory_region(*region)
    try:
        yield
    finally:
        process.__asan_unpoison_memory_region(*region)

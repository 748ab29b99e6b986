"""What the lm_head-fused operators hold beside their arguments, results and fp32 accumulator."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

VOCAB, DIMENSION = 32768, 1024
MB = 1 << 20
#: An eighth of 16384 x 32768 logits in bf16, whatever the number of tokens.
MOST = 16384 * VOCAB * 2 // 8
CHILD = """
import json, sys, torch, rlkern
from benchmarks.memory import peak_extra_bytes

tokens, kind = int(sys.argv[1]), sys.argv[2]
trained = kind != "frozen"
hidden = torch.randn(1, tokens, {dimension}).bfloat16().requires_grad_()
weight = torch.randn({vocab}, {dimension}).bfloat16().requires_grad_(trained)
ids = torch.randint({vocab}, (1, tokens))
given = {{"advantages": torch.ones(1), "old_logprobs": -torch.rand(1, tokens) * 10}}
loss = rlkern.PolicyLoss.preset("dapo")

def step():
    wanted = [hidden, weight] if trained else [hidden]
    if kind == "logprobs":
        value = rlkern.linear_token_logprobs(hidden, weight, ids).sum()
    else:
        dtype = torch.float32 if kind == "wide" else None
        value = loss.from_hidden(hidden, weight, ids, logits_dtype=dtype, **given).loss
    return torch.autograd.grad(value, wanted)

step()
print(peak_extra_bytes(step))
"""


def extra(tokens: int, kind: str) -> int:
    """Bytes at the peak, of a process of its own, without the gradients and the accumulator."""
    code = CHILD.format(vocab=VOCAB, dimension=DIMENSION)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tokens), kind], capture_output=True, text=True, check=True
    )
    known = tokens * DIMENSION * 2
    if kind != "frozen":
        known += VOCAB * DIMENSION * (2 + 4)
    return json.loads(done.stdout) - known


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trained", "frozen", "logprobs"])
def test_an_eighth_of_the_logits_and_no_more_for_more_tokens(kind):
    """By default 64 MiB of logits, 12 MiB of products and the libraries' own, within 16 MiB of that
    for twice the tokens; at 16384 an eighth is enough for the hidden states' gradient, too."""
    at_16k = extra(16384, kind)
    assert at_16k + 16384 * DIMENSION * 2 <= MOST
    assert extra(32768, kind) <= at_16k + 16 * MB


@pytest.mark.slow
def test_logits_in_fp32_count_in_the_budget():
    """They and their rounded gradient are 64 MiB; a part of the weight in fp32 is 12 MiB more."""
    assert extra(4096, "wide") <= MOST

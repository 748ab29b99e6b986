"""docs/heads.md is whole and true: every argument is in it, and its Python runs."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

import rlkern

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "heads.md").read_text()
ENTRIES = (
    rlkern.PolicyLoss.from_logits,
    rlkern.PolicyLoss.from_hidden,
    rlkern.linear_token_logprobs,
    rlkern.kl_divergence,
    rlkern.linear_kl_divergence,
)
ARGUMENTS = {name for entry in ENTRIES for name in inspect.signature(entry).parameters}
ARGUMENTS -= {"self", "given", "logits", "return_entropy"}


@pytest.mark.parametrize("name", sorted(ARGUMENTS))
def test_every_argument_is_mentioned(name):
    assert re.search(rf"\b{name}\b", TEXT)


def test_the_examples_run():
    scope: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert len(blocks) == 5

    def agree(*names):
        first = scope[names[0]]
        for other in (scope[name] for name in names[1:]):
            torch.testing.assert_close(other.loss, first.loss)
            assert other.metrics.item_dict() == pytest.approx(first.metrics.item_dict(), rel=1e-4)

    exec(blocks[0], scope)
    agree("first", "second", "third")
    assert scope["hidden"].grad.abs().sum() > 0
    for block in blocks[1:]:
        exec(block, scope)
    agree("first", "second")
    torch.testing.assert_close(scope["same"], scope["kl"], rtol=1e-4, atol=1e-5)
    # Of the whole vocabulary, in a group of one.
    torch.testing.assert_close(scope["logprobs"], scope["old"])

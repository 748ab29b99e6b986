"""docs/advantages.md is whole and true: every name is in it, its Python runs, its numbers hold."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

import rlkern
from rlkern.ops.group_advantages import BATCHES
from rlkern.reference.group_advantages import BASELINES, SCALES, SINGLETONS
from rlkern.reference.return_scan import MASK_MODES
from rlkern.reference.whiten import EPS_MODES

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "advantages.md").read_text()
FUNCTIONS = ("gae", "discounted_returns", "vtrace", "group_advantages", "whiten")
#: Said in words: what a function works on.
PLAIN = {"x", "rewards"}
ARGUMENTS = {
    name
    for function in FUNCTIONS
    for name in inspect.signature(getattr(rlkern, function)).parameters
}
NAMES = {*BASELINES, *SCALES, *SINGLETONS, *BATCHES, *MASK_MODES, *EPS_MODES}


@pytest.mark.parametrize("name", sorted((ARGUMENTS - PLAIN) | NAMES))
def test_every_name_is_mentioned(name):
    # As code or in quotes: mean, none or scale alone are words of the language.
    assert re.search(rf"[`\"]{name}[`\"=]|`[^`\n]*\b{name}=", TEXT)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_has_a_chapter(name):
    assert f"\n## {name}\n" in TEXT


def test_the_examples_run():
    scope: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        exec(block, scope)
    assert scope["whitened"][scope["mask"]].mean().abs() < 1e-6
    # By hand: 1 - 0.5 at the last token, and with V = 0.5 throughout half of it one token earlier.
    carried = torch.tensor([[0.0625, 0.125, 0.0, 0.0, 0.25, 0.5]])
    torch.testing.assert_close(scope["carried"], carried)
    # In the gap 0.5 + 0.25 / 2, then half of that; before it -0.5 + 0.3125 / 2, and half of that.
    broken = torch.tensor([[-0.171875, -0.34375, 0.0, 0.0, 0.25, 0.5]])
    torch.testing.assert_close(scope["broken"], broken)


def test_the_loop_takes_its_advantages_from_here():
    grpo = pytest.importorskip("rlkern_loops.grpo")
    assert grpo.group_advantages is rlkern.group_advantages

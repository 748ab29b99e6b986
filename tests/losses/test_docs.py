"""docs/losses.md is whole and true: every name is in it, and its Python runs."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest

from rlkern import PolicyLoss
from rlkern.losses import PRESETS, RolloutCorrection
from rlkern.losses.readers import POLICY_READERS
from rlkern.reference.aggregation import AGGREGATIONS
from rlkern.reference.kl_penalty import ESTIMATORS

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "losses.md").read_text()
FIELDS = [field.name for kind in (PolicyLoss, RolloutCorrection) for field in fields(kind)]
ARGUMENTS = [name for name in inspect.signature(PolicyLoss.__call__).parameters if name != "self"]


@pytest.mark.parametrize(
    "name", sorted({*PRESETS, *FIELDS, *ARGUMENTS, *POLICY_READERS, *AGGREGATIONS, *ESTIMATORS})
)
def test_every_name_is_mentioned(name):
    assert re.search(rf"\b{name}\b", TEXT)


def test_the_table_has_the_presets_values():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+) \| [^|]+ \|$", TEXT, flags=re.MULTILINE))
    for name, preset in PRESETS.items():
        loss, row = PolicyLoss(**preset), rows[name]
        assert loss.surrogate in row, name
        for bound in (loss.clip_low, loss.clip_high):
            text = "none" if bound is None else f"{bound:g}".replace("e-0", "e-")
            text = {"0.0003": "3e-4", "0.0004": "4e-4", "4": "4.0"}.get(text, text)
            assert text in row or (loss.clip_high is None and "-" in row), (name, text)
        assert (loss.aggregation in row) or name == "gmpo", name
        assert ("kl_coef" in row) == (loss.kl_coef != 0), name
        assert loss.ratio_level in row or loss.surrogate in ("gmpo", "vespo", "reinforce"), name


def test_the_examples_run(capsys):
    scope: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert len(blocks) == 6
    for block in blocks:
        exec(block, scope)
    assert scope["metrics"]["tokens"] == scope["mask"].sum()
    assert "clip_frac" in capsys.readouterr().out

"""How the time of four operators grows: over tokens, the vocabulary and threads.

A sweep is no contest: one process goes along the axis, and what comes out is a curve with the
place where it leaves the straight line.
"""

from __future__ import annotations

import pytest

from benchmarks import sweeps
from benchmarks.sweep_worker import SWEEPS

AXES = [(op, axis) for op, mine in SWEEPS.items() for axis in (*mine, "threads")]


@pytest.mark.parametrize("operator, axis", AXES, ids=[f"{op}-{axis}" for op, axis in AXES])
def test_scaling(run_sweep, operator, axis):
    sweep = run_sweep(operator, axis)
    wrong = {point["n"]: point["wrong"] for point in sweep["points"]}
    ours = {n: w for n, names in wrong.items() for k, w in names.items() if k.startswith("rlkern")}
    assert not ours, f"wrong results of rlkern by {axis}: {ours}"
    missing = sweeps.gaps(sweep)
    assert not missing, f"{sweep['title']}: {'; '.join(missing)}"

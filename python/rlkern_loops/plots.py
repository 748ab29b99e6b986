"""The curves of a run as a picture."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# A panel each, as no two of them have one scale (eval/reward may be of another reward); those that
# the run does not measure are left out.
_METRICS = (
    "rollout/reward", "eval/reward", "eval/accuracy", "losses/policy_loss", "losses/value_loss",
    "losses/explained_variance", "losses/kl", "losses/kl_coef", "losses/entropy",
    "losses/approx_kl", "losses/clipfrac",
)  # fmt: skip


def plot_curves(records: Sequence[dict[str, Any]], path: Path, title: str = "") -> None:
    """Draws the training steps' metrics into a PNG, in two rows of panels.

    Args:
        records: those of `metrics.jsonl`; what is not of phase "train" is left out.
        path: the picture, replaced at once: whoever looks at it never sees half of it.
        title: what stands above it.
    """
    # Not pyplot: its global state and its choice of a screen are the user's.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    curves = {}
    for name in _METRICS:
        points = [
            (record["step"], record[name])
            for record in records
            if record.get("phase") == "train" and record.get(name) is not None
        ]
        points = [point for point in points if math.isfinite(point[1])]
        if points:
            curves[name] = points
    count = max(len(curves), 1)
    rows = min(count, 2)
    columns = math.ceil(count / rows)
    figure = Figure(figsize=(4 * columns, 3.2 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    # A folder's name may hold a dollar sign, which matplotlib would read as mathematics.
    figure.suptitle(title, parse_math=False)
    for place, (name, points) in enumerate(curves.items(), start=1):
        axis = figure.add_subplot(rows, columns, place)
        # Dots, where there are few: a line through one point is nothing.
        axis.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else None)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("step")
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axis.grid(alpha=0.3)
    staged = path.with_suffix(".new.png")
    figure.savefig(staged, dpi=120)
    os.replace(staged, path)

"""The curves of a run as a picture."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# A panel a line; a panel that the run has no metric for is left out.
_PANELS = (
    ("rollout/reward", "eval/accuracy", "eval/reward"),
    ("losses/policy_loss",),
    ("losses/value_loss", "losses/explained_variance"),
    ("losses/kl", "losses/kl_coef"),
    ("losses/entropy",),
    ("losses/approx_kl", "losses/clipfrac"),
)


def plot_curves(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the training steps' metrics into a PNG.

    Args:
        records: those of `metrics.jsonl`; what is not of phase "train" is left out.
        path: the picture, replaced at once: whoever looks at it never sees half of it.
    """
    # Not pyplot: its global state and its choice of a screen are the user's.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = {}
    for name in (name for panel in _PANELS for name in panel):
        points = [
            (record["step"], record[name])
            for record in records
            if record.get("phase") == "train" and record.get(name) is not None
        ]
        points = [point for point in points if math.isfinite(point[1])]
        if points:
            curves[name] = points
    panels = [[name for name in panel if name in curves] for panel in _PANELS]
    panels = [panel for panel in panels if panel] or [[]]
    figure = Figure(figsize=(4 * len(panels), 3.2), layout="tight")
    FigureCanvasAgg(figure)
    for column, panel in enumerate(panels):
        axis = figure.add_subplot(1, len(panels), column + 1)
        for name in panel:
            # Dots, where there are few: a line through one point is nothing.
            marker = "." if len(curves[name]) < 30 else None
            axis.plot(*zip(*curves[name], strict=True), label=name, marker=marker)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if panel:
            axis.legend(fontsize=8)
    staged = path.with_suffix(".new.png")
    figure.savefig(staged, dpi=120)
    os.replace(staged, path)

"""What a run leaves behind: one JSON line per record as it happens, and curves at the end."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any


class RunLog:
    """Appends records to `metrics.jsonl`, each whole or not at all.

    Args:
        folder: created if it is not there; an earlier run's metrics are replaced.
        config: the run's options, the first record.
    """

    def __init__(self, folder: str, config: Any):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "metrics.jsonl"
        self.path.write_text("")
        self.records: list[dict[str, Any]] = []
        self.write({"phase": "config", **dataclasses.asdict(config)})

    def write(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def plot_curves(records: list[dict[str, Any]], path: Path) -> None:
    """Draws reward, validation accuracy and losses of the GRPO phase into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [record for record in records if record["phase"] == "grpo"]
    panels = (
        ("rollout/reward", "eval/accuracy"),
        ("losses/policy_loss", "losses/kl"),
        ("losses/entropy",),
        ("losses/approx_kl", "losses/clipfrac"),
    )
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3.2))
    for axis, names in zip(axes, panels, strict=True):
        for name in names:
            points = [(r["step"], r[name]) for r in steps if name in r]
            if points:
                axis.plot(*zip(*points, strict=True), label=name)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    figure.tight_layout()
    # Replaced at once: whoever looks at the picture never sees half of it.
    staged = path.with_suffix(".new.png")
    figure.savefig(staged, dpi=120)
    pyplot.close(figure)
    os.replace(staged, path)

"""Plots of cases and of sweeps, as PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

from benchmarks import tables

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402

OURS, PEERS, INK, FAINT = "#2a78d6", "#9a9893", "#33322e", "#d9d7d0"
#: No date and no program in the file: the same figures give the same bytes.
METADATA = {"Software": None}


def _save(figure: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110, metadata=METADATA)
    pyplot.close(figure)


def _plain(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=INK, labelsize=8)


def _panel(axes: Any, case: dict[str, Any], task: str, title: str) -> None:
    """Times of one task's contestants with their range over processes, and the floor as a line.

    Points, not bars: the axis is logarithmic and has no zero that a length could start from.
    """
    entries = [e for e in case["entries"].values() if e["task"] == task and e["status"] == "ok"]
    entries.sort(key=lambda entry: -entry["seconds"]["median"])
    for place, entry in enumerate(entries):
        low, middle, high = (1e3 * entry["seconds"][name] for name in ("low", "median", "high"))
        color = OURS if entry["name"].startswith("rlkern") else PEERS
        axes.plot([low, high], [place, place], color=color, linewidth=2, solid_capstyle="round")
        axes.plot([middle], [place], marker="o", markersize=7, color=color)
        axes.annotate(tables.figure(middle), (high, place), xytext=(8, 0), va="center",
                      textcoords="offset points", fontsize=8, color=INK)  # fmt: skip
    axes.set_yticks(range(len(entries)), [entry["name"] for entry in entries])
    axes.set_ylim(-0.6, len(entries) - 0.4)
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    names = case["bounds"][task]
    known = case["ceilings"] | {k: e["seconds"] for k, e in case["entries"].items()
                                if e["status"] == "ok"}  # fmt: skip
    if entries and all(name in known for name in names):
        floor = 1e3 * sum(known[name]["median"] for name in names)
        axes.axvline(floor, color=INK, linewidth=1, linestyle=":")
        axes.set_xlabel(
            f"ms; dotted: {tables.bound(case, task)}, {floor:.3g} ms", fontsize=8, color=INK
        )
    axes.set_xscale("log")
    axes.set_title(title, fontsize=9, loc="left", color=INK)
    axes.margins(x=0.15)
    _plain(axes)


def contestants(cases: list[dict[str, Any]], file: Path) -> None:
    """A panel for every task of every case of an operator."""
    panels = [(case, task) for case in cases for task in case["bounds"]]
    rows = (len(panels) + 1) // 2
    figure, grid = pyplot.subplots(
        rows, 2, figsize=(13, 2.6 * rows), squeeze=False, layout="constrained"
    )
    for axes, (case, task) in zip(grid.flat, panels, strict=False):
        params = " x ".join(map(str, case["params"].values()))
        _panel(axes, case, task, f"{task}: {params}")
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    _save(figure, file)


def curve(sweep: dict[str, Any], file: Path) -> None:
    """Time per element against what was varied, with the caches' sizes where they lie."""
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    points = sweep["points"]
    names = list(points[0]["seconds"])
    for name, color in zip(names, (OURS, PEERS), strict=False):
        mine = [point for point in points if name in point["seconds"]]
        x = [point["n"] for point in mine]
        y = [1e9 * p["seconds"][name]["median"] / p["elements"] for p in mine]
        axes.plot(x, y, marker="o", markersize=4, color=color, linewidth=2, label=name)
    for cache, size in sweep["machine"]["caches"].items():
        inside = [point["n"] for point in points if point["bytes"] <= size]
        if inside and len(inside) < len(points):
            place = (inside[-1] * points[len(inside)]["n"]) ** 0.5
            axes.axvline(place, color=FAINT, linewidth=1.5, zorder=0)
            axes.text(place, 0.99, f" {cache}", transform=axes.get_xaxis_transform(), va="top",
                      fontsize=8, color=INK)  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(sweep["axis"], color=INK)
    axes.set_ylabel("ns an element", color=INK)
    axes.set_title(sweep["title"], fontsize=10, loc="left", color=INK)
    axes.legend(frameon=False, fontsize=8)
    _plain(axes)
    _save(figure, file)

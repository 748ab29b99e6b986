"""Plots of cases and of sweeps, as PNG."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
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


def rewards(curves: dict[str, list[list[float]]], file: Path) -> None:
    """Rewards by step of several trainers: the mean of the seeds, and their range shaded."""
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for (name, seeds), color in zip(curves.items(), (OURS, PEERS), strict=True):
        steps = range(1, len(seeds[0]) + 1)
        columns = list(zip(*seeds, strict=True))
        lowest, highest = (list(map(of, columns)) for of in (min, max))
        axes.fill_between(steps, lowest, highest, color=color, alpha=0.25, linewidth=0)
        axes.plot(steps, list(map(mean, columns)), color=color, linewidth=2, label=name)
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("reward, mean of a step's completions", color=INK)
    axes.set_title(f"GRPO over {len(seeds)} seeds: mean and range", fontsize=10, loc="left",
                   color=INK)  # fmt: skip
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    _plain(axes)
    _save(figure, file)


def gradient_norms(entries: list[dict[str, Any]], bound: float, file: Path) -> None:
    """Gradient norms of two trainers on the same completions, and how far they differ."""
    shown = [entry for entry in entries if entry["adam_eps"] == entries[0]["adam_eps"]]
    figure, (above, below) = pyplot.subplots(
        2, len(shown), figsize=(3.2 * len(shown), 5), squeeze=False, sharex="col", sharey="row",
        layout="constrained",
    )  # fmt: skip
    for norms, apart, entry in zip(above, below, shown, strict=True):
        ours, theirs = entry["grad_norms"]["rlkern"], entry["grad_norms"]["trl"]
        steps = range(1, len(ours) + 1)
        norms.plot(steps, theirs, "o", markersize=9, color=PEERS, label="trl")
        norms.plot(steps, ours, "o-", markersize=4, color=OURS, linewidth=1, label="rlkern")
        norms.set_title(entry["objective"], fontsize=9, loc="left", color=INK)
        # A logarithm has no place for two equal numbers: they stand at fp32's unit.
        apart.plot(steps, [max(abs(a - b) / b, 6e-8) for a, b in zip(theirs, ours, strict=True)],
                   "o", markersize=5, color=OURS)  # fmt: skip
        apart.axhline(bound, color=INK, linewidth=1, linestyle=":")
        apart.set_xlabel("optimizer step", fontsize=8, color=INK)
        for axes in (norms, apart):
            axes.set_yscale("log")
            _plain(axes)
    above[0].set_ylabel("gradient norm", fontsize=8, color=INK)
    above[0].legend(frameon=False, fontsize=8)
    below[0].set_ylabel("relative difference; dotted: the bound", fontsize=8, color=INK)
    _save(figure, file)

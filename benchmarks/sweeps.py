"""Time against size: a sweep's file, its page, and from where it is not linear."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from benchmarks import store
from benchmarks.machine import busy_share
from benchmarks.measure import BUSY_SECONDS, run_child
from benchmarks.tables import before, facts, figure, table

#: A point whose time an element is more than this many times the best is not on the line.
LINEAR = 1.25


def measure(operator: str, axis: str, quick: bool) -> dict[str, Any]:
    """Runs a sweep in a child process."""
    busy, start = busy_share(BUSY_SECONDS), time.perf_counter()
    request = {"operator": operator, "axis": axis, "quick": quick}
    reply = run_child("benchmarks.sweep_worker", request)
    title = f"{operator} over {axis}"
    took = time.perf_counter() - start
    return {"operator": operator, "axis": axis, "title": title, **reply,
            "busy_before": [busy], "took_seconds": took}  # fmt: skip


def file_name(sweep: dict[str, Any]) -> str:
    return f"{sweep['operator']}_{sweep['axis'].split()[0]}"


def keep(folder: Path, sweep: dict[str, Any], machine: dict[str, Any]) -> None:
    """Writes a sweep into `folder`/scaling."""
    content = json.dumps(sweep | {"machine": machine}, indent=1)
    store.write(folder / "scaling" / f"{file_name(sweep)}.json", content + "\n")


def gaps(sweep: dict[str, Any]) -> list[str]:
    """What is missing from a sweep with no reason given: points of a contestant, or the end."""
    points, found = sweep["points"], []
    for name in dict.fromkeys(n for p in points for n in (*p["seconds"], *p["wrong"])):
        times = [point["n"] for point in points if name in point["seconds"]]
        silent = [
            point["n"]
            for point in points
            if name not in point["seconds"] | point["wrong"] | point["skipped"]
        ]
        if not times:
            found.append(f"{name} has no time anywhere")
        if silent:
            found.append(f"{name} is missing at {silent}")
    if not any(name.startswith("rlkern") for point in points for name in point["seconds"]):
        found.append("nothing of rlkern's has a time")
    last = points[-1]["n"] if points else None
    if last != sweep["end"] and not sweep["cut"]:
        found.append(f"ends at {last}, not at {sweep['end']}")
    return found


def costs(sweep: dict[str, Any], name: str) -> list[tuple[dict[str, Any], float]]:
    """The points that a contestant has, each with seconds an element."""
    mine = [point for point in sweep["points"] if name in point["seconds"]]
    return [(p, p["seconds"][name]["median"] / p["elements"]) for p in mine]


def linear_range(sweep: dict[str, Any], name: str) -> tuple[int, int]:
    """Indices of the first and last point, around the best one, that stay within LINEAR of it."""
    values = [cost for _, cost in costs(sweep, name)]
    best = values.index(min(values))
    first = last = best
    while first > 0 and values[first - 1] <= LINEAR * values[best]:
        first -= 1
    while last + 1 < len(values) and values[last + 1] <= LINEAR * values[best]:
        last += 1
    return first, last


def _below(sweep: dict[str, Any], name: str, first: int, best: float) -> str:
    """What small points cost beyond their elements; over threads there is no such cost."""
    found = costs(sweep, name)
    (smallest, cost), start = found[0], found[first][0]["n"]
    text = f"Below {start} an element costs more, {cost / best:.3g} times at {smallest['n']}"
    if sweep["axis"] == "threads":
        return f"{text}; the reason is not known."
    fixed = smallest["seconds"][name]["median"] - best * smallest["elements"]
    return f"{text}: that call takes {figure(1e3 * fixed)} ms besides what its elements would."


def _reason(
    sweep: dict[str, Any], name: str, inside: dict[str, Any], beyond: dict[str, Any]
) -> str:
    """Why the line ends between two points: a cache, the memory's rate, or unknown."""
    if sweep["axis"] == "threads":
        rate = beyond["bytes"] / beyond["seconds"][name]["median"]
        most = sweep["read_bytes_per_second"]
        if rate > most / 2:
            return f"memory binds, {rate / 1e9:.3g} of the {most / 1e9:.3g} GB/s that reading gets"
    else:
        for cache, size in sweep["machine"]["caches"].items():
            if inside["bytes"] <= size < beyond["bytes"]:
                return f"between them the bytes of a call pass {cache}'s {size / 2**20:.3g} MiB"
    return "the reason is not known"


def sentences(sweep: dict[str, Any], name: str) -> list[str]:
    """From where a contestant's time is not linear, and why where that is known."""
    found = costs(sweep, name)
    first, last = linear_range(sweep, name)
    axis, best = sweep["axis"], min(cost for _, cost in found)
    low, high = found[first][0], found[last][0]
    text = [
        f"{name}: linear within {LINEAR - 1:.0%} for {axis} from {low['n']} to {high['n']}, at "
        f"best {figure(best * 1e9)} ns an element."
    ]
    if first > 0:
        text.append(_below(sweep, name, first, best))
    if last + 1 < len(found):
        (beyond, cost), (end, end_cost) = found[last + 1], found[-1]
        text.append(
            f"From {beyond['n']} on it is not: {cost / best:.3g} times the best there, "
            f"{end_cost / best:.3g} at {end['n']}; {_reason(sweep, name, high, beyond)}."
        )
    return text


def _cells(sweep: dict[str, Any], point: dict[str, Any], name: str) -> list[str]:
    error = f"{point['errors'][name]:.1e}" if name in point["errors"] else "-"
    if name not in point["seconds"]:
        why = point["wrong"] | point.get("skipped", {})
        return [why.get(name, "not run"), "-", "-", error]
    seconds = point["seconds"][name]["median"]
    share = point["bytes"] / seconds / sweep["read_bytes_per_second"]
    return [
        figure(1e3 * seconds), figure(1e9 * seconds / point["elements"]), f"{share:.2f}", error
    ]  # fmt: skip


def _page(sweep: dict[str, Any]) -> str:
    lines = [f"## {sweep['title']}", "", f"![{sweep['title']}]({file_name(sweep)}.png)", ""]
    said = before(sweep)
    lines += [f"{said[0].upper()}{said[1:]}.", *filter(None, [sweep.get("cut")])]
    names = list(dict.fromkeys(n for point in sweep["points"] for n in point["seconds"]))
    for name in (n for n in names if n.startswith("rlkern")):
        lines += sentences(sweep, name)
    header = [sweep["axis"], "MB moved"]
    for name in names:
        header += [f"{name}, ms", "ns an element", "of reading", "error"]
    rows = []
    for point in sweep["points"]:
        row = [str(point["n"]), f"{point['bytes'] / 1e6:.3g}"]
        for name in names:
            row += _cells(sweep, point, name)
        rows.append(row)
    return "\n".join([*lines, *table(header, rows), ""])


def write_pages(folder: Path) -> None:
    """The plots and the page of a folder of sweeps; nothing where there is none."""
    from benchmarks import plots

    sweeps = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    if not sweeps:
        return
    for sweep in sweeps:
        plots.curve(sweep, folder / f"{file_name(sweep)}.png")
    newest = max((sweep["machine"] for sweep in sweeps), key=lambda machine: machine["date"])
    head = ["# Scaling", "", *facts(newest), ""]
    head += [
        "Medians of repeated calls in one process, nothing pushed out of the caches. Over threads,",
        'an element\'s time is multiplied by their number. "Of reading": the bytes that a call of',
        "ours cannot do without, each once, over its time, as a share of what reading 256 MB of",
        "memory gets; caches give more than 1. Eager stops where it would need several times the",
        "memory.",
        "",
    ]
    store.write(folder / "index.md", "\n".join([*head, *map(_page, sweeps)]))

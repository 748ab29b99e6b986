"""Turns summaries into the table that people read and the files that people keep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOOTNOTE = """\
Times are medians per process, then over processes, with the lowest and the highest process in
brackets; ratios are taken inside each process. "of read": the time of the ceilings named over the
contestant's. "x peer": how many times as fast as that peer. Cycles: time x threads x nominal clock
/ elements. Extra memory: the peak above the inputs, results included, as a share of the logits (the
bulk tensor). Page faults: of one call; results and temporaries come from fresh pages, and that is
part of the time of whoever allocates them. Error: the worst one against float64; what is wrong gets
no speed. Before each call everything is pushed out of the caches, code included; in cases that say
"warm", two calls go before it instead, and the ceilings are those of the cache.
"""


def _range(value: dict[str, float] | None, digits: int = 2) -> str:
    if value is None:
        return "-"
    return "{median:.{d}f} [{low:.{d}f}, {high:.{d}f}]".format(d=digits, **value)


def _milliseconds(value: dict[str, float]) -> str:
    return _range({name: seconds * 1e3 for name, seconds in value.items()})


def _row(entry: dict[str, Any], peers: list[str], cycles_per_ns: float) -> list[str]:
    if entry["status"] != "ok":
        return [entry["name"], f"{entry['status']}: {entry['reason']}"]
    ratios = [entry["peers"][peer] for peer in peers]
    ns, share = entry["ns_per_element"], entry.get("extra_share")
    error, name = max((value, name) for name, value in entry["errors"].items())
    return [
        entry["name"],
        _milliseconds(entry["seconds"]),
        _range(entry["of_ceiling"]),
        *(f"{ratio['median']:.2f}" if ratio else "-" for ratio in ratios),
        f"{ns:.3f} ns, {ns * cycles_per_ns:.2f} cycles",
        "not measured" if share is None else f"{share:.2%}",
        f"{entry['page_faults']:.0f}",
        f"{error:.1e} ({name})",
    ]


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table, aligned for terminals too; a short row's last cell overhangs."""
    whole = [row for row in [header, *rows] if len(row) == len(header)]
    width = [max(map(len, column)) for column in zip(*whole, strict=True)]
    width[0] = max(len(row[0]) for row in [header, *rows])

    def line(row: list[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(row, width, strict=False)) + " |"

    return ["", line(header), "|" + "|".join("-" * (w + 2) for w in width) + "|", *map(line, rows)]


def render(summary: dict[str, Any], machine: dict[str, Any]) -> str:
    """One case as Markdown: ceilings, a table per task, floors."""
    params, size = summary["params"], summary["bytes"]
    shape = " x ".join(str(value) for value in params.values() if isinstance(value, int))
    words = [str(value) for value in params.values() if not isinstance(value, int)]
    lines = [
        f"## {', '.join([summary['operator'], shape, *words])} ({size / 1e6:.1f} MB)",
        "",
        f"{summary['processes']} processes x {summary['rounds']} rounds, {summary['threads']} "
        f"threads, machine's load before {summary['load_before']:.1f}. Ceilings for these bytes:",
        "",
    ]
    for name, seconds in summary["ceilings"].items():
        rate = size / seconds["median"] / 1e9
        lines.append(f"- {name}: {_milliseconds(seconds)} ms, {rate:.1f} GB/s of the tensor")
    for task, bound in summary["bounds"].items():
        entries = [entry for entry in summary["entries"].values() if entry["task"] == task]
        peers = list(entries[0]["peers"])
        header = [task, "ms", f"of {' + '.join(bound)}", *(f"x {peer}" for peer in peers)]
        header += ["an element", "extra memory", "page faults", "error"]
        cycles_per_ns = machine["megahertz"] * summary["threads"] / 1e3
        lines += _table(header, [_row(entry, peers, cycles_per_ns) for entry in entries])
    met = {True: "yes", False: "NO", None: "not measured"}
    floors = [[f["contestant"], f["text"], f["value"], met[f["met"]]] for f in summary["floors"]]
    if floors:
        lines += _table(["floor", "promised", "measured", "met"], floors)
    else:
        lines += ["", "No floor is promised for this shape."]
    return "\n".join(lines) + "\n"


def render_all(summaries: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    """The machine, every case, and how to read them."""
    versions = ", ".join(f"{name} {value}" for name, value in machine["versions"].items())
    facts = [
        f"- machine: {machine['cpu']}, {machine['cores']} cores, {machine['system']}; instruction "
        f"set {machine['instruction_set']} (torch: {machine['torch_instruction_set']})",
        f"- versions: {versions}; compiler {machine['compiler']}",
        f"- measured: {machine['date']} at commit {machine['commit']}",
    ]
    return "\n".join([*facts, "", *(render(s, machine) for s in summaries), FOOTNOTE])


def write(folder: Path, summaries: list[dict[str, Any]], machine: dict[str, Any]) -> None:
    """Writes one JSON and one Markdown file per operator."""
    folder.mkdir(parents=True, exist_ok=True)
    for operator in {summary["operator"] for summary in summaries}:
        mine = [summary for summary in summaries if summary["operator"] == operator]
        content = json.dumps({"machine": machine, "cases": mine}, indent=1)
        (folder / f"{operator}.json").write_text(content + "\n")
        (folder / f"{operator}.md").write_text(f"# {operator}\n\n{render_all(mine, machine)}")

"""Cases as the Markdown tables that people read."""

from __future__ import annotations

from itertools import groupby
from typing import Any

FOOTNOTE = """\
Times are medians per process, then over processes, with the lowest and the highest process in
brackets; ratios are taken inside each process. "of read": the time of the ceilings named over the
contestant's; "read then copy" is both in one call, the second finding in the caches what the first
left there. No share of ceilings is given for less than a megabyte, where much of their time is the
price of a call. "x peer": how many times as fast as that peer. Cycles: time x threads x
nominal clock / elements, where the system says that clock. Extra memory: the peak above the inputs,
results included, and as a share of the case's bytes. Rounds: timed calls in a process; slow
contestants get fewer. Page faults: of one call; results and temporaries come from fresh pages, and
that is part of the time of whoever allocates them. Error: the worst one against float64; what is
wrong gets no speed. Before each call everything is pushed out of the caches, code included; in
cases that say "warm", two calls go before it instead, and the ceilings are those of the cache. More
in docs/benchmarks.md.
"""

#: Of a case's bytes: of the few microseconds that a ceiling of fewer takes, one or two are torch's
#: dispatch, as a ceiling of 4 KB shows.
LEAST_BYTES = 1_000_000


def figure(value: float) -> str:
    """Three significant digits, and no exponent where people would not write one."""
    return f"{value:.0f}" if 1000 <= value < 1e6 else f"{value:#.3g}".rstrip(".")


def _range(value: dict[str, float] | None) -> str:
    if value is None:
        return "-"
    return "{median:.2f} [{low:.2f}, {high:.2f}]".format(**value)


def milliseconds(value: dict[str, float]) -> str:
    median, low, high = (figure(1e3 * value[name]) for name in ("median", "low", "high"))
    return f"{median} [{low}, {high}]"


def bound(case: dict[str, Any], task: str) -> str:
    """The floor of a task in words, "2 read + copy" for example."""
    names = [name.split("/")[-1] for name in case["bounds"][task]]
    counts = {name: names.count(name) for name in names}
    return " + ".join(f"{n} {name}" if n > 1 else name for name, n in counts.items())


def share_of_floor(case: dict[str, Any], entry: dict[str, Any]) -> dict[str, float] | None:
    """The floor's time over a contestant's, or None where that would say nothing."""
    of_ceilings = not any("/" in name for name in case["bounds"][entry["task"]])
    if of_ceilings and case["bytes"] < LEAST_BYTES:
        return None
    return entry["of_ceiling"]


def peers(case: dict[str, Any], task: str) -> list[str]:
    """Those who compute all of a task: not ours, and not what stands for its floor."""
    entries = [entry for entry in case["entries"].values() if entry["task"] == task]
    return [peer for peer in entries[0]["peers"] if f"{task}/{peer}" not in case["bounds"][task]]


def mebibytes(size: float) -> str:
    """Memory is counted in pages of 4 KiB and moves by some: a tenth of a MiB says enough."""
    value = size / 2**20
    return "< 0.1" if value < 0.1 else f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _memory(entry: dict[str, Any]) -> str:
    if "extra_bytes" not in entry:
        return "not measured"
    share = entry["extra_share"]
    return f"{mebibytes(entry['extra_bytes'])} MiB, {share:.{0 if share >= 0.1 else 1}%}"


def _row(entry: dict[str, Any], shown: list[str], case: dict[str, Any]) -> list[str]:
    if entry["status"] != "ok":
        return [entry["name"], f"{entry['status']}: {entry['reason']}"]
    ratios = [entry["peers"][peer] for peer in shown]
    ns = entry["ns_per_element"]
    element = f"{figure(ns)} ns"
    if clock := case["machine"]["megahertz"]:
        element += f", {figure(ns * clock * case['threads'] / 1e3)} cycles"
    error, name = max((value, name) for name, value in entry["errors"].items())
    return [
        entry["name"],
        milliseconds(entry["seconds"]),
        _range(share_of_floor(case, entry)),
        *(figure(ratio["median"]) if ratio else "-" for ratio in ratios),
        element,
        _memory(entry),
        str(entry.get("rounds", case["rounds"])),
        f"{entry['page_faults']:.0f}",
        f"{error:.1e} ({name})",
    ]


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table, aligned for terminals too; a short row's last cell overhangs."""
    whole = [row for row in [header, *rows] if len(row) == len(header)]
    width = [max(map(len, column)) for column in zip(*whole, strict=True)]
    width[0] = max(len(row[0]) for row in [header, *rows])

    def line(row: list[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(row, width, strict=False)) + " |"

    return ["", line(header), "|" + "|".join("-" * (w + 2) for w in width) + "|", *map(line, rows)]


def title(case: dict[str, Any]) -> str:
    """Operator and parameters, "whiten, 512 x 4096" for example."""
    params = case["params"]
    shape = " x ".join(str(value) for value in params.values() if isinstance(value, int))
    words = [str(value) for value in params.values() if not isinstance(value, int)]
    return ", ".join(filter(None, [case["operator"], shape, *words]))


def before(measured: dict[str, Any]) -> str:
    """How busy the machine was before a case or a sweep; older results have the load average."""
    if "load_before" in measured:
        return f"machine's load before {measured['load_before']:.1f}"
    shares = [share for share in measured["busy_before"] if share is not None]
    return f"processors busy before {max(shares):.0%}" if shares else "not known how busy before"


def _case(case: dict[str, Any]) -> str:
    """One case: ceilings, a table per task, floors."""
    size = case["bytes"]
    lines = [
        f"## {title(case)} ({size / 1e6:.1f} MB)",
        "",
        f"{case['processes']} processes, up to {case['rounds']} rounds in each, {case['threads']} "
        f"threads, {before(case)}. Ceilings for these bytes:",
        "",
    ]
    for name, seconds in case["ceilings"].items():
        rate = size / seconds["median"] / 1e9
        lines.append(f"- {name}: {milliseconds(seconds)} ms, {rate:.1f} GB/s of the tensor")
    for task in case["bounds"]:
        entries = [entry for entry in case["entries"].values() if entry["task"] == task]
        # A peer that is skipped says so in its own row; its column would hold nothing.
        shown = [peer for peer in peers(case, task) if any(e["peers"][peer] for e in entries)]
        header = [task, "ms", f"of {bound(case, task)}", *(f"x {peer}" for peer in shown)]
        header += ["an element", "extra memory", "rounds", "page faults", "error"]
        lines += table(header, [_row(entry, shown, case) for entry in entries])
    met = {True: "yes", False: "NO", None: "not measured"}
    floors = [[f["contestant"], f["text"], f["value"], met[f["met"]]] for f in case["floors"]]
    if floors:
        lines += table(["floor", "promised", "measured", "met"], floors)
    else:
        lines += ["", "No floor is promised for this shape."]
    return "\n".join(lines) + "\n"


def facts(machine: dict[str, Any]) -> list[str]:
    """The machine as a list in Markdown."""
    versions = ", ".join(f"{name} {value}" for name, value in machine["versions"].items())
    memory = ""
    if "allocator" in machine:
        memory = f"; transparent huge pages {machine['huge_pages']}, malloc {machine['allocator']}"
    return [
        f"- machine: {machine['cpu']}, {machine['cores']} cores, {machine['system']}; instruction "
        f"set {machine['instruction_set']} (torch: {machine['torch_instruction_set']})"
        f"{memory}",
        f"- versions: {versions}; compiler {machine['compiler']}",
        f"- measured: {machine['date']} at commit {machine['commit']}",
    ]


def heads(cases: list[dict[str, Any]], *facts: str) -> str:
    """When cases were measured, at which commits and with which torch: "old" to "new" if several.

    Args:
        facts: Which of "date", "commit" and "torch", in this order; all by default.
    """
    found = sorted((case["machine"] or {} for case in cases), key=lambda m: m.get("date", ""))
    parts = []
    for fact in facts or ("date", "commit", "torch"):
        of = [m.get("versions", {}) if fact == "torch" else m for m in found]
        values = list(dict.fromkeys(str(one.get(fact, "unknown")) for one in of))
        name = {"date": "", "commit": f"commit{'s' * (len(values) > 1)} ", "torch": "torch "}[fact]
        parts.append(name + " to ".join(dict.fromkeys((values[0], values[-1]))))
    return ", ".join(parts)


def render(cases: list[dict[str, Any]]) -> str:
    """The machine, every case measured at once on it, and how to read them."""
    parts = []
    for _, group in groupby(cases, key=lambda case: case["machine"]):
        same = list(group)
        parts += ["\n".join(facts(same[0]["machine"])), *map(_case, same)]
    return "\n\n".join(part.rstrip("\n") for part in [*parts, FOOTNOTE]) + "\n"

"""Two sets of results, case by case: what got slower, faster, larger, wrong, or is no longer there.

A contestant is slower beyond noise when its time says so and its share of the machine's ceilings,
measured in the same turns, says so too: a slower machine moves only the first. Each says so when
the medians differ by more than LEAST and the ranges over processes do not overlap, so that the
slowest old process is faster than the fastest new one. With one process in a set, the range of the
time is that of its samples. Only what is rlkern's own can be a regression.
"""

from __future__ import annotations

from typing import Any

from benchmarks.linear_memory import OURS
from benchmarks.store import identity
from benchmarks.tables import heads, mebibytes, table, title

#: What moves between two runs of the same code on a machine that is left alone.
LEAST = 0.05
#: Memory is counted in pages, so it hardly moves; a small call's few pages may.
MEMORY_LEAST, MEMORY_SLACK = 0.1, 1 << 20
AGAIN = "not measured again"


def spread(entry: dict[str, Any]) -> dict[str, float]:
    """A contestant's time with its range, in seconds."""
    samples = entry["samples"]
    if len(samples) == 1:
        return entry["seconds"] | {"low": min(samples[0]), "high": max(samples[0])}
    return entry["seconds"]


def rises(old: dict[str, float], new: dict[str, float]) -> bool:
    """Whether a figure is higher beyond noise."""
    return new["median"] > (1 + LEAST) * old["median"] and new["low"] > old["high"]


def normalised(
    entry: dict[str, Any], case: dict[str, Any], other: dict[str, Any]
) -> dict[str, float] | None:
    """A contestant's time in units of its floor's, or of the ceilings that both cases have."""
    task = entry["task"]
    if case["bounds"].get(task) == other["bounds"].get(task) and entry.get("of_ceiling"):
        share = entry["of_ceiling"]
        inverse = {"median": share["median"], "low": share["high"], "high": share["low"]}
        return {name: 1 / value for name, value in inverse.items()}
    common = case["ceilings"].keys() & other["ceilings"].keys()
    unit = sum(case["ceilings"][name]["median"] for name in common)
    return {n: value / unit for n, value in entry["seconds"].items()} if common else None


def verdict(
    old: dict[str, Any], new: dict[str, Any], before: dict[str, Any], after: dict[str, Any]
) -> str:
    """ "slower", "faster", "within noise", "larger", or what became of its status.

    Args:
        old, new: A contestant's entry in both sets.
        before, after: The cases that these are of.
    """
    if before == after:
        return AGAIN
    if old["status"] != "ok" or new["status"] != "ok":
        if old["status"] == new["status"]:
            return new["status"]
        return f"was {old['status']}, now {new['status']}"
    pairs = [(spread(old), spread(new))]
    in_units = normalised(old, before, after), normalised(new, after, before)
    if in_units[0] and in_units[1]:
        pairs.append(in_units)
    words = []
    if all(rises(was, now) for was, now in pairs):
        words.append("slower")
    if all(rises(now, was) for was, now in pairs):
        words.append("faster")
    if "extra_bytes" in old and "extra_bytes" in new:
        if _larger(old["extra_bytes"], new["extra_bytes"]):
            words.append("larger")
    return " and ".join(words) or "within noise"


def _larger(old: float, new: float) -> bool:
    return new - old > max(MEMORY_SLACK, MEMORY_LEAST * old)


def regressed(name: str, word: str) -> bool:
    bad = "slower" in word or "larger" in word or word.startswith("was ok") or word == "gone"
    return name.startswith("rlkern") and bad


def _machine(case: dict[str, Any]) -> str:
    machine = case["machine"] or {}
    cpu, cores, kind = (
        machine.get(name, "unknown") for name in ("cpu", "cores", "instruction_set")
    )
    return f"{cpu}, {cores} cores, {kind}"


def _times(old: dict[str, float] | None, new: dict[str, float] | None) -> list[str]:
    """Both medians in ms and their ratio, where there are both."""
    if not old or not new:
        return ["-", "-", "-"]
    return [
        f"{1e3 * old['median']:.3g}",
        f"{1e3 * new['median']:.3g}",
        f"{new['median'] / old['median']:.2f}",
    ]


def _case(before: dict[str, Any], after: dict[str, Any]) -> list[list[str]]:
    """The rows of a case that is in both sets: its ceilings, then everyone in either."""
    name, rows = title(after), []
    for ceiling in before["ceilings"] | after["ceilings"]:
        both = before["ceilings"].get(ceiling), after["ceilings"].get(ceiling)
        rows.append([name, "", ceiling, *_times(*both), "ceiling"])
    for key in before["entries"] | after["entries"]:
        old, new = before["entries"].get(key), after["entries"].get(key)
        if old and new:
            times = _times(old.get("seconds"), new.get("seconds"))
            word = verdict(old, new, before, after)
        else:
            times, word = _times(None, None), "new" if new else "gone"
        one = new or old
        rows.append([name, one["task"], one["name"], *times, word])
    return rows


def report(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> tuple[str, bool]:
    """A table of everything in both, and whether something of ours got worse."""
    before = {identity(case): case for case in old}
    after = {identity(case): case for case in new}
    lines = [f"Old: {heads(old)}.", f"New: {heads(new)}."]
    machines = [sorted({_machine(case) for case in cases}) for cases in (old, new)]
    if machines[0] != machines[1]:
        lines.append(f"Not the same machine: {' / '.join(machines[0])}; {' / '.join(machines[1])}.")
    lines.append("")
    rows = [row for key in after if key in before for row in _case(before[key], after[key])]
    worse = [
        f"{case}, {task}/{name}: {word}" + (f", {ratio} times the old time" if ratio != "-" else "")
        for case, task, name, _, _, ratio, word in rows
        if regressed(name, word)
    ]
    header = ["case", "task", "contestant", "old ms", "new ms", "new / old", ""]
    lines += table(header, rows)[1:] if rows else ["No case is in both."]
    gone = [case for key, case in before.items() if key not in after]
    for text, cases in (
        ("old", gone),
        ("new", [case for key, case in after.items() if key not in before]),
    ):
        if cases:
            lines += ["", f"Only in the {text} results: {'; '.join(sorted(map(title, cases)))}."]
    for case in gone:
        if any(_ours(entry) for entry in case["entries"].values()):
            worse.append(f"{title(case)}: gone")
    lines += ["", "Worse beyond noise:" if worse else "Nothing of rlkern's is worse beyond noise."]
    lines += [f"- {line}" for line in worse]
    return "\n".join(lines), bool(worse)


def _ours(entry: dict[str, Any]) -> bool:
    return entry["name"].startswith("rlkern") and entry["status"] == "ok"


def memory(
    old: dict[str, dict[str, Any]], new: dict[str, dict[str, Any]]
) -> tuple[list[str], bool]:
    """The same of memory by number of tokens: lines, empty where the old set has none of it."""
    figures: list[dict[tuple[str, ...], float]] = []
    for files in (old, new):
        figures.append({})
        for file, content in files.items():
            for point in content["points"]:
                shape = " x ".join(str(point[size]) for size in ("tokens", "width", "vocab"))
                for name, size in point["extra"].items():
                    figures[-1][file, shape, name] = size
    before, after = figures
    rows, worse = [], []
    for key, was in before.items():
        now = after.get(key)
        word = "gone" if now is None else "larger" if _larger(was, now) else "within noise"
        if old[key[0]] == new.get(key[0]):
            word = AGAIN
        rows.append([*key, mebibytes(was), "-" if now is None else mebibytes(now), word])
        if word in ("larger", "gone") and key[-1] in OURS:
            worse.append(f"- memory, {', '.join(key)}: {word}")
    if not rows:
        return [], False
    header = ["memory", "shape", "contestant", "old MiB", "new MiB", ""]
    return [*table(header, rows), *([""] if worse else []), *worse], bool(worse)

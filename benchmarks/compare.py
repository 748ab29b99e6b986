"""Two sets of results, case by case: what got slower, faster, larger or wrong.

A contestant is slower beyond noise when both hold: the medians differ by more than LEAST, and the
ranges over processes do not overlap, so that the slowest old process is faster than the fastest
new one. With one process in a set, the range is that of its samples. Only what is rlkern's own can
be a regression: a peer that got slower says that the machine did.
"""

from __future__ import annotations

from typing import Any

from benchmarks.store import identity
from benchmarks.tables import table, title

#: What moves between two runs of the same code on a machine that is left alone.
LEAST = 0.05
#: Memory is counted in pages, so it hardly moves; a small call's few pages may.
MEMORY_LEAST, MEMORY_SLACK = 0.1, 1 << 20


def spread(entry: dict[str, Any]) -> tuple[float, float]:
    """The range of a contestant's time, in seconds."""
    samples = entry["samples"]
    if len(samples) == 1:
        return min(samples[0]), max(samples[0])
    return entry["seconds"]["low"], entry["seconds"]["high"]


def verdict(old: dict[str, Any], new: dict[str, Any]) -> str:
    """ "slower", "faster", "within noise", "larger", or what became of its status."""
    if old["status"] != "ok" or new["status"] != "ok":
        if old["status"] == new["status"]:
            return new["status"]
        return f"was {old['status']}, now {new['status']}"
    ratio = new["seconds"]["median"] / old["seconds"]["median"]
    (old_low, old_high), (new_low, new_high) = spread(old), spread(new)
    words = []
    if ratio > 1 + LEAST and new_low > old_high:
        words.append("slower")
    if ratio < 1 / (1 + LEAST) and new_high < old_low:
        words.append("faster")
    if "extra_bytes" in old and "extra_bytes" in new:
        grown = new["extra_bytes"] - old["extra_bytes"]
        if grown > MEMORY_SLACK and grown > MEMORY_LEAST * old["extra_bytes"]:
            words.append("larger")
    return " and ".join(words) or "within noise"


def regressed(name: str, word: str) -> bool:
    bad = "slower" in word or "larger" in word or word.startswith("was ok")
    return name.startswith("rlkern") and bad


def _machine(case: dict[str, Any]) -> str:
    return "{cpu}, {cores} cores, {instruction_set}".format(**case["machine"])


def _row(case: str, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    word = verdict(old, new)
    cells = [case, new["task"], new["name"]]
    if "seconds" in old and "seconds" in new:
        before, after = (1e3 * entry["seconds"]["median"] for entry in (old, new))
        cells += [f"{before:.3g}", f"{after:.3g}", f"{after / before:.2f}"]
    else:
        cells += ["-", "-", "-"]
    return [*cells, word]


def report(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> tuple[str, bool]:
    """A table of everything in both, and whether something of ours got worse."""
    before = {identity(case): case for case in old}
    after = {identity(case): case for case in new}
    both = [key for key in after if key in before]
    lines = []
    machines = [sorted({_machine(case) for case in cases}) for cases in (old, new)]
    if machines[0] != machines[1]:
        lines += [
            f"Not the same machine: {' / '.join(machines[0])}; {' / '.join(machines[1])}.",
            "",
        ]
    rows, worse = [], []
    for key in both:
        name = title(after[key])
        for ceiling, value in after[key]["ceilings"].items():
            was = before[key]["ceilings"][ceiling]["median"]
            figures = [f"{1e3 * was:.3g}", f"{1e3 * value['median']:.3g}"]
            rows.append([name, "", ceiling, *figures, f"{value['median'] / was:.2f}", "ceiling"])
        for contestant, entry in before[key]["entries"].items():
            if contestant not in after[key]["entries"]:
                rows.append([name, entry["task"], entry["name"], "-", "-", "-", "gone"])
        for contestant, entry in after[key]["entries"].items():
            if contestant not in before[key]["entries"]:
                rows.append([name, entry["task"], entry["name"], "-", "-", "-", "new"])
                continue
            row = _row(name, before[key]["entries"][contestant], entry)
            rows.append(row)
            if regressed(entry["name"], row[-1]):
                worse.append(f"{name}, {contestant}: {row[-1]}, {row[-2]} times the old time")
    header = ["case", "task", "contestant", "old ms", "new ms", "new / old", ""]
    lines += table(header, rows)[1:] if rows else ["No case is in both."]
    for text, found in (("old", before.keys() - after), ("new", after.keys() - before)):
        if found:
            cases = before if text == "old" else after
            names = ", ".join(sorted(title(cases[key]) for key in found))
            lines += ["", f"Only in the {text} results: {names}."]
    lines += ["", "Worse beyond noise:" if worse else "Nothing of rlkern's is worse beyond noise."]
    lines += [f"- {line}" for line in worse]
    return "\n".join(lines), bool(worse)

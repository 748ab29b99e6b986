"""Results as people read them: Markdown, plots, an index per machine, the README's table.

python -m benchmarks.report                     from the JSON under benchmarks/results/
python -m benchmarks.report --compare OLD NEW   two files, or two folders; exit code 1 where
                                                something of rlkern's got worse beyond noise
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks import compare, linear_memory, parity_page, readme, store, sweeps, tables


def write_tables(folder: Path, operator: str) -> None:
    """The Markdown of one operator, beside its JSON."""
    cases = store.read(folder / f"{operator}.json")
    head = f"# {operator}\n\n"
    if (folder / f"{operator}.png").exists():
        head += f"![Times of {operator}]({operator}.png)\n\n"
    store.write(folder / f"{operator}.md", head + tables.render(cases))


def _best_of_ours(entries: list[dict[str, Any]]) -> dict[str, Any] | None:
    ours = [e for e in entries if e["name"].startswith("rlkern") and e["status"] == "ok"]
    return min(ours, key=lambda entry: entry["seconds"]["median"]) if ours else None


def _index_rows(case: dict[str, Any]) -> list[list[str]]:
    rows = []
    for task in case["bounds"]:
        entries = [entry for entry in case["entries"].values() if entry["task"] == task]
        best = _best_of_ours(entries)
        if best is None:
            rows.append([tables.title(case), task, "not measured", "", "", ""])
            continue
        peers = {name: best["peers"][name] for name in tables.peers(case, task)}
        ratios = {name: ratio["median"] for name, ratio in peers.items() if ratio}
        peer = min(ratios, key=ratios.__getitem__, default=None)
        share = tables.share_of_floor(case, best)
        rows.append([
            tables.title(case), task, best["name"],
            tables.figure(1e3 * best["seconds"]["median"]),
            f"{share['median']:.2f} of {tables.bound(case, task)}" if share else "-",
            f"{tables.figure(ratios[peer])} ({peer})" if peer else "-",
        ])  # fmt: skip
    return rows


def _index(folder: Path, cases: list[dict[str, Any]]) -> str:
    """What was measured on this machine, a line per task."""
    newest = max(cases, key=lambda case: case["machine"]["date"])["machine"]
    lines = [f"# {folder.name}", "", *tables.facts(newest)]
    dates = sorted({case["machine"]["date"] for case in cases})
    if len(dates) > 1:
        lines += [f"- the newest of {len(dates)} runs from {dates[0]} on: each page says its own"]
    operators = sorted({case["operator"] for case in cases})
    same_commit = len({case["machine"]["commit"] for case in cases}) == 1
    links = []
    for operator in operators:
        mine = [case for case in cases if case["operator"] == operator]
        head = "" if same_commit else f" ({tables.heads(mine, 'commit')})"
        links.append(f"[{operator}]({operator}.md){head}")
    if (folder / "memory" / "linear.md").exists():
        links.append("[memory](memory/linear.md)")
    for page in ("scaling", "parity"):
        if (folder / page / "index.md").exists():
            links.append(f"[{page}]({page}/index.md)")
    promises = [floor["met"] for case in cases for floor in case["floors"]]
    lines += ["", f"Pages: {', '.join(links)}.", ""]
    lines += [f"Promises: {promises.count(True)} kept, {promises.count(False)} not, "
              f"{promises.count(None)} not measured; the pages say which."]  # fmt: skip
    header = ["case", "task", "fastest of ours", "ms", "of its floor", "x the fastest peer"]
    rows = [row for case in cases for row in _index_rows(case)]
    return "\n".join([*lines, *tables.table(header, rows)]) + "\n"


def write_folder(folder: Path) -> None:
    """Everything that follows from a folder's JSON: plots, pages, the index."""
    # Here, not above: comparing and the tests of it need no matplotlib.
    from benchmarks import plots

    sweeps.write_pages(folder / "scaling")
    linear_memory.write_page(folder / "memory")
    parity_page.write_pages(folder / "parity")
    files = sorted(folder.glob("*.json"))
    for file in files:
        plots.contestants(store.read(file), folder / f"{file.stem}.png")
        write_tables(folder, file.stem)
    if files:
        store.write(folder / "index.md", _index(folder, store.read_all(folder)))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path, help="default: of every machine")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"))
    options = parser.parse_args(arguments)
    if options.compare:
        try:
            old, new = map(store.read_all, options.compare)
        except ValueError as error:
            parser.error(str(error))
        text, worse = compare.report(old, new)
        memory, larger = compare.memory(*map(store.read_memory, options.compare))
        print("\n".join([text, *memory]))
        return int(worse or larger)
    machines = sorted(path for path in store.RESULTS.iterdir() if path.is_dir())
    for folder in options.folders or machines:
        write_folder(folder)
    readme.update()
    return 0


if __name__ == "__main__":
    sys.exit(main())

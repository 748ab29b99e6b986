"""The table at the end of gpu.sh: per operator and task whether it is correct, fast, or neither."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def floor(entry: dict[str, Any]) -> tuple[str, float, str]:
    """What binds an entry's task: its name, how much of it there is, the ceiling for it."""
    # Results from before there were tasks of products have bytes alone.
    if entry.get("flop"):
        return "product", entry["flop"], "bf16_flop_per_second"
    return "copy", entry["bytes_moved"], "copy_bytes_per_second"


def share(entry: dict[str, Any], ceilings: dict[str, float]) -> float:
    _, amount, ceiling = floor(entry)
    return amount / entry["seconds"] / ceilings[ceiling]


def verdict(entry: dict[str, Any], ceilings: dict[str, float], gpu: bool) -> str:
    if entry["status"] != "ok":
        ours = entry["name"].startswith("rlkern")
        what = "neither" if ours else "wrong" if entry["status"] == "wrong" else "left out"
        return f"{what}: {entry['reason'][:90]}"
    if not gpu or entry["target"] is None:
        return "correct"
    promise = f"{entry['target']:.0%} of {floor(entry)[0]}"
    if share(entry, ceilings) >= entry["target"]:
        return f"correct, fast (at least {promise})"
    return f"correct (not fast: {promise} was promised)"


def stages(path: Path) -> list[str]:
    lines = ["stage       result                     seconds"]
    for line in path.read_text().splitlines():
        name, result, seconds = line.split("\t")
        lines.append(f"{name:<11} {result:<26} {seconds:>7}")
    return lines


def table(results: dict[str, Any]) -> list[str]:
    # A run that was stopped early, or a file of another kind.
    lacking = [part for part in ("about", "ceilings", "entries") if part not in results]
    if lacking:
        raise ValueError(f"results.json lacks {', '.join(lacking)}")
    about, ceilings = results["about"], results["ceilings"]
    gpu = about["device"] == "cuda"
    copy = ceilings["copy_bytes_per_second"]
    lines = [f"{about.get('gpu', 'no GPU: a dry run, its times mean nothing')}, {about['date']}"]
    lines.append(
        f"copy {copy / 1e12:.3f} TB/s, read {ceilings['read_bytes_per_second'] / 1e12:.3f} TB/s, "
        f"in place {ceilings['in_place_bytes_per_second'] / 1e12:.3f} TB/s, "
        f"bf16 product {ceilings['bf16_flop_per_second'] / 1e12:.1f} TFLOP/s"
    )
    heading = ""
    for entry in results["entries"].values():
        title = f"{entry['operator']}, {entry['task']}: {entry['shape']}"
        if title != heading:
            of = "of product" if entry.get("flop") else "of copy"
            lines += ["", title, f"  {'':<20} {'ms':>9} {of:>10} {'launches':>8} {'MiB':>9}"]
            heading = title
        mark = verdict(entry, ceilings, gpu)
        if entry["status"] != "ok":
            lines.append(f"  {entry['name']:<20} {mark}")
            continue
        launches = "-" if entry["launches"] is None else entry["launches"]
        peak = "-" if entry["peak_bytes"] is None else f"{entry['peak_bytes'] / 2**20:.1f}"
        lines.append(
            f"  {entry['name']:<20} {entry['seconds'] * 1e3:>9.4f} {share(entry, ceilings):>10.1%} "
            f"{launches:>8} {peak:>9}  {mark}"
        )
    if "stopped" in results:
        lines += ["", results["stopped"]]
    return lines


def main() -> None:
    out = Path(sys.argv[1])
    lines = stages(out / "stages.tsv") if (out / "stages.tsv").exists() else []
    try:
        lines += ["", *table(json.loads((out / "results.json").read_text()))]
    except (OSError, ValueError) as error:
        lines += ["", f"no benchmark results: {error}"]
    text = "\n".join(lines) + "\n"
    (out / "summary.txt").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()

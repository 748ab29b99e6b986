"""The files that are kept: one JSON per operator in a folder per machine, written case by case."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT

RESULTS = ROOT / "benchmarks" / "results"


def read(file: Path) -> list[dict[str, Any]]:
    """The cases of one file, each with the machine, versions, date and commit it was measured at.

    Files that say so once for all cases are read too.
    """
    content = json.loads(file.read_text())
    return [{"machine": content.get("machine")} | case for case in content["cases"]]


def read_all(place: Path) -> list[dict[str, Any]]:
    """The cases of a file, or of all files of a folder.

    Raises:
        ValueError: there is none.
    """
    files = sorted(place.glob("*.json")) if place.is_dir() else [place]
    files = [file for file in files if file.is_file()]
    if not files:
        raise ValueError(f"expected a file of results or a folder of them, got {str(place)!r}")
    return [case for file in files for case in read(file)]


def read_memory(place: Path) -> dict[str, dict[str, Any]]:
    """What a folder keeps of memory by number of tokens, by the file's name; a file keeps none."""
    return {file.stem: json.loads(file.read_text()) for file in (place / "memory").glob("*.json")}


def identity(case: dict[str, Any]) -> str:
    """What makes two cases the same one, measured twice."""
    return json.dumps([case["operator"], case["params"]], sort_keys=True)


def write(file: Path, content: str) -> None:
    """In one step, so that an interrupted run leaves the old file or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    part.write_text(content)
    os.replace(part, file)


def keep(folder: Path, case: dict[str, Any], machine: dict[str, Any]) -> None:
    """Puts a case into its operator's file, in the place of an older measurement of it.

    Cases with other parameters than it has, not other values of these, are those of an older
    definition of the benchmark, and go.
    """
    file = folder / f"{case['operator']}.json"
    kept = read(file) if file.exists() else []
    kept = [old for old in kept if old["params"].keys() == case["params"].keys()]
    new = case | {"machine": machine}
    places = [identity(old) for old in kept]
    if identity(new) in places:
        kept[places.index(identity(new))] = new
    else:
        kept.append(new)
    write(file, json.dumps({"cases": kept}, indent=1) + "\n")


def seconds_by_module(folder: Path) -> dict[str, float]:
    """How long each benchmark file took, of those whose cases say so."""
    seconds: dict[str, float] = {}
    for case in read_all(folder) if list(folder.glob("*.json")) else []:
        if "took_seconds" in case:
            stem = case["module"].split(".")[-1]
            seconds[stem] = seconds.get(stem, 0.0) + case["took_seconds"]
    for file in (folder / "scaling").glob("*.json"):
        took = json.loads(file.read_text())["took_seconds"]
        seconds["bench_scaling"] = seconds.get("bench_scaling", 0.0) + took
    for name, memory in read_memory(folder).items():
        stem = f"bench_{name}"
        seconds[stem] = seconds.get(stem, 0.0) + memory["took_seconds"]
    return seconds

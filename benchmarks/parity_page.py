"""Parity's verdicts, and its page and plots, from the two JSON files that `parity` keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks import store
from benchmarks.tables import facts, table

TRAINERS = ("rlkern", "trl")
#: Of gradient norms, parameters and their move. fp32 rounds each of some 2000 tokens' terms to
#: 6e-8, and six steps carry it on to a few 1e-6; the smallest other convention that a framework
#: has (1e-6 beside the group's standard deviation, not 1e-4) makes 3e-4.
BOUND = 1e-4
JUDGED = ("grad_norm", "parameters", "move")
#: The final reward is the mean of so many last steps.
LAST = 10


def judged(entry: dict[str, Any]) -> dict[str, float]:
    """The differences of a recorded entry, or a control, that BOUND is for.

    With AdamW's default eps the move counts without the keys' biases: their gradient is 0.
    """
    found = entry.get("trl to rlkern", entry)
    move = "move" if entry.get("adam_eps", 1.0) > 1e-6 else "move_without_key_biases"
    return {"grad_norm": found["grad_norm"], "parameters": found["parameters"],
            "move": found[move]}  # fmt: skip


def final(run: dict[str, Any]) -> float:
    """The final reward of one trainer with one seed."""
    return mean(run["rewards"][-LAST:])


def finals(content: dict[str, Any], trainer: str) -> list[float]:
    return [final(run[trainer]) for run in content["runs"]]


def within(some: list[float], others: list[float]) -> bool:
    """Whether the mean of some lies in the range of the others, [min, max]."""
    return min(others) <= mean(some) <= max(others)


def _recorded_holds(content: dict[str, Any]) -> bool:
    same = all(max(judged(entry).values()) <= BOUND for entry in content["entries"])
    seen = all(max(judged(control).values()) > BOUND for control in content["controls"])
    return same and seen


def _seeds_hold(content: dict[str, Any]) -> bool:
    ours, theirs = (finals(content, trainer) for trainer in TRAINERS)
    return within(ours, theirs) and within(theirs, ours)


def holds(part: str, content: dict[str, Any]) -> bool:
    """The verdict on "recorded" or "seeds"."""
    return {"recorded": _recorded_holds, "seeds": _seeds_hold}[part](content)


def _answer(yes: bool) -> str:
    return "yes" if yes else "NO"


def _recorded(content: dict[str, Any]) -> str:
    entries = content["entries"]
    rewards = ", ".join(f"{reward:.3f}" for reward in content["rewards"])
    moved = [entry["trl to rlkern"]["moved"] for entry in entries]
    lines = [
        "## Recorded completions",
        "",
        f"Three rounds of {content['completions']} completions (mean rewards {rewards}), two",
        "optimizer steps over all of each, or four over mini-batches: TRL's trainer against our",
        "loop, in fp32. Gradient norm: the largest relative difference of any step, before",
        "clipping. Parameters: the norm of the difference after the last step over the norm of all",
        f"parameters; move: over the norm of what the steps changed, {min(moved):.3f} to",
        f"{max(moved):.3f} of the parameters'. Coordinate: the largest difference over the largest",
        "move. In brackets: the same of TRL, and of our loop, to a run of the definitions in",
        f"float64. Bound: {BOUND:g}.",
    ]
    header = ["objective", "AdamW eps", "gradient norm", "parameters", "move",
              "without key biases", "coordinate", "clipped", "within"]  # fmt: skip
    names = ("grad_norm", "parameters", "move", "move_without_key_biases", "coordinate")

    def cell(entry: dict[str, Any], name: str) -> str:
        judges = (f"{entry[f'{who} to float64'][name]:.1e}" for who in ("trl", "rlkern"))
        return f"{entry['trl to rlkern'][name]:.1e} ({', '.join(judges)})"

    rows = [
        [entry["objective"], f"{entry['adam_eps']:g}", *(cell(entry, name) for name in names),
         f"{max(entry['clip_frac']['rlkern']):.0%}",
         _answer(max(judged(entry).values()) <= BOUND)]
        for entry in entries
    ]  # fmt: skip
    lines += table(header, rows)
    lines += [
        "",
        "Clipped: the largest share of tokens outside the clip range in a step. The keys' biases",
        "add one number to all of a query's scores, which the softmax does not see: their gradient",
        "is 0, and what AdamW with eps 1e-8 makes steps of is the rounding of that 0. There the",
        "move is judged without them.",
        "",
        "What the bound sees: our loop with another convention on purpose, dapo, AdamW's eps 1e-5.",
    ]
    rows = [
        [control["name"], *(f"{control[name]:.1e}" for name in JUDGED),
         _answer(max(judged(control).values()) > BOUND)]
        for control in content["controls"]
    ]  # fmt: skip
    lines += table(["convention", "gradient norm", "parameters", "move", "seen"], rows)
    return "\n".join(lines) + "\n"


def _seeds(content: dict[str, Any]) -> str:
    runs = content["runs"]
    ours, theirs = (finals(content, trainer) for trainer in TRAINERS)
    lines = [
        "## Whole runs",
        "",
        f"{len(runs)} seeds, {content['steps']} steps each of our loop and of TRL's trainer, which",
        "generates with transformers, from the same warm-started weights by seed. The final reward",
        f"is the mean of the last {LAST} steps; the accuracy is greedy, of held-out prompts.",
    ]
    header = ["seed", "final reward", "TRL's", "accuracy before", "after", "TRL's", "s", "TRL's"]
    rows = [
        [str(run["seed"]), f"{final(run['rlkern']):.3f}", f"{final(run['trl']):.3f}",
         f"{run['accuracy_before']:.3f}", f"{run['rlkern']['accuracy']:.3f}",
         f"{run['trl']['accuracy']:.3f}", f"{run['rlkern']['seconds']:.0f}",
         f"{run['trl']['seconds']:.0f}"]
        for run in runs
    ]  # fmt: skip
    lines += [*table(header, rows), ""]
    for name, some, others in (("rlkern", ours, theirs), ("TRL", theirs, ours)):
        lines.append(
            f"- {name}'s mean {mean(some):.3f} lies in the other's range [{min(others):.3f}, "
            f"{max(others):.3f}]: {_answer(within(some, others))}"
        )
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    lines += [
        f"- rlkern's final reward less TRL's, seed by seed: {mean(gaps):+.3f} in the mean, with a "
        f"standard error of {stdev(gaps) / len(gaps) ** 0.5:.3f}"
    ]
    lines += ["", "Seconds are of processes that shared the machine, and no benchmark of speed."]
    return "\n".join(lines) + "\n"


RENDER: dict[str, Callable[[dict[str, Any]], str]] = {"recorded": _recorded, "seeds": _seeds}


def write_pages(folder: Path) -> None:
    """The plots and the page of a folder of parity's JSON; nothing where there is none."""
    from benchmarks import plots

    files = [folder / f"{part}.json" for part in RENDER]
    sections = []
    for file in filter(Path.exists, files):
        content = json.loads(file.read_text())
        picture = file.with_suffix(".png")
        if file.stem == "recorded":
            plots.gradient_norms(content["entries"], BOUND, picture)
        else:
            curves = {t: [run[t]["rewards"] for run in content["runs"]] for t in TRAINERS}
            plots.rewards(curves, picture)
        text = RENDER[file.stem](content).split("\n", 1)
        about = "\n".join(facts(content["machine"]))
        sections += [f"{text[0]}\n\n{about}\n\n![{text[0][3:]}]({picture.name})\n{text[1]}"]
    if sections:
        head = "# Parity with TRL's GRPOTrainer\n\nWhat was set equal, and how to run this: docs/"
        store.write(folder / "index.md", f"{head}benchmarks.md.\n\n" + "\n".join(sections))

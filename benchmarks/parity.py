"""Parity of the GRPO loop with TRL's GRPOTrainer: the same updates, and the same learning.

python -m benchmarks.parity             both parts below
python -m benchmarks.parity recorded    on recorded completions: gradient norms and parameters
python -m benchmarks.parity seeds       whole runs over several seeds: rewards

Exit code 1 where parity does not hold, or where a difference put in on purpose is not seen.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import machine, parity_page, store
from benchmarks.measure import run_child

#: Options of the recorded part: three rounds of two optimizer steps over all of their completions.
#: So no random order enters: a sum over rows has none but for its rounding.
RECORDED = {"steps": 3, "epochs": 2, "minibatches": 1, "learning_rate": 1e-3,
            "warmup_steps": 0, "final_learning_rate": 1.0}  # fmt: skip
OBJECTIVES: dict[str, dict[str, Any]] = {
    "grpo, KL 0.04": {"loss": "grpo", "kl_coef": 0.04},
    "dapo": {"loss": "dapo"},
    "dr_grpo": {"loss": "dr_grpo", "scale": "none"},
    # As the whole runs: four mini-batches, drawn alike, and a rate that rises and falls.
    "grpo, mini-batches": {
        "loss": "grpo",
        "kl_coef": 0.0,
        "epochs": 1,
        "minibatches": 4,
        "warmup_steps": 2,
        "final_learning_rate": 0.1,
    },
}
#: Options of the whole runs over the loop's defaults. Its default loss, dapo, divides a mini-batch
#: by its own tokens, TRL's by its share of the round's: grpo is one formula in both.
WHOLE = {"loss": "grpo", "kl_coef": 0.0}
#: AdamW's eps. 1e-8 is both trainers' own: a gradient that is 0 but for rounding, up to 1e-9 here,
#: is then up to a tenth of a step. 1e-5 lies far above that and below a true gradient, whose
#: coordinates are 3e-3 (root of their mean square) and 3e-4 (median).
ADAM_EPS = (1e-5, 1e-8)
#: Other conventions than TRL's, in our loop alone; they must show.
CONTROLS: dict[str, dict[str, Any]] = {
    "standard deviation over n, not n - 1": {"unbiased": False},
    "1e-6 added to it, not 1e-4": {"advantage_eps": 1e-6},
    "clipped above 1.20, not 1.28": {"clip_high": 0.2},
}


def recorded(say: Callable[[str], None], **options: Any) -> dict[str, Any]:
    """The recorded part, ready for JSON.

    Args:
        say: takes a line about what is being done.
        options: of rlkern's GRPOConfig, over RECORDED.
    """
    import torch
    from rlkern_loops import model
    from rlkern_loops.grpo import GRPOConfig
    from rlkern_loops.prepare import prepare
    from transformers.utils import logging

    from benchmarks import parity_runs as runs

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    entries, controls = [], []
    with tempfile.TemporaryDirectory() as folder:
        common = {"device": "cpu", "output_dir": folder} | RECORDED | options
        start = prepare(GRPOConfig(**common), "cpu").model
        common |= {"model": start}
        config = GRPOConfig(**common)
        setting = prepare(config, "cpu")
        rounds = runs.record(model.load(start, config, "cpu"), setting, config)
        for name, objective in OBJECTIVES.items():
            config = GRPOConfig(**common | objective)
            for eps in ADAM_EPS:
                say(f"recorded: {name}, AdamW's eps {eps:g}")
                arguments = rounds, start, setting, config, eps
                trl, ours = runs.trl_on(*arguments), runs.ours_on(*arguments)
                judge = runs.float64_on(*arguments)
                entries.append({
                    "objective": name,
                    "adam_eps": eps,
                    "grad_norms": {"trl": trl.grad_norms, "rlkern": ours.grad_norms},
                    "clip_frac": {"trl": trl.clip_frac, "rlkern": ours.clip_frac},
                    "trl to rlkern": runs.compare(trl, ours),
                    "trl to float64": runs.compare(trl, judge),
                    "rlkern to float64": runs.compare(ours, judge),
                })  # fmt: skip
                if name == "dapo" and eps == ADAM_EPS[0]:
                    for control, change in CONTROLS.items():
                        say(f"recorded: {name}, {control}")
                        config = GRPOConfig(**common | objective | change)
                        other = runs.ours_on(rounds, start, setting, config, eps)
                        controls.append({"name": control} | runs.compare(trl, other))
    rewards = [of_round.rewards.mean().item() for of_round in rounds]
    return {"entries": entries, "controls": controls, "rewards": rewards,
            "completions": len(rounds[0].rewards)}  # fmt: skip


def seeds(say: Callable[[str], None], count: int, steps: int, jobs: int) -> dict[str, Any]:
    """Whole runs of both trainers, a process for each seed."""

    def run(seed: int) -> dict[str, Any]:
        found = run_child("benchmarks.parity_runs", WHOLE | {"seed": seed, "steps": steps})
        finals = (f"{name} {parity_page.final(found[name]):.3f}" for name in parity_page.TRAINERS)
        say(f"seed {seed}: final rewards {', '.join(finals)}")
        return {"seed": seed} | found

    say(f"seeds: {count} of {steps} steps, {jobs} at a time")
    with ThreadPoolExecutor(jobs) as pool:
        return {"steps": steps, "runs": list(pool.map(run, range(1, count + 1)))}


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"expected a number from {least}, got {text!r}")
        return value

    return number


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", choices=("recorded", "seeds", "all"), default="all")
    parser.add_argument(
        "--output-dir", type=Path,
        help="where JSON, page and plots go; default: this machine's folder of results",
    )  # fmt: skip
    parser.add_argument("--seeds", type=_at_least(2), default=5, help="how many; default: 5")
    parser.add_argument(
        "--steps", type=_at_least(parity_page.LAST), default=80,
        help="steps of a seed's run; default: 80",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=_at_least(1), default=min(2, os.cpu_count() or 1),
        help="seeds at a time, a thread each; default: 2",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    missing = [name for name in ("trl", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"expected {' and '.join(missing)} to be installed: pip install '.[test]'")

    def say(line: str) -> None:
        print(line, flush=True)

    folder = options.output_dir or store.RESULTS / machine.name() / "parity"
    facts = machine.describe()
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "recorded": lambda: recorded(say),
        "seeds": lambda: seeds(say, options.seeds, options.steps, options.jobs),
    }
    held = True
    for part in parts if options.part == "all" else [options.part]:
        content = parts[part]() | {"machine": facts}
        store.write(folder / f"{part}.json", json.dumps(content, indent=1) + "\n")
        parity_page.write_pages(folder)
        held = parity_page.holds(part, content) and held
        say(parity_page.RENDER[part](content))
    say(f"parity {'holds' if held else 'DOES NOT HOLD'}; the page: {folder / 'index.md'}")
    return int(not held)


if __name__ == "__main__":
    sys.exit(main())

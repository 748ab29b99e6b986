"""Extra memory of the lm_head-fused operators by the number of tokens, a process for each figure.

A process has run the operator on a few tokens before, and reports by how much the highest resident
size of one call is above the size before it: results, scratch memory of the matrix libraries and
what malloc keeps are all in it.

Run by itself as `python -m benchmarks.linear_memory REQUEST REPLY`, two JSON files.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import run_child
from benchmarks.memory import peak_extra_bytes
from benchmarks.tables import facts, table

SHAPE = {"width": 1024, "vocab": 32768}
QUICK_SHAPE = {"width": 32, "vocab": 512}
TOKENS = (4096, 16384, 32768)
FEW = 128  # a call of these has touched the code and started the threads
#: Beyond the gradients and one fp32 sum in the weight's shape, whatever the number of tokens: an
#: eighth of 16384 x 32768 logits in bf16.
MOST = 16384 * 32768 * 2 // 8
OURS = (
    "from_hidden, trained head",
    "from_hidden, frozen head",
    "linear_token_logprobs, trained head",
)
EAGER = "eager, trained head"
#: Logits in bf16 and fp32, their log-softmax, and a gradient of each of the latter two.
EAGER_BYTES = 2 + 4 * 4


def objective(name: str) -> Callable[..., torch.Tensor]:
    """(hidden, weight, ids, old, advantages) -> a loss."""
    import rlkern
    from benchmarks import linear_contestants

    if name == EAGER:
        return linear_contestants.eager
    if name.startswith("from_hidden"):
        return linear_contestants.build_rlkern()
    return lambda h, w, ids, *_: rlkern.linear_token_logprobs(h, w, ids).sum()


def child(name: str, tokens: int, width: int, vocab: int) -> int:
    """Extra bytes of a loss and its gradients."""
    loss = objective(name)
    weight = (torch.randn(vocab, width) / width**0.5).bfloat16()
    weight.requires_grad_("frozen" not in name)

    def ready(count: int) -> Callable[[], Any]:
        hidden = torch.randn(1, count, width).bfloat16().requires_grad_()
        ids, old = torch.randint(vocab, (1, count)), -10 * torch.rand(1, count)
        wanted = [factor for factor in (hidden, weight) if factor.requires_grad]
        advantages = torch.ones(1)
        return lambda: torch.autograd.grad(loss(hidden, weight, ids, old, advantages), wanted)

    ready(min(tokens, FEW))()
    return peak_extra_bytes(ready(tokens))


def known_bytes(name: str, tokens: int, width: int, vocab: int) -> int:
    """The gradients in bf16, and the weight's fp32 sum where there is one."""
    of_weight = 0 if "frozen" in name else width * vocab * (2 if name == EAGER else 2 + 4)
    return tokens * width * 2 + of_weight


def measure(quick: bool) -> list[dict[str, Any]]:
    """One point per number of tokens: bytes in all, and beyond the known, by contestant.

    Eager is left out where its logits do not fit.
    """
    shape = QUICK_SHAPE if quick else SHAPE
    points: list[dict[str, Any]] = []
    for tokens in (256, 512) if quick else TOKENS:
        extra, beyond = {}, {}
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        for name in (*OURS, EAGER):
            if name == EAGER and EAGER_BYTES * tokens * shape["vocab"] > free:
                continue
            request = {"name": name, "tokens": tokens, **shape}
            extra[name] = run_child("benchmarks.linear_memory", request)["bytes"]
            beyond[name] = extra[name] - known_bytes(name, tokens, **shape)
        logits = 2 * tokens * shape["vocab"]
        points.append(
            {"tokens": tokens, **shape, "logits": logits, "extra": extra, "beyond": beyond}
        )
    return points


def render(points: list[dict[str, Any]]) -> str:
    shape = "D = {width}, V = {vocab}, bf16".format(**points[0])
    text = f"""## Extra memory of a loss and its gradients, {shape}

In MiB; in brackets what is beyond the gradients and, with a trained head, one fp32 sum in the
weight's shape. Promised of ours: at most {MOST >> 20} beyond, whatever the number of tokens."""

    def cell(point: dict[str, Any], name: str) -> str:
        if name not in point["extra"]:
            return "does not fit"
        return f"{point['extra'][name] / 2**20:.0f} ({point['beyond'][name] / 2**20:.0f})"

    names = (*OURS, EAGER)
    rows = [
        [str(p["tokens"]), f"{p['logits'] / 2**20:.0f}", *(cell(p, name) for name in names)]
        for p in points
    ]
    return "\n".join([text, *table(["tokens", "logits in bf16", *names], rows)]) + "\n"


def show(config: Any, points: list[dict[str, Any]]) -> None:
    """Prints the table and, where results are kept, writes it into memory/."""
    from benchmarks import store
    from benchmarks.conftest import facts_of, results_folder

    text = render(points)
    capture = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        config.pluginmanager.getplugin("terminalreporter").write(f"\n{text}")
    if folder := results_folder(config):
        machine = facts_of(config)
        content = json.dumps({"machine": machine, "points": points}, indent=1)
        store.write(folder / "memory" / "linear.json", content + "\n")
        store.write(folder / "memory" / "linear.md", "\n".join([*facts(machine), "", text]))


def main(request_file: str, reply_file: str) -> None:
    request = json.loads(Path(request_file).read_text())
    Path(reply_file).write_text(json.dumps({"bytes": child(**request)}))


if __name__ == "__main__":
    main(*sys.argv[1:])

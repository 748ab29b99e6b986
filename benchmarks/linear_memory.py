"""Extra memory of the lm_head-fused operators by the number of tokens, a process for each figure.

A process has run the operator on a few tokens before, and reports by how much the highest resident
size of one call is above the size before it: results, scratch memory of the matrix libraries and
what malloc keeps are all in it. Peers beside it go as far as they fit, and slow ones as far as the
time of a benchmark allows.

Run by itself as `python -m benchmarks.linear_memory REQUEST REPLY`, two JSON files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import store
from benchmarks.measure import run_child
from benchmarks.memory import peak_extra_bytes
from benchmarks.sweep_worker import available_bytes
from benchmarks.tables import facts, table
from benchmarks.worker import reason

SHAPE = {"width": 1024, "vocab": 32768}
QUICK_SHAPE = {"width": 32, "vocab": 512}
TOKENS = (1024, 4096, 16384, 32768)
QUICK_TOKENS = (256, 512)
FEW = 128  # a call of these has touched the code and started the threads
#: Beyond the gradients and one fp32 sum in the weight's shape, whatever the number of tokens: an
#: eighth of 16384 x 32768 logits in bf16.
MOST = 16384 * 32768 * 2 // 8
OURS = (
    "from_hidden, trained head",
    "from_hidden, frozen head",
    "linear_token_logprobs, trained head",
)
EAGER, COMPILED = "eager, trained head", "torch.compile, trained head"
TRL, LIGER = "TRL, trained head", "Liger, trained head"
PEERS = (EAGER, COMPILED, TRL, LIGER)
#: Larger sizes would take these peers most of a minute each.
SLOW = {TRL: 4096, LIGER: 4096}


def objective(name: str) -> Callable[..., torch.Tensor]:
    """(hidden, weight, ids, old, advantages) -> a loss."""
    import rlkern
    from benchmarks import linear_contestants as contestants

    if name == "linear_token_logprobs, trained head":
        return lambda h, w, ids, *_: rlkern.linear_token_logprobs(h, w, ids).sum()
    builds: dict[str, Callable[[], Callable[..., torch.Tensor]]] = {
        EAGER: lambda: contestants.eager,
        COMPILED: contestants.compiled(contestants.eager),
        TRL: contestants.with_objective(contestants.build_trl),
        LIGER: contestants.build_liger,
    }
    return builds.get(name, contestants.build_rlkern)()


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

    # What is compiled is compiled for one shape.
    ready(tokens if name == COMPILED else min(tokens, FEW))()
    return peak_extra_bytes(ready(tokens))


def known_bytes(name: str, tokens: int, width: int, vocab: int) -> int:
    """The gradients in bf16, and the weight's fp32 sum where there is one."""
    of_weight = 0 if "frozen" in name else width * vocab * (2 if name in PEERS else 2 + 4)
    return tokens * width * 2 + of_weight


def left_out(name: str, tokens: int, before: dict[str, Any] | None) -> str | None:
    """Why a peer is not measured at this size, from the point before it."""
    if name not in PEERS:
        return None
    if tokens > SLOW.get(name, tokens):
        return "not measured: slow"
    if before is None:
        return None
    if name not in before["extra"]:
        return before["left_out"][name]
    grown = before["extra"][name] * tokens / before["tokens"]
    return "does not fit" if grown > available_bytes() else None


def measure(quick: bool) -> list[dict[str, Any]]:
    """One point per number of tokens: bytes in all, beyond the known, and who is left out why."""
    shape = QUICK_SHAPE if quick else SHAPE
    points: list[dict[str, Any]] = []
    for tokens in QUICK_TOKENS if quick else TOKENS:
        point: dict[str, Any] = {"tokens": tokens, **shape, "logits": 2 * tokens * shape["vocab"]}
        point |= {"extra": {}, "beyond": {}, "left_out": {}}
        for name in (*OURS, *PEERS):
            why = left_out(name, tokens, points[-1] if points else None)
            if why is None:
                request = {"name": name, "tokens": tokens, **shape}
                reply = run_child("benchmarks.linear_memory", request)
                if "bytes" in reply:
                    point["extra"][name] = reply["bytes"]
                    point["beyond"][name] = reply["bytes"] - known_bytes(name, tokens, **shape)
                why = reply.get("reason")
            if why is not None:
                point["left_out"][name] = why
        points.append(point)
    return points


def render(points: list[dict[str, Any]]) -> str:
    shape = "D = {width}, V = {vocab}, bf16".format(**points[0])
    text = f"""## Extra memory of a loss and its gradients, {shape}

In MiB; in brackets what is beyond the gradients and, of ours with a trained head, one fp32 sum in
the weight's shape. Promised of ours: at most {MOST >> 20} beyond, whatever the number of tokens."""

    def cell(point: dict[str, Any], name: str) -> str:
        if name not in point["extra"]:
            return point["left_out"][name]
        return f"{point['extra'][name] / 2**20:.0f} ({point['beyond'][name] / 2**20:.0f})"

    names = (*OURS, *PEERS)
    rows = [
        [str(p["tokens"]), f"{p['logits'] / 2**20:.0f}", *(cell(p, name) for name in names)]
        for p in points
    ]
    return "\n".join([text, *table(["tokens", "logits in bf16", *names], rows)]) + "\n"


def write_page(folder: Path) -> None:
    """The page beside a folder's linear.json; nothing where it was not measured."""
    if (folder / "linear.json").exists():
        kept = json.loads((folder / "linear.json").read_text())
        text = "\n".join([*facts(kept["machine"]), "", render(kept["points"])])
        store.write(folder / "linear.md", text)


def show(config: Any, points: list[dict[str, Any]], seconds: float) -> None:
    """Prints the table and, where results are kept, writes it into memory/, with what it took."""
    from benchmarks.conftest import facts_of, results_folder

    capture = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        config.pluginmanager.getplugin("terminalreporter").write(f"\n{render(points)}")
    if folder := results_folder(config):
        content = {"machine": facts_of(config), "points": points, "took_seconds": seconds}
        store.write(folder / "memory" / "linear.json", json.dumps(content, indent=1) + "\n")
        write_page(folder / "memory")


def main(request_file: str, reply_file: str) -> None:
    request = json.loads(Path(request_file).read_text())
    try:
        reply: dict[str, Any] = {"bytes": child(**request)}
    except ImportError as error:  # a peer that is not installed, or torch without what it needs
        if request["name"] not in PEERS:
            raise
        reply = {"reason": reason(error)}
    Path(reply_file).write_text(json.dumps(reply))


if __name__ == "__main__":
    main(*sys.argv[1:])

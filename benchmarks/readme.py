"""The README's table of figures, written between two markers from the results that are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import store
from benchmarks.machine import ROOT
from benchmarks.tables import bound, figure, heads, mebibytes, share_of_floor, table

README = ROOT / "README.md"
BEGIN = "<!-- figures: written by python -m benchmarks.report -->"
END = "<!-- end of figures -->"
#: What stands for plain PyTorch where it has another name.
EAGER = ("eager", "PyTorch loop")

# Label, operator, parameters that its case must have, contestant.
_LOGITS = {"vocab": 151936, "tokens": 128}
ROWS: tuple[tuple[str, str, dict[str, Any], str], ...] = (
    ("`token_logprobs`, fp32", "token_logprobs", _LOGITS | {"dtype": "float32"}, "forward/rlkern"),
    ("`token_logprobs` and in-place backward, fp32", "token_logprobs",
     _LOGITS | {"dtype": "float32"}, "forward + backward/rlkern in place"),
    ("`token_logprobs`, bf16", "token_logprobs", _LOGITS | {"dtype": "bfloat16"}, "forward/rlkern"),
    ("`token_logprobs` and in-place backward, bf16", "token_logprobs",
     _LOGITS | {"dtype": "bfloat16"}, "forward + backward/rlkern in place"),
    ("`PolicyLoss.from_logits`, in place, bf16", "from_logits", _LOGITS | {"dtype": "bfloat16"},
     "loss + gradient/rlkern in place"),
    ("`kl_divergence` and gradient, bf16", "kl_divergence",
     {"rows": 256, "vocab": 151936, "dtype": "bfloat16"}, "KL + gradient/rlkern"),
    ("`linear_token_logprobs` and gradients, bf16", "linear_token_logprobs", {},
     "log-probabilities + gradients of hidden and weight/rlkern"),
    ("`PolicyLoss.from_hidden`, bf16", "from_hidden", {},
     "loss + gradients of hidden and weight/rlkern"),
    ("`PolicyLoss`, dapo with k3, metrics", "policy_loss", {"sequences": 64, "cache": "warm"},
     "loss + gradient + metrics, dapo + k3/rlkern"),
    ("`ValueLoss`, metrics", "value_loss", {"sequences": 64}, "loss + gradient + metrics/rlkern"),
    ("`kl_penalty`, k3", "kl_penalty", {"sequences": 64}, "value + gradient, k3/rlkern"),
    ("`group_advantages`, ragged, shuffled", "group_advantages",
     {"rewards": 65536, "cache": "warm"},
     "ragged groups, shuffled/rlkern"),
    ("`gae`", "return_scan", {"tokens": 8192}, "gae/rlkern"),
    ("`whiten`", "whiten", {"sequences": 512}, "masked whitening/rlkern"),
    ("a training step", "training_step", {}, "step/rlkern from_hidden"),
)  # fmt: skip


def _find(cases: list[dict[str, Any]], operator: str, params: dict[str, Any]) -> dict | None:
    for case in cases:
        if case["operator"] == operator and params.items() <= case["params"].items():
            return case
    return None


def _row(label: str, case: dict[str, Any], contestant: str) -> list[str] | None:
    entry = case["entries"].get(contestant)
    if entry is None or entry["status"] != "ok":
        return None
    shape = " x ".join(str(v) for v in case["params"].values() if isinstance(v, int))
    task = entry["task"]
    eager = next((f"{task}/{n}" for n in EAGER if f"{task}/{n}" in case["entries"]), None)

    def faster(peer: str | None) -> str:
        ratio = peer and entry["peers"].get(peer.removeprefix(f"{task}/"))
        return figure(ratio["median"]) if ratio else "-"

    def memory(key: str | None) -> str:
        size = case["entries"].get(key, {}).get("extra_bytes")
        return "-" if size is None else mebibytes(size)

    share = share_of_floor(case, entry)
    return [
        label, shape,
        figure(1e3 * entry["seconds"]["median"]),
        f"{share['median']:.2f} of {bound(case, task)}" if share else "-",
        faster(eager),
        faster(f"{task}/torch.compile"),
        f"{memory(contestant)} ({memory(eager)})",
    ]  # fmt: skip


def _rows(cases: list[dict[str, Any]]) -> list[tuple[dict[str, Any], list[str]]]:
    """The table's rows, each with the case that it is of."""
    rows = []
    for label, operator, params, contestant in ROWS:
        case = _find(cases, operator, params)
        row = _row(label, case, contestant) if case else None
        if case and row:
            rows.append((case, row))
    return rows


def figures(results: Path = store.RESULTS) -> str:
    """The table, of the machine that has most of its rows, the newest of equals."""
    found = []
    for folder in sorted(results.iterdir()):
        if folder.is_dir() and list(folder.glob("*.json")):
            cases = store.read_all(folder)
            newest = max(case["machine"]["date"] for case in cases)
            found.append((len(_rows(cases)), newest, folder.name, _rows(cases)))
    if not found:
        return "Nothing has been measured yet."
    _, _, name, rows = max(found, key=lambda entry: entry[:3])
    if not rows:
        return "Nothing of it has been measured yet."
    shown = [case for case, _ in rows]
    machine = shown[0]["machine"]
    header = ["", "shape", "ms", "of its floor", "x eager", "x torch.compile", "MiB (eager's)"]
    labels = {row[0] for _, row in rows}
    missing = [row[0] for row in ROWS if row[0] not in labels]
    text = [
        f"{machine['cpu']}, {machine['cores']} cores ({machine['instruction_set']}), "
        f"{heads(shown, 'date', 'commit')}: `benchmarks/results/{name}`.",
        *table(header, [row for _, row in rows]),
    ]
    if missing:
        text += ["", f"Not measured on it yet: {'; '.join(missing)}."]
    return "\n".join(text)


def between(text: str) -> str:
    """What stands between the markers of a README."""
    return text.split(BEGIN)[1].split(END)[0].strip("\n")


def update() -> None:
    """Writes the table into the README."""
    before, rest = README.read_text().split(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{figures()}\n{END}{rest.split(END)[1]}")

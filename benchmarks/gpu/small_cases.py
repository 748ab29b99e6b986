"""Small calls of every kernel of every registered operator, for compute-sanitizer."""

from __future__ import annotations

import torch

from benchmarks.gpu import registry


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for case in registry.discover():
        case.small_calls(device)
        print(f"{case.operator}: small calls ran on {device}")
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

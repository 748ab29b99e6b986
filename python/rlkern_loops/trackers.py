"""TensorBoard, Weights & Biases and trackio, behind one small face."""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rlkern_loops.errors import LogError, did_you_mean


class Tracker(Protocol):
    name: str

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    name = "tensorboard"

    def __init__(self, folder: Path, options: dict[str, Any], resumed_step: int | None):
        from torch.utils.tensorboard import SummaryWriter

        # What was logged beyond the checkpoint is hidden, as it is cut from the JSON lines.
        purge = None if resumed_step is None else resumed_step + 1
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)
        rows = "\n".join(f"|{name}|{value}|" for name, value in options.items())
        self._writer.add_text("config", f"|option|value|\n|-|-|\n{rows}")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WandB:
    name = "wandb"

    def __init__(self, folder: Path, options: dict[str, Any], resumed_step: int | None):
        import wandb

        self._run = wandb.init(
            project="rlkern", dir=folder, config=options, resume="allow",
            id=_run_id(folder, resumed_step),
        )  # fmt: skip

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    name = "trackio"

    def __init__(self, folder: Path, options: dict[str, Any], resumed_step: int | None):
        import trackio

        self._run = trackio.init(
            project="rlkern", name=_run_id(folder, resumed_step), config=options, resume="allow"
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


def _run_id(folder: Path, resumed_step: int | None) -> str:
    """The name under which a service knows the run, the same after it is resumed."""
    kept = folder / "run_id"
    if resumed_step is None or not kept.exists():
        kept.write_text(f"{folder.name}-{uuid.uuid4().hex[:8]}")
    return kept.read_text()


# By the name of the pip package, which is the module that an import must find.
_TRACKERS: dict[str, Callable[..., Tracker]] = {
    tracker.name: tracker for tracker in (_TensorBoard, _WandB, _Trackio)
}


def check_installed(names: Sequence[str]) -> None:
    """Before a run begins: that every tracker is known and can be imported.

    Raises:
        LogError: a name is unknown, or its package is not installed.
    """
    for name in names:
        if name not in _TRACKERS:
            raise LogError(
                f"report_to: no tracker {name!r}{did_you_mean(name, _TRACKERS)}; expected "
                f"{', '.join(_TRACKERS)}"
            )
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise LogError(f"report_to: {name} is not installed: pip install {name}") from error


def start(
    name: str, folder: Path, options: dict[str, Any], resumed_step: int | None = None
) -> Tracker:
    """Begins to log a run, or goes on after `resumed_step` steps of it.

    Args:
        name: of `check_installed`'s.
        folder: the run's folder, which is there.
        options: of the run, shown beside its metrics.
        resumed_step: None for a new run.

    Raises:
        LogError: the tracker does not start: no login, no network.
    """
    try:
        return _TRACKERS[name](folder, options, resumed_step)
    except Exception as error:  # each service has its own
        raise LogError(f"report_to: {name} does not start: {error}") from error

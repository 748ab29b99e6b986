"""Checkpoints that are whole or not there, and what a run needs to go on as if never stopped.

A run's folder holds `checkpoints/step-000100.pt`. One is written beside its name, flushed to the
disk and then renamed, so that a run killed at any moment, or a full disk, leaves the older ones as
they were.
"""

from __future__ import annotations

import os
import random
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy
import torch

from rlkern_loops.errors import CheckpointError

# Marks our files: a file that another program saved with torch is refused.
_FORMAT = "rlkern-1"
_NAME = re.compile(r"step-(\d+)\.pt")
_PREVIOUS = "checkpoints.previous"


def _places(folder: str | Path) -> list[tuple[int, Path]]:
    """The checkpoints of a run, by step."""
    found = (Path(folder) / "checkpoints").glob("step-*.pt")
    return sorted((int(m[1]), path) for path in found if (m := _NAME.fullmatch(path.name)))


def latest(folder: str | Path) -> Path | None:
    """The checkpoint of a run's folder with the most steps, whole or not; None without one."""
    places = _places(folder)
    return places[-1][1] if places else None


def save(folder: str | Path, step: int, state: dict[str, Any], *, keep: int = 2) -> Path:
    """Writes `state` as the checkpoint of `step`, and then removes all but the `keep` newest.

    Args:
        folder: the run's folder, made where it is not there.
        step: the steps that are done.
        state: nested dictionaries, lists and tuples of tensors, numbers, text and None.
        keep: how many checkpoints, this one included, are left; at least 1.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written.
        TypeError: `state` has something that `load` would refuse.
    """
    assert keep >= 1
    _check_loadable(state, "state")
    checkpoints = Path(folder) / "checkpoints"
    path = checkpoints / f"step-{step:06d}.pt"
    staged = path.with_suffix(".tmp")
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        for leftover in checkpoints.glob("step-*.tmp"):  # of a run that was killed while it wrote
            leftover.unlink()
        with staged.open("wb") as file:
            torch.save({"format": _FORMAT, "step": step, "state": state}, file)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
        _fsync_folder(checkpoints)
    except (OSError, RuntimeError) as error:
        cause = _os_error(error)
        if cause is None:
            raise
        try:
            staged.unlink(missing_ok=True)
        except OSError:  # the folder that could not be written
            pass
        older = latest(folder)
        kept = f"; {older} is untouched" if older else ""
        raise CheckpointError(
            f"cannot write the checkpoint {path}: {cause.strerror}{kept}"
        ) from error
    before = [place for number, place in _places(folder) if number < step]
    for surplus in before[: max(len(before) - (keep - 1), 0)]:
        surplus.unlink(missing_ok=True)
    return path


def _os_error(error: BaseException | None) -> OSError | None:
    """The system's error behind one of torch's writer, which reports a full disk in its own way."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _fsync_folder(folder: Path) -> None:
    """Makes a rename last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check_loadable(value: Any, where: str) -> None:
    # Found when it is written, not when the run that needs it is gone. By exact type: a NumPy
    # float64 is a float to isinstance, and refused by torch.load.
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _check_loadable(key, f"a key of {where}")
            _check_loadable(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for i, item in enumerate(value):
            _check_loadable(item, f"{where}[{i}]")
    elif type(value) not in (int, float, bool, str, type(None)) and not isinstance(
        value, torch.Tensor
    ):
        raise TypeError(
            f"{where}: expected a tensor, a number, text, None, or a dictionary, list or tuple of "
            f"them, got {type(value).__name__}"
        )


def load(path: str | Path) -> dict[str, Any]:
    """The state that `save` wrote, its tensors on the CPU. Runs no code of the file.

    Raises:
        CheckpointError: the file is not there, truncated, damaged, or no checkpoint of a run.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path}: no such file")
    try:
        # torch.load does not compare the checksums that torch.save writes.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise CheckpointError(f"checkpoint {path}: damaged at {damaged}")
        found = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # zipfile, pickle and torch each have their own
        raise CheckpointError(f"checkpoint {path}: truncated, or not a checkpoint") from error
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise CheckpointError(f"checkpoint {path}: not written by a loop of rlkern")
    return found["state"]


def resume(folder: str | Path, which: str) -> tuple[int, dict[str, Any]] | None:
    """The steps done and the state that a run goes on from.

    Args:
        folder: the run's folder.
        which: a checkpoint's path, or "auto" for the newest whole one in `folder`; one that does
            not load is passed over, which is printed.

    Returns:
        None where "auto" finds no checkpoint: the run starts anew.

    Raises:
        CheckpointError: the given one, or every one that there is, does not load.
    """
    if which != "auto":
        name = _NAME.fullmatch(Path(which).name)
        if not name:
            raise CheckpointError(
                f"resume: expected 'auto' or the path of a step-<number>.pt, got {which!r}"
            )
        return int(name[1]), load(which)
    places = _places(folder)
    for step, path in reversed(places):
        try:
            return step, load(path)
        except CheckpointError as error:
            if path == places[0][1]:
                raise CheckpointError(f"{error}; no older one is left in {path.parent}") from error
            print(f"warning: {error}; going on from the one before")
    return None


def set_aside(folder: str | Path) -> Path | None:
    """Moves the checkpoints of an earlier run out of the way of a new one in the same folder.

    Without this a later "auto" would go on from the earlier run. The folder becomes
    `checkpoints.previous`, or `checkpoints.previous-2` and so on where there is one already;
    returns it, None if there were no checkpoints.
    """
    if not _places(folder):
        return None
    last = previous(folder)
    target = Path(folder) / (f"{_PREVIOUS}-{_number(last) + 1}" if last else _PREVIOUS)
    try:
        (Path(folder) / "checkpoints").rename(target)
    except OSError as error:
        raise CheckpointError(
            f"cannot move earlier checkpoints to {target}: {error.strerror}"
        ) from error
    return target


def previous(folder: str | Path) -> Path | None:
    """The last folder that `set_aside` made; None without one."""
    found = [path for path in Path(folder).glob(f"{_PREVIOUS}*") if _number(path)]
    return max(found, key=_number, default=None)


def _number(path: Path) -> int:
    """Which folder of `set_aside` it is, from 1; 0: none."""
    match = re.fullmatch(re.escape(_PREVIOUS) + r"(?:-(\d+))?", path.name)
    return int(match[1] or 1) if match else 0


def rng_state() -> dict[str, Any]:
    """The global random generators of Python, NumPy, torch and every GPU."""
    _, keys, *rest = numpy.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        # As plain numbers: torch.load refuses arrays of NumPy.
        "numpy": (numpy.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Puts back what `rng_state` took.

    A run that goes on with another number of GPUs draws other numbers there: theirs are put back
    as far as both have them.
    """
    random.setstate(state["python"])
    numpy.random.set_state(("MT19937", *state["numpy"]))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        for i, one in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(one, i)

"""What ends a run with one line instead of a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RunError(Exception):
    """The run cannot start or go on, for a reason outside the code; the message is for the user."""


class DataError(RunError):
    """A data set that is missing, empty or not what its options say."""


class RewardError(RunError):
    """A reward that cannot be loaded, raised, or returned something other than numbers."""


class CheckpointError(RunError):
    """A checkpoint that could not be written or read."""


class LogError(RunError):
    """A log file that could not be written, or a tracker that is not there."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' (did you mean ...?)' with the known name nearest to `name`, '' if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def shorten(text: str, limit: int = 200) -> str:
    """`text`, its middle left out where it has more than `limit` characters."""
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]} ... {text[-limit // 2 :]}"

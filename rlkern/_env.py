"""Reads rlkern's switches from the environment.

It imports nothing of rlkern and nothing of torch: setup.py, which has neither, loads it by path.
"""

from __future__ import annotations

import os

_MEANINGS = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(
    ("", "0", "false", "no", "off"), False
)


def flag(name: str) -> bool:
    """Whether a switch is on.

    Raises:
        ValueError: the variable holds neither a yes nor a no. Taken for either, a typing error
            would turn checks off or errors on without a word.
    """
    value = os.environ.get(name, "")
    meaning = _MEANINGS.get(value.strip().lower())
    if meaning is None:
        raise ValueError(
            f"{name}: expected 1, true, yes or on, or 0, false, no, off or nothing, got {value!r}"
        )
    return meaning

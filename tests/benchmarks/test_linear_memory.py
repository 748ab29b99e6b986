"""The table of extra memory: what is measured, and what is taken off it."""

from __future__ import annotations

import pytest

from benchmarks import linear_memory
from benchmarks.measure import run_child

SHAPE = {"width": 64, "vocab": 50_000}


def test_a_child_sees_the_gradients_the_sum_and_a_chunk_of_logits():
    """600 tokens are 57 MiB of logits, less than a chunk: no sum, and all of them at once."""
    name = "from_hidden, trained head"
    request = {"name": name, "tokens": 600, **SHAPE}
    found = run_child("benchmarks.linear_memory", request)["bytes"]
    gradients = 2 * 64 * (600 + 50_000)
    logits = 2 * 600 * 50_000
    assert gradients + logits <= found <= gradients + logits + (32 << 20)


def test_what_is_known_is_taken_off():
    trained = linear_memory.known_bytes("from_hidden, trained head", 10, **SHAPE)
    frozen = linear_memory.known_bytes("from_hidden, frozen head", 10, **SHAPE)
    eager = linear_memory.known_bytes(linear_memory.EAGER, 10, **SHAPE)
    assert (frozen, eager - frozen, trained - eager) == (2 * 640, 2 * 3_200_000, 4 * 3_200_000)


def test_the_table():
    names = (*linear_memory.OURS, *linear_memory.PEERS)
    point = {"tokens": 4096, **SHAPE, "logits": 512 << 20}
    point |= {"extra": {names[0]: 300 << 20}, "beyond": {names[0]: 90 << 20}}
    text = linear_memory.render([point | {"left_out": dict.fromkeys(names[1:], "does not fit")}])
    row = [cell.strip() for cell in text.splitlines()[-1].strip("|").split("|")]
    assert row[:3] == ["4096", "512", "300 (90)"]
    assert row[3:] == ["does not fit"] * (len(names) - 1)
    assert "D = 64, V = 50000" in text and "at most 128" in text


def test_peers_go_as_far_as_they_fit(monkeypatch):
    monkeypatch.setattr(linear_memory, "available_bytes", lambda: 1000)
    eager, slow = linear_memory.EAGER, linear_memory.LIGER
    before = {"tokens": 10, "extra": {eager: 100}, "left_out": {}}
    assert linear_memory.left_out(eager, 10, None) is None
    assert linear_memory.left_out(eager, 100, before) is None
    assert linear_memory.left_out(eager, 101, before) == "does not fit"
    assert linear_memory.left_out(linear_memory.OURS[0], 101, before) is None
    assert linear_memory.left_out(slow, 1 << 20, None) == "not measured: slow"
    absent = {"tokens": 10, "extra": {}, "left_out": {eager: "ModuleNotFoundError"}}
    assert linear_memory.left_out(eager, 20, absent) == "ModuleNotFoundError"


@pytest.mark.parametrize("name", [linear_memory.EAGER, linear_memory.COMPILED])
def test_logits_are_seen_where_they_are_whole(name):
    request = {"name": name, "tokens": 600, **SHAPE}
    logits = 2 * 600 * 50_000
    assert run_child("benchmarks.linear_memory", request)["bytes"] >= 2 * logits

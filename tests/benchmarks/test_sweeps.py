"""Curves: where they leave the line, and that only right results are on them."""

import pytest
from test_harness import MACHINE

from benchmarks import sweep_worker, sweeps


def sweep_of(costs, size=1 << 10, axis="tokens"):
    """Points at 1, 2, 4, ... with so many seconds an element."""
    points = [
        {"n": 2**i, "elements": 2**i, "bytes": size * 2**i, "wrong": {}, "skipped": {},
         "errors": {"rlkern": 0.0},
         "seconds": {"rlkern": {name: cost * 2**i for name in ("median", "low", "high")}}}
        for i, cost in enumerate(costs)
    ]  # fmt: skip
    return {"operator": "toy", "axis": axis, "title": f"toy over {axis}", "points": points,
            "machine": MACHINE, "took_seconds": 1.0, "busy_before": [0.0],
            "read_bytes_per_second": 4.0}  # fmt: skip


def test_the_line_is_what_lies_within_a_quarter_of_the_best():
    assert sweeps.linear_range(sweep_of([9, 1.3, 1.2, 1.0, 1.24, 1.26, 1.0]), "rlkern") == (2, 4)
    assert sweeps.linear_range(sweep_of([1, 1, 1]), "rlkern") == (0, 2)


def test_a_small_end_is_the_call_and_a_large_end_the_cache():
    # From 2^19 bytes to 2^20 the machine's 1 MiB cache is passed.
    text = " ".join(sweeps.sentences(sweep_of([5, 1, 1, 2], size=1 << 18), "rlkern"))
    assert "for tokens from 2 to 4" in text
    assert "Below 2 an element costs more, 5 times at 1: that call takes 4000 ms besides" in text
    assert "From 8 on it is not: 2 times the best there" in text
    assert "pass L2's 1 MiB" in text


def test_no_reason_is_made_up():
    text = " ".join(sweeps.sentences(sweep_of([1, 1, 2], size=1), "rlkern"))
    assert "the reason is not known" in text


def test_a_whole_line_says_nothing_more():
    assert len(sweeps.sentences(sweep_of([1, 1.1, 1]), "rlkern")) == 1


@pytest.mark.parametrize("most, binds", [(1.0, True), (1e6, False)])
def test_threads_are_bound_by_memory_only_near_its_rate(most, binds):
    sweep = sweep_of([1, 2], axis="threads") | {"read_bytes_per_second": most}
    text = " ".join(sweeps.sentences(sweep, "rlkern"))
    assert ("memory binds" in text) == binds and ("reason is not known" in text) != binds


def test_a_point_or_an_end_that_is_missing_without_a_reason_is_a_gap():
    sweep = sweep_of([3, 2, 1]) | {"end": 4, "cut": ""}
    for point in sweep["points"]:
        point["skipped"] = {}
    assert sweeps.gaps(sweep) == []
    assert sweeps.gaps(sweep | {"end": 8}) == ["ends at 4, not at 8"]
    assert sweeps.gaps(sweep | {"end": 8, "cut": "no memory"}) == []
    last = sweep["points"][-1]
    last["seconds"] = {"eager": last["seconds"].pop("rlkern")}
    assert sweeps.gaps(sweep) == ["rlkern is missing at [4]", "eager is missing at [1, 2]"]
    last["skipped"] = {"rlkern": "why"}
    for point in sweep["points"][:2]:
        point["wrong"] = {"eager": "error"}
    assert sweeps.gaps(sweep) == []
    last["seconds"] = {}
    assert sweeps.gaps(sweep) == ["eager has no time anywhere", "eager is missing at [4]"]
    assert "nothing of rlkern's has a time" in sweeps.gaps(sweep | {"points": [last]})


def test_a_sweep_that_memory_cuts_says_so(monkeypatch, tmp_path):
    """A point takes twice its bytes: 4 GiB for the second."""
    monkeypatch.setattr(sweep_worker, "read_rate", lambda: 4.0)
    monkeypatch.setattr(sweep_worker, "available_bytes", lambda: 3 << 30)
    monkeypatch.setattr(sweep_worker, "run", lambda n, point, seconds: sweep_of([1])["points"][0]
                        | {"n": n, "bytes": n << 30})  # fmt: skip
    monkeypatch.setitem(sweep_worker.SWEEPS, "toy", {"tokens": ((1, 2, 4), lambda n: None)})
    reply = sweep_worker.sweep("toy", "tokens", quick=False)
    assert [point["n"] for point in reply["points"]] == [1] and reply["end"] == 4
    assert reply["cut"] == "The sweep ends before 2, which takes 4.0 GiB of memory; 3.0 were free."
    whole = sweep_of([1]) | reply
    assert sweeps.gaps(whole) == []
    sweeps.keep(tmp_path, whole, MACHINE)
    sweeps.write_pages(tmp_path / "scaling")
    assert reply["cut"] in (tmp_path / "scaling" / "index.md").read_text()


def test_pages(tmp_path):
    sweeps.keep(tmp_path, sweep_of([5, 1, 1]), MACHINE)
    sweeps.write_pages(tmp_path / "scaling")
    assert (tmp_path / "scaling" / "toy_tokens.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "scaling" / "index.md").read_text()
    assert "rlkern: linear within 25% for tokens from 2 to 4" in page
    rows = [[cell.strip() for cell in line.split("|")] for line in page.splitlines()]
    # Point 4 moves 4 KiB in 4 s: 1024 bytes a second, of 4 that reading gets.
    assert [row[3:7] for row in rows if row[1:2] == ["4"]] == [
        ["4000", "1.00e+09", "256.00", "0.0e+00"]
    ]
    sweeps.write_pages(tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("operator", list(sweep_worker.SWEEPS))
def test_points_are_right_and_judged(operator):
    _, build = next(iter(sweep_worker.SWEEPS[operator].values()))
    # More than the block that larger batches repeat, and no multiple of it.
    point = build(64 if operator == "gae" else 2 * sweep_worker.BLOCK)
    measured = sweep_worker.run(1, point, 0.0)
    assert not measured["wrong"] and len(measured["seconds"]) == 2
    (ours,) = (name for name in point.calls if name.startswith("rlkern"))

    def spoilt():
        call = point.calls[ours]()

        def run():
            out = call()
            first = out[1] if isinstance(out, tuple) and operator != "gae" else out
            first = first[0] if isinstance(first, tuple) else first
            first.view(-1)[-1].add_(1e3)
            return out

        return run

    wrong = sweep_worker.Point({ours: spoilt}, *list(vars(point).values())[1:])
    assert "error" in sweep_worker.run(1, wrong, 0.0)["wrong"][ours]

"""The harness itself: turns, medians, wrong results, failing peers, memory, floors, report."""

import json
import re
import time

import pytest
import torch
from toy_bench import TEMPORARY_BYTES, Toy
from toy_broken import Breaking, FailsLater, Unjudged

from benchmarks import ceilings, machine, tables, worker
from benchmarks import measure as measuring
from benchmarks.case import Contestant, Floor, MemoryLimit, Plan
from benchmarks.measure import ChildError, judge, measure, passes, process_medians, times_as_fast
from benchmarks.memory import peak_extra_bytes

OURS = "double/rlkern in place"
MACHINE = {
    "cpu": "a CPU", "cores": 2, "system": "Linux", "megahertz": 1000.0, "compiler": "c++",
    "instruction_set": "avx2", "torch_instruction_set": "AVX2", "versions": {"torch": "2.13"},
    "date": "2026-01-01 00:00 UTC", "commit": "0123456789ab", "caches": {"L2": 1 << 20},
}  # fmt: skip


@pytest.fixture(scope="module")
def summary():
    return measure(Toy, {"size": 1 << 16}, Plan(processes=2, rounds=3))


def entry_of(*seconds):
    return {"status": "ok", "seconds": list(seconds)}


def test_contestants_take_turns_after_restoring():
    log = []

    def ready(name):
        log.append(f"restore {name}")
        return lambda: log.append(f"run {name}")

    def clock(call):
        call()
        return float(len(log)), 0

    contestants = {name: (lambda name=name: ready(name)) for name in "AB"}

    def evict(call):
        log.append("evict")

    samples, _ = worker.alternate(contestants, Plan(1, rounds=2), before=evict, clock=clock)
    turn = ["restore A", "evict", "run A", "restore B", "evict", "run B"]
    assert log == turn * 3
    assert samples == {"A": [(9.0, 0), (15.0, 0)], "B": [(12.0, 0), (18.0, 0)]}


def test_who_is_slow_gets_fewer_rounds_and_still_the_least():
    def ready(seconds):
        return lambda: lambda: time.sleep(seconds)

    plan = Plan(1, rounds=9, seconds=0.05, least=3)
    samples, _ = worker.alternate({"slow": ready(0.02), "fast": ready(0)}, plan)
    assert len(samples["slow"]) == 3 and len(samples["fast"]) == 9


def test_who_fails_later_is_out_and_the_others_go_on():
    announced = []
    contestants = {"luckless": lambda: lambda: later(1), "fast": lambda: lambda: None}
    later = FailsLater()
    later.calls = 1  # the call that was compared
    plan = Plan(1, rounds=5)
    samples, failed = worker.alternate(contestants, plan, announce=announced.append)
    assert set(samples) == {"fast"} and len(samples["fast"]) == 5
    why = "RuntimeError: out of luck in call 4"
    assert failed == {"luckless": {"status": "failed at call 4", "reason": why}}
    assert announced == [*["luckless", "fast"] * 3, *["fast"] * 3, ""]


def test_turns_go_backwards_in_every_other_process(monkeypatch):
    requests, order = [], []

    run_child = measuring.run_child

    def child(module, request):
        requests.append(request)
        return run_child(module, request)

    monkeypatch.setattr(measuring, "run_child", child)
    monkeypatch.setattr(measuring, "BUSY_SECONDS", 0.0)
    measure(Toy, {"size": 64}, Plan(processes=2, rounds=1))
    assert [request["backwards"] for request in requests] == [False, True]

    class Logged(Toy):
        contestants = tuple(
            Contestant("double", name, lambda name=name: lambda x: (order.append(name), 2 * x)[1])
            for name in "AB"
        )

    worker.work(Logged(size=64), Plan(1, rounds=1), backwards=True)
    # Compared in the order of their definition; warmed up and timed backwards; weighed.
    assert order == [*"AB", *"BA", *"BA", *"BA"]


def test_warm_calls_follow_two_others():
    calls = {"cold": 0, "warm": 0}

    class Counted(Toy):
        contestants = (Contestant("double", "right", lambda: lambda x: counted(x)),)

    def counted(x):
        calls[case.cache] += 1
        return 2 * x

    for cache in calls:
        case = Counted(size=64)
        case.cache = cache
        worker.work(case, Plan(1, rounds=3))
    # Compared once, weighed by the probe as often in both; the rest are the turns.
    assert calls["warm"] - calls["cold"] == 2 * 4


def test_clock_measures_the_call_alone():
    seconds, faults = worker.timed(lambda: torch.ones(16 << 20))
    assert 0 < seconds < 10
    # 64 MiB of fresh pages, whether of 4 KiB or larger.
    assert faults >= 16


def test_medians_are_taken_per_process_first():
    reports = [
        {"entries": {"t/a": entry_of(1, 2, 90)}},
        {"entries": {"t/a": entry_of(3, 4, 5)}},
        {"entries": {"t/a": entry_of(80, 6, 7)}},
    ]
    # The median of all samples would be 5.
    assert process_medians(reports)["t/a"] == [2, 4, 7]
    assert times_as_fast({"t/a": [2, 4, 7]}, "t/a", ["t/a"])["median"] == 1


def test_ceiling_is_the_fastest_candidate_of_each_process():
    reports = [
        {"entries": {"ceiling/read/one": entry_of(1), "ceiling/read/two": entry_of(2)}},
        {"entries": {"ceiling/read/one": entry_of(4), "ceiling/read/two": entry_of(3)}},
    ]
    assert process_medians(reports) == {"read": [1, 3]}


@pytest.mark.parametrize("shape", [(4, 6), (8, 5), (4, 1003), (16,)])
def test_ceilings_move_every_byte_whatever_the_rows(shape):
    bulk = torch.ones(shape, dtype=torch.bfloat16)
    words = bulk.view(-1).view(torch.float32).double().sum()
    for name, call in ceilings.candidates(bulk).items():
        if "read" in name and "int64" not in name:
            assert call().double().sum() == pytest.approx(words.item(), rel=1e-6)
        else:
            call()


def test_two_passes_over_the_same_bytes_are_one_ceiling_when_cold():
    case = Toy(size=64)
    assert case.pairs() == ["read then scale"]
    case.cache = "warm"
    assert case.pairs() == []
    case.cache, case.bounds = "cold", {"a": ("copy", "read"), "b": ("read", "read", "copy")}
    assert case.pairs() == []


def test_a_pair_of_ceilings_makes_both_passes():
    bulk = torch.arange(8.0)
    calls = ceilings.candidates(bulk, ["read then scale"])
    names = [name for name in calls if name.startswith("ceiling/read then scale/")]
    assert len(names) == 3 * 2
    total, scaled = calls["ceiling/read then scale/sum, neg_"]()
    assert total == 28 and torch.equal(scaled, -torch.arange(8.0))
    assert scaled.data_ptr() == bulk.data_ptr()


def test_a_pair_takes_the_place_of_the_added_ceilings(summary):
    medians = {"read": [1.0], "scale": [2.0], "read then scale": [2.5], "t/a": [5.0]}
    assert passes(("read", "scale"), medians) == ["read then scale"]
    assert passes(("read", "copy"), medians) == ["read", "copy"]
    told = judge(Floor("t/a", ("read", "scale"), 0.5), medians, {"t/a": {}})
    assert (told["text"], told["value"], told["met"]) == ("0.5 of read then scale", "0.50", True)
    assert summary["bounds"] == {"double": ["read then scale"]}
    for name in ("right", "rlkern in place"):
        entry = summary["entries"][f"double/{name}"]
        middle = summary["ceilings"]["read then scale"]["median"] / entry["seconds"]["median"]
        assert entry["of_ceiling"]["low"] * 0.5 < middle < entry["of_ceiling"]["high"] * 2


def test_no_share_of_ceilings_that_are_the_price_of_a_call():
    entry = {"task": "t", "of_ceiling": {"median": 0.5, "low": 0.5, "high": 0.5}}
    case = {"bytes": 999_999, "bounds": {"t": ["read"]}}
    assert tables.share_of_floor(case, entry) is None
    assert tables.share_of_floor(case | {"bytes": 1_000_000}, entry) == entry["of_ceiling"]
    # Products are not the price of a call.
    products = case | {"bounds": {"t": ["t/three products"]}}
    assert tables.share_of_floor(products, entry) == entry["of_ceiling"]


def test_ratios_are_taken_inside_each_process():
    medians = {"read": [1, 10], "scale": [3, 30], "t/a": [2, 20]}
    assert times_as_fast(medians, "t/a", ["read", "scale"]) == {"median": 2, "low": 2, "high": 2}
    assert times_as_fast(medians, "t/a", ["absent"]) is None


def test_floors_are_met_missed_or_not_measured():
    medians = {"read": [1.0], "t/a": [2.0], "t/peer": [8.0]}
    entries = {"t/a": {"extra_share": 0.02}, "t/peer": {}}

    def met(floor):
        return judge(floor, medians, entries)["met"]

    assert met(Floor("t/a", ("read",), 0.5)) is True
    assert met(Floor("t/a", ("read",), 0.51)) is False
    assert met(Floor("t/a", ("t/peer",), 4)) is True
    assert met(Floor("t/a", ("t/absent",), 4)) is None
    assert met(MemoryLimit("t/a", 0.01)) is False
    assert met(MemoryLimit("t/peer", 0.01)) is None


def test_a_wrong_result_gets_no_speed(summary):
    for name in ("wrong", "nan"):
        entry = summary["entries"][f"double/{name}"]
        assert entry["status"] == "wrong"
        assert "error double" in entry["reason"]
        assert "seconds" not in entry and "samples" not in entry
        assert summary["entries"][OURS]["peers"][name] is None


def test_a_failing_peer_is_skipped_by_name_and_reason(summary):
    missing, raising = (summary["entries"][f"double/{name}"] for name in ("missing", "raising"))
    assert (missing["status"], raising["status"]) == ("skipped", "skipped")
    assert missing["reason"] == "ModuleNotFoundError: No module named 'no_such_peer'"
    assert raising["reason"] == "RuntimeError: cannot serve this call"


def test_every_process_gives_every_right_contestant_its_samples(summary):
    for name in ("rlkern in place", "right", "greedy"):
        entry = summary["entries"][f"double/{name}"]
        assert entry["status"] == "ok"
        assert [len(samples) for samples in entry["samples"]] == [3, 3]
        assert entry["seconds"]["low"] <= entry["seconds"]["median"] <= entry["seconds"]["high"]
    assert set(summary["ceilings"]) == {"read", "copy", "scale", "read then scale"}


def test_a_process_that_dies_is_an_error():
    with pytest.raises(ChildError, match="unexpected keyword argument"):
        measure(Toy, {"no_such_parameter": 1}, Plan(1, 1))


def test_who_ends_a_process_or_fails_later_costs_nobody_else_anything():
    said = []
    summary = measure(Breaking, {"size": 64}, Plan(processes=2, rounds=3), said.append)
    entries = summary["entries"]
    dies = entries["double/dies"]
    assert (dies["status"], dies["reason"]) == ("crashed", "its process was ended by SIGSEGV")
    assert "double/dies: its process was ended by SIGSEGV; again without it" in said
    later = entries["double/fails later"]
    assert later["status"] == "failed at call 4" and "seconds" not in later
    for name in ("rlkern in place", "right"):
        entry = entries[f"double/{name}"]
        assert entry["status"] == "ok" and [len(one) for one in entry["samples"]] == [3, 3]
    page = tables.render([summary | {"machine": MACHINE}])
    assert "failed at call 4: RuntimeError: out of luck in call 4" in page
    assert "crashed: its process was ended by SIGSEGV" in page


def test_a_judge_that_fails_is_an_error_and_nobody_is_blamed():
    with pytest.raises(ChildError, match="the judge is broken") as caught:
        measure(Unjudged, {"size": 64}, Plan(1, 1))
    assert caught.value.running == ""


def test_a_process_that_hangs_is_ended_and_names_whom_it_ran(tmp_path, monkeypatch):
    (tmp_path / "hanging_child.py").write_text(
        "import pathlib, sys, time\n"
        "pathlib.Path(sys.argv[2]).with_name('announced').write_text('t/slow')\n"
        "time.sleep(600)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(measuring, "CHILD_SECONDS", 5.0)
    with pytest.raises(ChildError, match="took longer than 5 s") as caught:
        measuring.run_child("hanging_child", {})
    assert caught.value.running == "t/slow"


def test_memory_probe_sees_a_temporary(summary):
    """Also one that is freed before the call returns, and not what was there before."""
    standing = torch.ones(TEMPORARY_BYTES)
    extra = peak_extra_bytes(lambda: torch.ones(TEMPORARY_BYTES // 4).sum())
    assert TEMPORARY_BYTES * 0.95 < extra < TEMPORARY_BYTES * 1.2
    assert peak_extra_bytes(standing.sum) < TEMPORARY_BYTES * 0.1
    entry = summary["entries"]["double/greedy"]
    assert TEMPORARY_BYTES * 0.95 < entry["extra_bytes"] < TEMPORARY_BYTES * 1.2


def test_report_names_what_is_wrong_and_what_was_missed(summary):
    lines = tables.render([summary | {"machine": MACHINE}]).splitlines()

    def cells(start):
        return next(line for line in lines if line.startswith(f"| {start} ")).split("|")[1:-1]

    assert "of read then scale" in cells("double")[2]
    assert cells("wrong")[1].strip().startswith("wrong: error double 1.0e+00")
    assert cells("missing")[1].strip().startswith("skipped: ModuleNotFoundError")
    assert cells("right")[-1].strip() == "0.0e+00 (double)"
    floors = [line.split("|")[4].strip() for line in lines if line.startswith("| double/")]
    assert floors == ["yes", "NO", "not measured", "NO"]


def test_the_machine_is_described_without_paths():
    assert re.fullmatch(r"[a-z0-9-]+-\d+-cores", machine.name())
    assert all(size >= 1024 for size in machine.cache_bytes().values())
    described = machine.describe()
    assert described["name"] == machine.name() and described["versions"]["torch"]
    assert str(machine.ROOT) not in json.dumps(described)

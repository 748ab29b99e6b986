"""What is said of the machine: from the system's files, and nothing where these are silent."""

import platform
import re
import time

import pytest
from test_harness import MACHINE

from benchmarks import conftest, machine, tables


@pytest.fixture
def system(tmp_path, monkeypatch):
    """An empty /sys and /proc; returns what writes a file there."""
    monkeypatch.setattr(machine, "_SYSTEM", tmp_path / "sys")
    monkeypatch.setattr(machine, "_PROC", tmp_path / "proc")

    def write(file, text):
        path = tmp_path / file.removeprefix("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    return write


CLOCK = "/sys/devices/system/cpu/cpu0/cpufreq/"


def test_the_clock_is_the_nominal_one_or_none(system):
    assert machine.megahertz() is None
    system("/proc/cpuinfo", "flags : fpu sse\ncpu MHz : 1234.5\n")
    assert machine.megahertz() is None
    system("/proc/cpuinfo", "flags : fpu hypervisor\ncpu MHz : 1234.5\n")
    assert machine.megahertz() == 1234.5
    system(CLOCK + "cpuinfo_max_freq", "4000000\n")
    assert machine.megahertz() == 4000
    system(CLOCK + "base_frequency", "2500000\n")
    assert machine.megahertz() == 2500


def test_cycles_are_left_out_where_the_clock_is_unknown():
    entry = {
        "task": "t", "name": "rlkern", "status": "ok", "ns_per_element": 1.0, "page_faults": 0,
        "seconds": {"median": 1, "low": 1, "high": 1}, "of_ceiling": None, "peers": {},
        "errors": {"t": 0.0}, "rounds": 3,
    }  # fmt: skip
    case = {
        "operator": "t", "params": {}, "bytes": 8, "threads": 2, "processes": 1, "rounds": 3,
        "busy_before": [0.0], "ceilings": {}, "bounds": {"t": []}, "entries": {"t/rlkern": entry},
        "floors": [],
    }  # fmt: skip
    known, unknown = (
        tables.render([case | {"machine": MACHINE | {"megahertz": clock}}])
        for clock in (1000.0, None)
    )
    assert "| 1.00 ns, 2.00 cycles |" in known
    assert re.search(r"\| 1\.00 ns +\|", unknown)


def test_huge_pages_and_malloc(system):
    assert machine.huge_pages() == "unknown"
    system("/sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n")
    assert machine.huge_pages() == "madvise"
    system("/proc/self/maps", "7f00-7f01 r-xp 0 08:01 7 /usr/lib/libc.so.6\n")
    assert machine.allocator().startswith(platform.libc_ver()[0])
    system("/proc/self/maps", "7f00-7f01 r-xp 0 08:01 7 /usr/lib/libjemalloc.so.2\n")
    assert machine.allocator() == "jemalloc"
    told = MACHINE | {"huge_pages": "madvise", "allocator": "jemalloc"}
    assert "transparent huge pages madvise, malloc jemalloc" in tables.facts(told)[0]
    assert "huge" not in tables.facts(MACHINE)[0]


def test_the_busy_share_is_of_the_time_that_was_watched(system, monkeypatch):
    assert machine.busy_share(0) is None
    before = "cpu  1000 0 500 7000 100 0 0 0 300 0\ncpu0 0 0 0 0\n"
    system("/proc/stat", before)
    # Two processors for a second: 30 ticks of user time, 10 of another guest's, 160 idle.
    after = "cpu  1030 0 500 7150 110 0 0 10 330 0\ncpu0 0 0 0 0\n"
    monkeypatch.setattr(time, "sleep", lambda seconds: system("/proc/stat", after))
    assert machine.busy_share(1) == pytest.approx(40 / 200)
    assert machine.busy_share(1) is None, "no time has passed"


def test_a_busy_machine_is_named_and_older_results_are_read(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert conftest.is_busy([0.0, 0.2]) and conftest.is_busy([0.11])
    assert not conftest.is_busy([0.09, None])
    # One process of a machine's 64 is in the way of a call on all of them.
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    assert conftest.is_busy([1 / 64])
    assert tables.before({"busy_before": [0.01, None, 0.2]}) == "processors busy before 20%"
    assert tables.before({"busy_before": [None]}) == "not known how busy before"
    assert tables.before({"load_before": 1.26}) == "machine's load before 1.3"

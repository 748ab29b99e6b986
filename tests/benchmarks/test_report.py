"""What is made of results: files that survive, pages, the README's table, comparisons."""

import copy
import json
import subprocess

import pytest
from test_harness import MACHINE
from toy_bench import Toy

from benchmarks import compare, linear_memory, machine, readme, report, store
from benchmarks.case import FULL, QUICK, SHORT, Plan
from benchmarks.machine import ROOT
from benchmarks.measure import measure

OURS = "double/rlkern in place"


@pytest.fixture(scope="module")
def summary():
    return measure(Toy, {"size": 1 << 16}, Plan(processes=2, rounds=3))


@pytest.fixture
def case(summary):
    """With times that do not hang on what else the machine does."""
    case = copy.deepcopy(summary) | {"machine": MACHINE}
    for key in (OURS, "double/right"):
        case["entries"][key] |= {"seconds": spread(1e-3, 1.1e-3), "of_ceiling": spread(0.5, 0.55)}
    return case


def slower(case, factor, key=OURS):
    """The same case, measured again, all samples of one so many times as long."""
    new = copy.deepcopy(case)
    entry = new["entries"][key]
    entry["seconds"] = {name: factor * value for name, value in entry["seconds"].items()}
    entry["samples"] = [[factor * x for x in samples] for samples in entry["samples"]]
    entry["of_ceiling"] = {name: value / factor for name, value in entry["of_ceiling"].items()}
    return new


def spread(low, high=None):
    return {"median": (low + (high or low)) / 2, "low": low, "high": high or low}


def compared(old, new, old_ceiling=1.0, new_ceiling=1.0, bounds=("read", "read")):
    """The verdict on two times with these ranges, on machines whose ceilings took so long."""
    pairs = []
    for time, ceiling, bound in zip((old, new), (old_ceiling, new_ceiling), bounds, strict=True):
        share = {"median": ceiling / time["median"], "low": ceiling / time["high"]}
        share |= {"high": ceiling / time["low"]}
        entry = {"task": "t", "name": "rlkern", "status": "ok", "samples": [[1], [1]]}
        entry |= {"seconds": time, "of_ceiling": share}
        pairs.append((entry, {"bounds": {"t": [bound]}, "ceilings": {"read": spread(ceiling)},
                              "date": len(pairs)}))  # fmt: skip
    (was, before), (now, after) = pairs
    return compare.verdict(was, now, before, after)


class TestStore:
    def test_a_case_takes_the_place_of_its_older_measurement(self, summary, tmp_path):
        store.keep(tmp_path, summary, MACHINE)
        other = summary | {"params": {"size": 7}}
        store.keep(tmp_path, other, MACHINE)
        store.keep(tmp_path, summary, MACHINE | {"date": "2026-02-02 00:00 UTC"})
        kept = store.read_all(tmp_path)
        dates = {case["params"]["size"]: case["machine"]["date"][:7] for case in kept}
        assert dates == {1 << 16: "2026-02", 7: "2026-01"}
        assert [file.name for file in tmp_path.iterdir()] == ["double.json"]

    def test_cases_of_an_older_definition_go(self, summary, tmp_path):
        store.keep(tmp_path, summary, MACHINE)
        new = summary | {"params": {"size": 1 << 16, "cache": "warm"}}
        store.keep(tmp_path, new, MACHINE)
        assert [case["params"] for case in store.read_all(tmp_path)] == [new["params"]]

    def test_a_file_that_names_its_machine_once_is_read(self, summary, tmp_path):
        file = tmp_path / "old.json"
        file.write_text(json.dumps({"machine": MACHINE, "cases": [summary]}))
        assert store.read(file)[0]["machine"] == MACHINE

    def test_an_empty_folder_is_named(self, tmp_path):
        with pytest.raises(ValueError, match="a file of results or a folder of them, got"):
            store.read_all(tmp_path)

    def test_time_taken_is_added_by_benchmark_file(self, summary, tmp_path):
        store.keep(tmp_path, summary | {"took_seconds": 3.0}, MACHINE)
        store.keep(tmp_path, summary | {"took_seconds": 4.0, "params": {"size": 7}}, MACHINE)
        assert store.seconds_by_module(tmp_path) == {"toy_bench": 7.0}
        assert store.seconds_by_module(tmp_path / "none") == {}

    def test_what_memory_by_tokens_took_is_counted(self, tmp_path):
        store.write(tmp_path / "memory" / "toy.json", json.dumps({"took_seconds": 2.5}))
        assert store.seconds_by_module(tmp_path) == {"bench_toy": 2.5}


class TestCompare:
    def test_the_same_results_are_within_noise(self, case):
        again = case | {"machine": MACHINE | {"date": "2026-02-02 00:00 UTC"}}
        text, worse = compare.report([case], [again])
        assert not worse and "Nothing of rlkern's is worse beyond noise." in text
        assert "| within noise" in text and "| not measured again" not in text

    def test_what_was_not_measured_again_says_so(self, case):
        text, worse = compare.report([case], [copy.deepcopy(case)])
        assert not worse and "| within noise" not in text
        assert text.count("| not measured again") == len(case["entries"])

    def test_both_heads_are_printed(self, case):
        new = slower(case, 1) | {
            "machine": MACHINE
            | {"date": "2026-02-02 00:00 UTC", "commit": "ba98", "versions": {"torch": "2.14"}}
        }
        older = case | {
            "params": {"size": 7},
            "machine": MACHINE | {"date": "2025-12-31 00:00 UTC"},
        }
        text, _ = compare.report([case, older], [new])
        assert text.splitlines()[:2] == [
            "Old: 2025-12-31 00:00 UTC to 2026-01-01 00:00 UTC, commit 0123456789ab, torch 2.13.",
            "New: 2026-02-02 00:00 UTC, commit ba98, torch 2.14.",
        ]

    def test_ours_or_a_whole_case_gone_is_worse(self, case):
        new = copy.deepcopy(case)
        del new["entries"][OURS]
        text, worse = compare.report([case], [new])
        assert worse and f"- double, 65536, {OURS}: gone" in text
        other = case | {"params": {"size": 7}}
        text, worse = compare.report([case, other], [case])
        assert worse and "- double, 7: gone" in text
        for entry in other["entries"].values():
            entry["name"] = entry["name"].removeprefix("rlkern ")
        text, worse = compare.report([case, other], [case])
        assert not worse, "a case with nothing of ours in it may go"

    def test_ceilings_and_machines_that_one_set_lacks_are_no_error(self, case):
        new = copy.deepcopy(case) | {"machine": None}
        new["ceilings"]["read then copy"] = new["ceilings"].pop("copy")
        text, worse = compare.report([case], [new])
        assert not worse and "Not the same machine" in text

    @pytest.mark.parametrize("change", [None, 2 << 20, 1 << 10, "gone"])
    def test_memory_by_tokens(self, change):
        def files(extra, eager):
            point = {"tokens": 8, "width": 2, "vocab": 4, "extra": {"Liger, trained head": eager}}
            if extra is not None:
                point["extra"]["from_hidden, trained head"] = extra
            return {"linear": {"machine": MACHINE, "points": [point]}}

        old = files(5 << 20, 1 << 30)
        if change is None:
            assert compare.memory({}, old) == ([], False)
            lines, worse = compare.memory(old, old)
            assert not worse and "not measured again" in lines[-1]
            assert compare.memory(old, {})[1]
            return
        # What a peer takes is no regression of ours.
        new = files(None if change == "gone" else (5 << 20) + change, 2 << 30)
        lines, worse = compare.memory(old, new)
        assert worse == (change != 1 << 10) and any(
            "Liger" in line and "larger" in line for line in lines
        )

    def test_slower_beyond_noise_is_named(self, case):
        text, worse = compare.report([case], [slower(case, 1000)])
        assert worse
        (line,) = (line for line in text.splitlines() if line.startswith("- "))
        assert line == f"- double, 65536, {OURS}: slower, 1000.00 times the old time"

    def test_faster_is_not_worse(self, case):
        old = slower(case, 1000)
        text, worse = compare.report([old], [case])
        assert not worse and "faster" in text

    def test_overlapping_ranges_are_noise_whatever_the_medians(self):
        assert compared(spread(0.9, 1.5), spread(1.4, 1.6)) == "within noise"
        assert compared(spread(0.9, 1.5), spread(1.51, 1.6)) == "slower"

    def test_a_small_difference_is_noise_whatever_the_ranges(self):
        assert compared(spread(1.0), spread(1.04)) == "within noise"
        assert compared(spread(1.0), spread(1.06)) == "slower"

    @pytest.mark.parametrize("bounds", [("read", "read"), ("read", "read then copy")])
    def test_a_slower_machine_makes_nobody_slower(self, bounds):
        """By the share of its floor, or by the common ceilings where the floor is another."""
        assert compared(spread(1.0), spread(2.0), 1.0, 2.0, bounds) == "within noise"
        assert compared(spread(2.0), spread(1.0), 2.0, 1.0, bounds) == "within noise"
        assert compared(spread(1.0), spread(2.0), 1.0, 1.1, bounds) == "slower"
        # As slow as before on a machine that got faster: not proven by the time alone.
        assert compared(spread(1.0), spread(1.0), 2.0, 1.0, bounds) == "within noise"

    def test_one_process_has_the_range_of_its_samples(self):
        entry = {"samples": [[1.0, 3.0, 2.0]], "seconds": {"median": 2, "low": 2, "high": 2}}
        assert compare.spread(entry) == {"median": 2, "low": 1.0, "high": 3.0}

    def test_a_peer_that_got_slower_is_no_regression(self, case):
        new = slower(case, 1000, "double/right")
        text, worse = compare.report([case], [new])
        assert not worse and "slower" in text

    def test_what_is_in_one_of_both_is_named(self, case):
        new = copy.deepcopy(case) | {"machine": MACHINE | {"instruction_set": "avx512"}}
        new["entries"]["double/other"] = new["entries"].pop("double/right") | {"name": "other"}
        text, worse = compare.report([case], [new, case | {"params": {"size": 7}}])
        assert not worse and "Only in the new results: double, 7." in text
        assert "Not the same machine: a CPU, 2 cores, avx2; " in text
        rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
        assert {row[3]: row[-2] for row in rows if row[-2:-1] in (["gone"], ["new"])} == {
            "right": "gone", "other": "new",
        }  # fmt: skip

    @pytest.mark.parametrize("status", ["wrong", "skipped"])
    def test_what_no_longer_has_a_speed_is_worse(self, case, status):
        new = copy.deepcopy(case)
        entry = new["entries"][OURS]
        new["entries"][OURS] = {key: entry[key] for key in ("task", "name", "peers")}
        new["entries"][OURS] |= {"status": status, "reason": "why"}
        text, worse = compare.report([case], [new])
        assert worse and f"was ok, now {status}" in text

    def test_more_memory_is_worse(self, case):
        new = copy.deepcopy(case)
        new["entries"][OURS]["extra_bytes"] += 2 << 20
        text, worse = compare.report([case], [new])
        assert worse and "larger" in text

    def test_the_command_ends_with_what_it_found(self, case, tmp_path, capsys):
        files = tmp_path / "old.json", tmp_path / "new.json"
        for file, one in zip(files, (case, slower(case, 1000)), strict=True):
            file.write_text(json.dumps({"cases": [one]}))
        assert report.main(["--compare", *map(str, files)]) == 1
        assert report.main(["--compare", str(files[0]), str(files[0])]) == 0
        assert "Worse beyond noise" in capsys.readouterr().out
        with pytest.raises(SystemExit):
            report.main(["--compare", str(tmp_path / "none.json"), str(files[0])])


class TestPages:
    def test_a_folder_gets_pages_plots_and_an_index(self, summary, tmp_path):
        store.keep(tmp_path, summary, MACHINE)
        report.write_folder(tmp_path)
        assert (tmp_path / "double.png").read_bytes().startswith(b"\x89PNG")
        page = (tmp_path / "double.md").read_text()
        assert "![Times of double](double.png)" in page and "| rlkern in place" in page
        index = (tmp_path / "index.md").read_text()
        assert "[double](double.md)" in index and MACHINE["commit"] in index
        assert "Promises: 1 kept, 2 not, 1 not measured" in index

    def test_what_stands_for_the_floor_is_no_peer(self, summary, tmp_path):
        bound = summary | {"bounds": {"double": ["double/right"]}}
        share = {"median": 0.8, "low": 0.8, "high": 0.8}
        bound["entries"] = copy.deepcopy(summary["entries"])
        bound["entries"][OURS] |= {"of_ceiling": share, "peers": {"right": share, "greedy": share}}
        store.keep(tmp_path, bound, MACHINE)
        report.write_folder(tmp_path)
        page, index = ((tmp_path / f"{name}.md").read_text() for name in ("double", "index"))
        assert "| of right" in page and "x right" not in page and "x greedy" in page
        assert "0.80 of right" in index and "0.800 (greedy)" in index and "(right)" not in index

    def test_the_index_names_the_commits_where_they_differ(self, summary, tmp_path):
        store.keep(tmp_path, summary, MACHINE)
        store.keep(tmp_path, summary | {"operator": "other"}, MACHINE | {"commit": "feed"})
        report.write_folder(tmp_path)
        index = (tmp_path / "index.md").read_text()
        assert "[double](double.md) (commit 0123456789ab), [other](other.md) (commit feed)" in index

    def test_memory_by_tokens_has_a_page_from_its_figures(self, summary, tmp_path):
        extra = {"from_hidden, trained head": 3 << 20}
        point = {"tokens": 512, "width": 8, "vocab": 64, "logits": 1 << 20, "extra": extra}
        others = {*linear_memory.OURS, *linear_memory.PEERS} - extra.keys()
        point |= {"beyond": {name: 1 << 20 for name in extra}}
        point |= {"left_out": dict.fromkeys(others, "no module")}
        kept = {"machine": MACHINE, "points": [point], "took_seconds": 1.0}
        store.write(tmp_path / "memory" / "linear.json", json.dumps(kept))
        store.keep(tmp_path, summary, MACHINE)
        report.write_folder(tmp_path)
        page = (tmp_path / "memory" / "linear.md").read_text()
        assert "D = 8, V = 64" in page and "3 (1)" in page and MACHINE["commit"] in page
        assert page.count("no module") == len(others)
        assert "[memory](memory/linear.md)" in (tmp_path / "index.md").read_text()

    def test_every_kept_file_has_its_page_and_each_machine_its_index(self):
        for folder in (path for path in store.RESULTS.iterdir() if path.is_dir()):
            index = (folder / "index.md").read_text()
            for file in folder.glob("*.json"):
                assert f"[{file.stem}]({file.stem}.md)" in index
                assert file.with_suffix(".md").exists() and file.with_suffix(".png").exists()
            if (folder / "memory" / "linear.json").exists():
                assert "(memory/linear.md)" in index
                assert (folder / "memory" / "linear.md").exists()


class TestReadme:
    def test_the_fullest_machine_is_chosen_and_figures_are_its_own(self, summary, tmp_path):
        names = {"double/rlkern in place": "forward/rlkern", "double/right": "forward/eager"}
        entries = {}
        for old, new in names.items():
            entry = copy.deepcopy(summary["entries"][old]) | {"task": "forward"}
            entries[new] = entry | {"name": new.split("/")[1]}
        entries["forward/rlkern"]["peers"] = {"eager": {"median": 112.345, "low": 1, "high": 20}}
        entries["forward/rlkern"]["seconds"]["median"] = 0.0123456
        case = summary | {"operator": "token_logprobs", "entries": entries}
        case |= {"params": {"rows": 4, "tokens": 128, "vocab": 151936, "dtype": "float32"}}
        case |= {"bounds": {"forward": ["read"]}, "bytes": 4 << 20}
        entries["forward/rlkern"]["extra_bytes"] = 5.55 * 2**20
        entries["forward/eager"]["extra_bytes"] = 55.5 * 2**20
        store.keep(tmp_path / "full", case, MACHINE | {"cpu": "the full one"})
        other = case | {"operator": "unknown"}
        store.keep(tmp_path / "newer", other, MACHINE | {"date": "2027-01-01 00:00 UTC"})
        text = readme.figures(tmp_path)
        where = "`benchmarks/results/full`"
        assert text.startswith(
            f"the full one, 2 cores (avx2), 2026-01-01 00:00 UTC, commit 0123456789ab: {where}."
        )
        (row,) = (line for line in text.splitlines() if line.startswith("| `token_logprobs`, fp32"))
        cells = [cell.strip() for cell in row.split("|")[1:-1]]
        assert cells[1:3] == ["4 x 128 x 151936", "12.3"] and cells[4] == "112"
        assert cells[6] == "5.5 (56)"
        bf16 = case | {"params": case["params"] | {"dtype": "bfloat16"}}
        later = MACHINE | {"date": "2026-01-02 00:00 UTC", "commit": "feed", "cpu": "the full one"}
        store.keep(tmp_path / "full", bf16, later)
        assert ", commits 0123456789ab to feed: " in readme.figures(tmp_path)

    def test_nothing_is_said_where_nothing_was_measured(self, tmp_path):
        assert readme.figures(tmp_path) == "Nothing has been measured yet."


@pytest.mark.parametrize("options, code", [("", 0), ("", 3), ("--quick", 0), ("--quick", 3)])
def test_make_bench_measures_and_writes(tmp_path, options, code):
    """Pages where a test failed too, none after a smoke test, and pytest's own exit code."""
    log, folder = tmp_path / "log", tmp_path / "bin"
    folder.mkdir()
    for name, ending in (("pytest", code), ("python", 0)):
        script = folder / name
        script.write_text(f'#!/bin/sh\necho {name} "$@" >> {log}\nexit {ending}\n')
        script.chmod(0o755)
    for stamp in (".torch", ".loops", ".test"):
        (tmp_path / stamp).touch()
    run = subprocess.run(
        ["make", "--no-print-directory", f"VENV={tmp_path}", "bench", f"ARGS={options}"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert (run.returncode != 0) == (code != 0), run.stdout + run.stderr
    assert f"Error {code}" in run.stderr or code == 0
    expected = [f"pytest benchmarks --results machine {options}".strip()]
    if not options:
        expected.append("python -m benchmarks.report")
    assert log.read_text().splitlines() == expected


def test_the_documentation_says_the_plans_and_the_durations_once():
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    for name, plan in (("`FULL`", FULL), ("`SHORT`", SHORT), ("`--quick`", QUICK)):
        (row,) = (line for line in text.splitlines() if line.startswith("|") and name in line)
        figures = [float(cell) for cell in row.split("|")[2:-1]]
        assert figures == [plan.processes, plan.rounds, plan.seconds, plan.least]
    for file in ("docs/benchmarks.md", "README.md", "Makefile"):
        words = " ".join((ROOT / file).read_text().replace("\n# ", " ").split()).lower()
        assert "about half an hour alone on two cores" in words, file
        assert "under five minutes" in words, file


def test_the_versions_of_all_peers_are_recorded():
    """Pinned in benchmarks/peers.txt are the peers, and one of what they import."""
    lines = (ROOT / "benchmarks" / "peers.txt").read_text().splitlines()
    pinned = {line.split("==")[0] for line in lines if "==" in line} - {"antlr4-python3-runtime"}
    assert pinned and pinned <= set(machine.PACKAGES)

"""What is made of results: files that survive, pages, the README's table, comparisons."""

import copy
import json
import subprocess

import pytest
from test_harness import MACHINE
from toy_bench import Toy

from benchmarks import compare, readme, report, store
from benchmarks.case import Plan
from benchmarks.machine import ROOT
from benchmarks.measure import measure

OURS = "double/rlkern in place"


@pytest.fixture(scope="module")
def summary():
    return measure(Toy, {"size": 1 << 16}, Plan(processes=2, rounds=3))


@pytest.fixture
def case(summary):
    return copy.deepcopy(summary) | {"machine": MACHINE}


def slower(case, factor):
    """The same case, measured again, all of our samples so many times as long."""
    new = copy.deepcopy(case)
    entry = new["entries"][OURS]
    entry["seconds"] = {name: factor * value for name, value in entry["seconds"].items()}
    entry["samples"] = [[factor * x for x in samples] for samples in entry["samples"]]
    return new


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


class TestCompare:
    def test_the_same_results_are_within_noise(self, case):
        text, worse = compare.report([case], [case])
        assert not worse and "Nothing of rlkern's is worse beyond noise." in text

    def test_slower_beyond_noise_is_named(self, case):
        text, worse = compare.report([case], [slower(case, 1000)])
        assert worse
        (line,) = (line for line in text.splitlines() if line.startswith("- "))
        assert line == f"- double, 65536, {OURS}: slower, 1000.00 times the old time"

    def test_faster_is_not_worse(self, case):
        old = slower(case, 1000)
        text, worse = compare.report([old], [case])
        assert not worse and "faster" in text

    def test_overlapping_ranges_are_noise_whatever_the_medians(self, case):
        entry = {"status": "ok", "samples": [[1], [1]]}
        old = entry | {"seconds": {"median": 1.0, "low": 0.9, "high": 1.5}}
        new = entry | {"seconds": {"median": 1.4, "low": 1.4, "high": 1.6}}
        assert compare.verdict(old, new) == "within noise"
        new["seconds"]["low"] = 1.51
        assert (
            compare.verdict(old, new | {"seconds": new["seconds"] | {"median": 1.55}}) == "slower"
        )

    def test_a_small_difference_is_noise_whatever_the_ranges(self):
        entry = {"status": "ok", "samples": [[1], [1]]}
        old = entry | {"seconds": {"median": 1.0, "low": 1.0, "high": 1.0}}
        new = entry | {"seconds": {"median": 1.04, "low": 1.04, "high": 1.04}}
        assert compare.verdict(old, new) == "within noise"

    def test_one_process_has_the_range_of_its_samples(self):
        entry = {"samples": [[1.0, 3.0, 2.0]], "seconds": {"median": 2, "low": 2, "high": 2}}
        assert compare.spread(entry) == (1.0, 3.0)

    def test_a_peer_that_got_slower_is_no_regression(self, case):
        new = copy.deepcopy(case)
        entry = new["entries"]["double/right"]
        entry["seconds"] = {name: 1000 * value for name, value in entry["seconds"].items()}
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

    def test_every_kept_file_has_its_page_and_each_machine_its_index(self):
        for folder in (path for path in store.RESULTS.iterdir() if path.is_dir()):
            index = (folder / "index.md").read_text()
            for file in folder.glob("*.json"):
                assert f"[{file.stem}]({file.stem}.md)" in index
                assert file.with_suffix(".md").exists() and file.with_suffix(".png").exists()


class TestReadme:
    def test_the_fullest_machine_is_chosen_and_figures_are_its_own(self, summary, tmp_path):
        names = {"double/rlkern in place": "forward/rlkern", "double/right": "forward/eager"}
        entries = {}
        for old, new in names.items():
            entry = copy.deepcopy(summary["entries"][old]) | {"task": "forward"}
            entries[new] = entry | {"name": new.split("/")[1]}
        entries["forward/rlkern"]["peers"] = {"eager": {"median": 12.345, "low": 1, "high": 20}}
        entries["forward/rlkern"]["seconds"]["median"] = 0.0123456
        case = summary | {"operator": "token_logprobs", "entries": entries}
        case |= {"params": {"rows": 4, "tokens": 128, "vocab": 151936, "dtype": "float32"}}
        case |= {"bounds": {"forward": ["read"]}}
        store.keep(tmp_path / "full", case, MACHINE | {"cpu": "the full one"})
        other = case | {"operator": "unknown"}
        store.keep(tmp_path / "newer", other, MACHINE | {"date": "2027-01-01 00:00 UTC"})
        text = readme.figures(tmp_path)
        assert text.startswith("the full one, 2 cores (avx2), 2026-01-01: ")
        (row,) = (line for line in text.splitlines() if line.startswith("| `token_logprobs`, fp32"))
        cells = [cell.strip() for cell in row.split("|")[1:-1]]
        assert cells[1:3] == ["4 x 128 x 151936", "12.3"] and cells[4] == "12"

    def test_nothing_is_said_where_nothing_was_measured(self, tmp_path):
        assert readme.figures(tmp_path) == "Nothing has been measured yet."


def test_make_bench_measures_and_writes():
    run = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", "--always-make", "bench", "ARGS=--quick"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    commands = [line.split("/")[-1] for line in run.stdout.splitlines()]
    assert commands[-2:] == [
        "pytest benchmarks --results machine --quick",
        "python -m benchmarks.report",
    ]

"""Checkpoints: bitwise back, and whole whatever happens to the disk or to the process."""

from __future__ import annotations

import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
from rlkern_loops import checkpoint
from rlkern_loops.errors import CheckpointError


def names(folder):
    return sorted(path.name for path in (Path(folder) / "checkpoints").iterdir())


def state_of(model, optimizer, **more):
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **more}


def test_a_run_goes_on_bitwise(tmp_path):
    def start():
        torch.manual_seed(0)
        model = torch.nn.Linear(7, 3)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def steps(model, optimizer, count):
        for _ in range(count):
            rows = torch.randn(5, 7) + random.random() + float(numpy.random.rand())
            optimizer.zero_grad()
            model(rows).square().sum().backward()
            optimizer.step()
        return model.weight.detach().clone()

    model, optimizer = start()
    steps(model, optimizer, 3)
    rng = checkpoint.rng_state()
    checkpoint.save(tmp_path, 3, state_of(model, optimizer, rng=rng, text="x", seen=(1, None)))
    expected = steps(model, optimizer, 3)

    model, optimizer = start()
    random.seed(9), numpy.random.seed(9), torch.manual_seed(9)
    step, state = checkpoint.resume(tmp_path, "auto")
    assert step == 3 and state["text"] == "x" and state["seen"] == (1, None)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    checkpoint.set_rng_state(state["rng"])
    assert torch.equal(steps(model, optimizer, 3), expected)


def test_the_newest_are_kept(tmp_path):
    assert checkpoint.latest(tmp_path) is None and checkpoint.resume(tmp_path, "auto") is None
    for step in (1, 2, 10):
        path = checkpoint.save(tmp_path, step, {"at": step})
        assert checkpoint.latest(tmp_path) == path
    assert names(tmp_path) == ["step-000002.pt", "step-000010.pt"]
    checkpoint.save(tmp_path, 1_000_000, {}, keep=1)
    assert names(tmp_path) == ["step-1000000.pt"]


def test_any_device_and_dtype_comes_back_on_the_cpu(tmp_path):
    state = {"x": torch.randn(3).bfloat16(), "y": torch.tensor([True]), 3: [torch.tensor(2)]}
    loaded = checkpoint.load(checkpoint.save(tmp_path, 1, state))
    assert torch.equal(loaded["x"], state["x"]) and loaded["y"].item() and loaded[3][0] == 2


def test_what_would_not_load_is_not_saved(tmp_path):
    for value in (numpy.float64(1), tmp_path, {1}, lambda: 0, numpy.zeros(2)):
        with pytest.raises(TypeError, match=r"state\['a'\]\[1\]: expected a tensor, .* got "):
            checkpoint.save(tmp_path, 1, {"a": [0, value]})
    assert checkpoint.latest(tmp_path) is None


# ---- broken files -------------------------------------------------------------------------------


def broken(path, how):
    data = bytearray(path.read_bytes())
    if how == "a flipped bit":
        data[len(data) // 2] ^= 1
    elif how == "other pickle":
        torch.save({"model": torch.zeros(2)}, path)
        return
    else:
        data = {"truncated": data[: len(data) // 2], "empty": b"", "text": b"hello"}[how]
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["truncated", "empty", "text", "a flipped bit", "other pickle"])
def test_a_broken_checkpoint_is_named_and_passed_over(tmp_path, capsys, how):
    checkpoint.save(tmp_path, 1, {"x": torch.ones(1000)})
    path = checkpoint.save(tmp_path, 2, {"x": torch.zeros(1000)})
    broken(path, how)
    with pytest.raises(CheckpointError, match=r"checkpoint .*step-000002\.pt: "):
        checkpoint.load(path)
    step, state = checkpoint.resume(tmp_path, "auto")
    said = capsys.readouterr().out
    assert re.match(r"warning: .*step-000002\.pt.* going on from the one before\n$", said)
    assert step == 1 and torch.equal(state["x"], torch.ones(1000))
    # Asked for by name, it is an error; and so it is where no other is left.
    with pytest.raises(CheckpointError, match=r"step-000002\.pt: "):
        checkpoint.resume(tmp_path, str(path))
    (tmp_path / "checkpoints" / "step-000001.pt").unlink()
    with pytest.raises(CheckpointError, match=r"step-000002\.pt: .* no older one is left"):
        checkpoint.resume(tmp_path, "auto")


def test_code_in_a_file_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    path = tmp_path / "step-000001.pt"
    torch.save({"format": "rlkern-1", "step": 1, "state": Trap()}, path)
    with pytest.raises(CheckpointError, match="truncated, or not a checkpoint"):
        checkpoint.load(path)
    assert not (tmp_path / "sprung").exists()


def test_resume_wants_auto_or_a_checkpoint(tmp_path):
    path = checkpoint.save(tmp_path, 7, {"a": 1})
    assert checkpoint.resume("elsewhere", str(path)) == (7, {"a": 1})
    with pytest.raises(CheckpointError, match="resume: expected 'auto' or the path .* got 'atuo'"):
        checkpoint.resume(tmp_path, "atuo")
    with pytest.raises(CheckpointError, match="step-000008.pt: no such file"):
        checkpoint.resume(tmp_path, str(path.with_name("step-000008.pt")))


def test_earlier_checkpoints_are_set_aside(tmp_path):
    assert checkpoint.set_aside(tmp_path) is None
    for step in (5, 6):
        checkpoint.save(tmp_path, step, {})
    assert checkpoint.set_aside(tmp_path) == tmp_path / "checkpoints.previous"
    assert checkpoint.latest(tmp_path) is None
    checkpoint.save(tmp_path, 1, {"new": 1})
    # What was set aside before stays, numbered.
    assert checkpoint.set_aside(tmp_path) == tmp_path / "checkpoints.previous-2"
    kept = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.glob("checkpoints.previous*/*"))
    assert kept == [
        "checkpoints.previous-2/step-000001.pt",
        "checkpoints.previous/step-000005.pt",
        "checkpoints.previous/step-000006.pt",
    ]
    (tmp_path / "checkpoints.previous-notes").mkdir()
    assert checkpoint.previous(tmp_path) == tmp_path / "checkpoints.previous-2"


# ---- the disk, and a kill -----------------------------------------------------------------------


def still_loads(folder):
    assert names(folder) == ["step-000001.pt"]
    assert checkpoint.resume(folder, "auto") == (1, {"small": 1})


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    checkpoint.save(tmp_path, 1, {"small": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(
            CheckpointError,
            match=r"cannot write .*step-000002\.pt: File too large; .*step-000001\.pt is untouched",
        ):
            checkpoint.save(tmp_path, 2, {"large": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    still_loads(tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    mounted = tmp_path / "disk"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mounted)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("may not mount a small disk here")
    yield mounted
    subprocess.run(["umount", str(mounted)], check=True)


def test_a_disk_without_room_leaves_the_previous_checkpoint(small_disk):
    checkpoint.save(small_disk, 1, {"small": 1})
    with pytest.raises(CheckpointError, match="step-000002.pt: No space left on device; "):
        checkpoint.save(small_disk, 2, {"large": torch.zeros(1_000_000)})
    still_loads(small_disk)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointError, match="step-000002.pt: Read-only file system; "):
        checkpoint.save(small_disk, 2, {"small": 2})
    still_loads(small_disk)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(CheckpointError, match=r"run/checkpoints/step-000001.pt: Not a directory"):
        checkpoint.save(tmp_path / "run", 1, {})


SAVE_FOR_EVER = """
import sys, torch
from rlkern_loops import checkpoint
step = 0
while True:
    step += 1
    checkpoint.save(sys.argv[1], step, {"x": torch.full((500_000,), float(step))})
    print(step, flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    for _ in range(3):
        child.stdout.readline()
    # Until one is being written.
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not list((tmp_path / "checkpoints").glob("*.tmp")):
        pass
    child.send_signal(signal.SIGKILL)
    last = int((child.communicate()[0].split() or ["3"])[-1])
    step, state = checkpoint.resume(tmp_path, "auto")
    assert step >= last and torch.equal(state["x"], torch.full((500_000,), float(step)))
    # What the kill left half written goes with the next save.
    checkpoint.save(tmp_path, step + 1, {}, keep=1)
    assert names(tmp_path) == [f"step-{step + 1:06d}.pt"]

"""How a row is cut for a cluster of blocks, and what the shim of clusters sees."""

from __future__ import annotations

import subprocess

import pytest
from emulated_kernels import HERE, SANITIZER, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())


@pytest.mark.parametrize(
    "vocab, lanes, blocks, threads",
    [
        (1000, 8, 1, 32),
        (32000, 8, 1, 256),
        (50257, 8, 2, 256),
        (128256, 8, 4, 256),
        (151936, 8, 4, 256),
        (262144, 8, 8, 256),
        (151936, 4, 8, 256),
        (262144, 4, 8, 768),
        (500000, 4, 0, 768),
    ],
)
def test_clusters_by_the_length_of_a_row(built, vocab, lanes, blocks, threads):
    limit = 232448 - 416  # what sm_90 gives a block, less the kernel's own
    plan = built.plan_cluster(vocab, lanes, limit)
    assert plan[0] == blocks and plan[2] == threads
    if not blocks:
        return
    assert plan[1] * plan[0] * lanes >= vocab and plan[3] <= limit
    if threads <= 256:
        assert 3 * (plan[3] + 416 + 1024) <= 228 * 1024, "three blocks share a multiprocessor"
    assert built.plan_cluster(vocab, lanes, 0)[0] == 0


@pytest.mark.skipif(bool(SANITIZER), reason="it ends a process on purpose")
def test_the_shim_sees_a_block_that_reads_one_that_has_ended(tmp_path):
    """Or the second barrier of a cluster could be left out unseen."""
    (tmp_path / "late.cpp").write_text(
        '#include "shim_cluster.h"\n'
        "int main(int argc, char**) {\n"
        "  shim_launch_clusters(1, 2, 32, 64, [&] {\n"
        "    shim_cluster_arrive();\n"
        "    shim_cluster_wait();\n"
        "    shim_shared_of_rank(shim_dynamic_shared(), 1 - shim_cluster_rank());\n"
        "    if (argc > 1) { shim_cluster_arrive(); shim_cluster_wait(); }\n"
        "  });\n"
        "}\n"
    )
    command = ["g++", "-std=c++20", "-pthread", f"-I{HERE}", str(tmp_path / "late.cpp")]
    subprocess.run([*command, "-o", str(tmp_path / "late")], check=True)
    assert subprocess.run([tmp_path / "late", "and waits"]).returncode == 0
    ended = subprocess.run([tmp_path / "late"], capture_output=True, text=True)
    assert ended.returncode != 0 and "had ended" in ended.stderr

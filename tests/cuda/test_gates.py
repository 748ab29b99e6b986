"""Every CUDA source compiled for every architecture, and held to its budget, without a GPU."""

from __future__ import annotations

import re
import subprocess

import pytest
import toolkit
from emulated_kernels import ROOT

SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
REGISTERS_OF_A_MULTIPROCESSOR = 65536
# Kernel -> threads of a block, blocks that must fit on a multiprocessor.
OCCUPANCY = {
    "token_logprobs_forward": (256, 4),
    "token_logprobs_backward": (256, 4),
    "token_logprobs_merge": (64, 16),
    "policy_sequences": (256, 3),
    "policy_finish": (1024, 1),
    "policy_scale": (256, 8),
    "policy_rows_two_reads": (768, 1),
    "policy_rows_cluster": (768, 1),
    "gradient_scale": (256, 4),
    "value_sequences": (256, 4),
    "value_finish": (1024, 1),
    "kl_tokens": (256, 8),
    "divergence_forward": (256, 3),
    "divergence_backward": (256, 4),
    "return_scan_forward": (256, 4),
    "return_scan_backward": (256, 4),
    "group_segments": (1024, 1),
    "group_ids": (1024, 1),
    "add_widened": (256, 4),
    "moments_of_blocks": (256, 4),
    "moments_finish": (1024, 1),
    "whiten_values": (256, 4),
}

needs_toolkit = pytest.mark.skipif(
    bool(toolkit.why_not("nvcc", "cuobjdump")), reason=toolkit.why_not("nvcc", "cuobjdump")
)


@needs_toolkit
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_no_stack_no_spills_and_the_stated_occupancy(source):
    kernels = toolkit.kernels(source)
    assert {k.arch for k in kernels} == set(toolkit.ARCHS)
    for kernel in kernels:
        name = next((n for n in OCCUPANCY if n in kernel.name), None)
        assert name, f"{kernel.name}: state its occupancy in OCCUPANCY"
        threads, blocks = OCCUPANCY[name]
        limit = REGISTERS_OF_A_MULTIPROCESSOR // (threads * blocks)
        assert (kernel.stack, kernel.local, kernel.spilled) == (0, 0, 0), kernel
        assert kernel.registers <= limit, f"{kernel}: at most {limit} let {blocks} blocks in"
    assert {n for n in OCCUPANCY if any(n in k.name for k in kernels)}


def machine_code(source: str, arch: str) -> dict[str, list[str]]:
    """Kernel -> its instructions."""
    if reason := toolkit.why_not("nvdisasm"):
        pytest.skip(reason)
    cuobjdump = toolkit.tool("cuobjdump")
    fatbin = toolkit.compiled(ROOT / "csrc/cuda" / source)
    sass = subprocess.run(
        [cuobjdump, "-sass", "-arch", arch, str(fatbin)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    functions = (function.split("\n", 1) for function in sass.split("Function : ")[1:])
    return {name: re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?) ?;", code) for name, code in functions}


@needs_toolkit
def test_loads_are_16_bytes_wide_and_stand_together():
    """In the machine code for Hopper: four loads in flight before the first use, and one
    exponential for each of their elements, two with a softcap."""
    forwards = 0
    for name, instructions in machine_code("token_logprobs.cu", "sm_90a").items():
        if "token_logprobs_forward" not in name:
            continue
        forwards += 1
        wide = [i for i, text in enumerate(instructions) if re.search(r"LDG\S*\.128", text)]
        run = next((i for i in wide if sum(i <= j < i + 8 for j in wide) >= 4), None)
        assert run is not None, f"{name}: no four 16-byte loads within eight instructions"
        assert not any("LDL" in text or "STL" in text for text in instructions), name
        elements = 4 * (4 if "Float32" in name else 8)
        wanted = elements * (2 if "Lb1ELb" in name else 1)
        exponentials = sum("MUFU.EX2" in text for text in instructions)
        # A few more move sums to a new maximum: of a batch, a warp, a block, a row.
        assert wanted <= exponentials <= wanted + 8, f"{name}: {exponentials} for {elements}"
    assert forwards == 12  # element types, softcap or not, entropy or not


@needs_toolkit
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100f"])
def test_three_blocks_with_a_row_share_a_multiprocessor(arch):
    """As row_plan.h counts on: 76288 bytes of a slice, and a block's own, of which 1 KiB is the
    system's."""
    kernels = [k for k in toolkit.kernels(ROOT / "csrc/cuda/policy_rows.cu") if k.arch == arch]
    clusters = [k for k in kernels if "policy_rows_cluster" in k.name]
    assert len(clusters) == 12
    for kernel in clusters:
        assert 1024 < kernel.shared and 3 * (76288 + kernel.shared) <= 228 * 1024, kernel


@needs_toolkit
def test_a_row_in_a_cluster_is_read_once():
    """In the machine code for Hopper: after the cluster's first barrier no logit is loaded from
    memory; what the gradient is made of comes out of shared memory, 16 bytes at a time."""
    seen = 0
    for name, instructions in machine_code("policy_rows.cu", "sm_90a").items():
        if "policy_rows_cluster" not in name:
            continue
        seen += 1
        arrivals = [i for i, text in enumerate(instructions) if "UCGABAR_ARV" in text]
        waits = [i for i, text in enumerate(instructions) if "UCGABAR_WAIT" in text]
        assert len(arrivals) == len(waits) == 2, name
        before, after = instructions[: waits[0]], instructions[waits[0] :]
        assert sum(bool(re.search(r"LDG\S*\.128", text)) for text in before) >= 4, name
        assert any("STS.128" in text for text in before), name
        assert not any(re.search(r"LDG\S*\.(128|U16)", text) for text in after), name
        assert sum("LDS.128" in text for text in after) >= 4, name
        assert any(re.search(r"STG\S*\.128", text) for text in after), name
    assert seen == 12  # element types, softcap or not, entropy or not

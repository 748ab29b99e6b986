"""The Triton kernels compiled for GPUs that are not here: registers, stack, spills, wide access.

Each kernel is compiled as a call would compile it, for sm_80, sm_90 and sm_100, and the figures are
read from the cubin with the cuobjdump of Triton's wheel.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels cannot be compiled"
)

ARCHITECTURES = (80, 90, 100)

# Most registers a thread may take, by Triton's version and case, over the three architectures.
# Measured with the version named, rounded up to the next 8, the unit of their allocation. 128
# registers leave room for 4 programs of 128 threads per multiprocessor, 168 for 3.
REGISTERS = {
    "3.6": {
        "forward bf16": 96,
        "forward bf16 split": 96,
        "forward bf16 unaligned": 168,
        "forward fp32 softcap": 72,
        "forward fp16 no entropy": 72,
        "backward bf16": 64,
        "backward bf16 unaligned": 96,
        "backward fp32 softcap": 96,
        "backward fp16 no entropy": 72,
        "merge": 32,
    },
    "3.9": {
        "forward bf16": 128,
        "forward bf16 split": 128,
        "forward bf16 unaligned": 168,
        "forward fp32 softcap": 80,
        "forward fp16 no entropy": 96,
        "backward bf16": 96,
        "backward bf16 unaligned": 128,
        "backward fp32 softcap": 96,
        "backward fp16 no entropy": 96,
        "merge": 32,
    },
}
# A version that is not in the table: three programs per multiprocessor.
REGISTERS_ANY = 168

# Arguments that are None, and whether rows are aligned to 16 elements.
FORWARD = {
    "forward bf16": ("bf16", ("softcap", "partial", "token_temperature"), True),
    "forward bf16 split": ("bf16", ("softcap",), True),
    "forward bf16 unaligned": ("bf16", ("softcap", "partial"), False),
    "forward fp32 softcap": ("fp32", ("partial", "mask"), True),
    "forward fp16 no entropy": ("fp16", ("softcap", "mask", "token_temperature"), True),
}
BACKWARD = {
    "backward bf16": ("bf16", ("softcap", "token_temperature"), True),
    "backward bf16 unaligned": ("bf16", ("softcap",), False),
    "backward fp32 softcap": ("fp32", ("mask",), True),
    "backward fp16 no entropy": ("fp16", ("softcap", "mask", "grad_entropy"), True),
}


def compiled(kernel, dtype, none, aligned, constants, num_warps, architecture):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rlkern.triton import token_logprobs as kernels

    types = {"ids": "*i64", "mask": "*i1", "inv_temperature": "fp32", "softcap": "fp32"}
    types |= dict.fromkeys(("logits", "grad"), f"*{dtype}")
    types |= dict.fromkeys(("V", "segments", "inner"), "i32")
    constants = constants | dict.fromkeys(none)
    signature, constexprs, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            constexprs[(i,)] = constants[name]
            continue
        is_stride = name.endswith(("_outer", "_inner"))
        signature[name] = types.get(name, "i32" if is_stride else "*fp32")
        of_rows = name == "V" or re.fullmatch("(logits|grad)_(outer|inner)", name)
        if signature[name].startswith("*") or (aligned and of_rows):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(kernel, signature, constexprs, attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": num_warps, **kernels._OPTIONS},
    )


def resources(kernel, folder):
    """Registers and stack bytes of a thread, and the instructions."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

    def dump(option):
        done = subprocess.run([tool, option, cubin], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump("-res-usage")))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"]), dump("-sass")


def check(case, kernel, folder):
    registers, stack, code = resources(kernel, folder)
    version = ".".join(triton.__version__.split(".")[:2])
    limit = REGISTERS.get(version, {}).get(case, REGISTERS_ANY)
    assert stack == 0, f"{stack} bytes of stack"
    assert not re.search(r"\b(LDL|STL)\b", code), "spills to local memory"
    assert registers <= limit, f"{registers} registers, {limit} with this Triton before"
    return code


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", FORWARD)
def test_forward(case, architecture, tmp_path):
    from rlkern.triton import token_logprobs as kernels

    dtype, none, aligned = FORWARD[case]
    capped = "softcap" not in none
    lanes, steps = kernels._tile(dtype == "fp32", capped)
    constants = {
        "ENTROPY": "no entropy" not in case,
        "SEGMENT": kernels._SEGMENT,
        "LANES": lanes,
        "STEPS": steps,
    }
    kernel = compiled(kernels._segment_kernel, dtype, none, aligned, constants, 4, architecture)
    code = check(case, kernel, tmp_path)
    # Rows that allow it are read 16 bytes at a time.
    assert ("LDG.E.128" in code) == aligned


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", BACKWARD)
def test_backward(case, architecture, tmp_path):
    from rlkern.triton import token_logprobs as kernels

    dtype, none, aligned = BACKWARD[case]
    capped = "softcap" not in none
    block = kernels._BACKWARD_BLOCK_CAPPED if capped else kernels._BACKWARD_BLOCK
    constants = {"SEGMENT": kernels._SEGMENT, "BLOCK": block}
    kernel = compiled(kernels._backward_kernel, dtype, none, aligned, constants, 4, architecture)
    code = check(case, kernel, tmp_path)
    assert ("LDG.E.128" in code) == ("STG.E.128" in code) == aligned


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merge(architecture, tmp_path):
    from rlkern.triton import token_logprobs as kernels

    constants = {"ENTROPY": True, "SEGMENTS": 8}
    kernel = compiled(kernels._merge_kernel, "bf16", (), True, constants, 1, architecture)
    check("merge", kernel, tmp_path)

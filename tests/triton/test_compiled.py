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
        "policy grpo": 120,
        "policy dapo": 104,
        "policy gspo": 88,
        "policy cispo": 96,
        "policy gmpo": 88,
        "policy finish": 80,
        "policy scale": 32,
        "scan gae": 128,
        "scan gae break": 128,
        "scan returns packed": 104,
        "scan vtrace": 128,
        "scan vtrace break": 128,
        "scan backward": 120,
        "scan backward all": 120,
        "scan backward break": 120,
        "group mean": 80,
        "group mean large": 72,
        "group leave_one_out": 64,
        "group length_weighted": 80,
        "group pass_at_k": 80,
        "group batch_mean": 80,
        "group given": 72,
        "group none": 80,
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
        "policy grpo": 112,
        "policy dapo": 96,
        "policy gspo": 80,
        "policy cispo": 88,
        "policy gmpo": 80,
        "policy finish": 80,
        "policy scale": 40,
        "scan gae": 128,
        "scan gae break": 128,
        "scan returns packed": 128,
        "scan vtrace": 128,
        "scan vtrace break": 128,
        "scan backward": 112,
        "scan backward all": 112,
        "scan backward break": 120,
        "group mean": 80,
        "group mean large": 72,
        "group leave_one_out": 64,
        "group length_weighted": 80,
        "group pass_at_k": 80,
        "group batch_mean": 80,
        "group given": 72,
        "group none": 80,
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
    return built(kernel, signature, constexprs, attributes, architecture, num_warps=num_warps)


def built(kernel, signature, constexprs, attributes, architecture, **options):
    """With the options that all kernels of this package share."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rlkern.triton._tokens import OPTIONS

    return triton.compile(
        ASTSource(kernel, signature, constexprs, attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={**options, **OPTIONS},
    )


def unspecialised(kernel, types, constants, architecture, **options):
    """No argument is specialised by its value or alignment; what has no type is a number."""
    signature, constexprs = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], constexprs[(i,)] = "constexpr", constants[name]
        else:
            signature[name] = types.get(name, "fp32")
    return built(kernel, signature, constexprs, {}, architecture, **options)


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


# ---- policy_loss --------------------------------------------------------------------------------

POLICY_TYPES = dict.fromkeys(("mask", "entropy_mask"), "*i1") | {"offsets": "*i64"}
POLICY_TYPES |= dict.fromkeys(("totals", "metrics"), "*fp64")
POLICY_TYPES |= dict.fromkeys(("normalizer", "num_sequences", "entropy_normalizer"), "*fp64")
POLICY_TYPES |= dict.fromkeys(("sequences", "size"), "i32")
POLICY_TYPES |= dict.fromkeys(("loss", "scale"), "*fp32")
POLICY_ABSENT = ("rollout_logprobs", "entropy", "token_weights", "entropy_mask", "grad_entropy")


def built_policy(kernel, constants, architecture, **options):
    from rlkern.triton import _policy_sequence as kernels
    from rlkern.triton.policy_loss import _scale_kernel

    types = dict.fromkeys(kernels.POINTERS, "*fp32") | dict.fromkeys(kernels.INTEGERS, "i32")
    types |= POLICY_TYPES
    if kernel is _scale_kernel:
        types |= dict.fromkeys(kernel.arg_names[:-2], "*fp32")
    return unspecialised(kernel, types, constants, architecture, **options)


def built_objective(objective, absent, one_advantage, architecture):
    from rlkern.ops.policy_loss import options
    from rlkern.reference.aggregation import Denominators
    from rlkern.triton import policy_loss as kernels

    constants = dict(kernels._arguments(tuple(options(objective, Denominators())[:-3]))[1])
    constants |= dict.fromkeys(absent)
    constants |= {"ONE_ADVANTAGE": one_advantage, "BLOCK": kernels._BLOCK, "CHAIN": kernels._CHAIN}
    return built_policy(
        kernels.sequence_kernel, constants, architecture,
        num_warps=kernels._WARPS, maxnreg=kernels._MAX_REGISTERS,
    )  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("preset", ["grpo", "dapo", "gspo", "cispo", "gmpo"])
def test_policy_loss(preset, architecture, tmp_path):
    """As trainers call them: padded, an advantage per sequence, dapo with a KL term."""
    from rlkern import PolicyLoss

    objective = PolicyLoss.preset(preset, **({"kl_coef": 0.04} if preset == "dapo" else {}))
    absent = (*POLICY_ABSENT, "offsets", *(() if objective.kl_coef else ("ref_logprobs",)))
    kernel = built_objective(objective, absent, True, architecture)
    check(f"policy {preset}", kernel, tmp_path)


@pytest.mark.parametrize(
    ("surrogate", "level"),
    [("clip", "sequence"), ("gmpo", "token"), ("vespo", "token"), ("dppo_kl", "token")],
)
def test_policy_loss_with_every_option(surrogate, level):
    """What the interpreter lets pass (types, scopes) and the compiler does not."""
    from rlkern import PolicyLoss, RolloutCorrection

    of_sequences = surrogate == "gmpo" or level in ("sequence", "sequence_token")
    objective = PolicyLoss(
        surrogate=surrogate,
        ratio_level=level,
        kl_coef=0.1,
        kl_ratio_weighted=True,
        entropy_coef=0.1,
        entropy_aggregation="same",
        off_policy_threshold=0.1,
        aggregation="seq_mean_token_mean" if of_sequences else "token_mean",
        correction=RolloutCorrection(level="sequence" if level == "sequence" else "token"),
        **({"dual_clip": 3.0, "ratio_cap": 2.0} if surrogate == "clip" else {}),
    )
    built_objective(objective, (), level == "sequence", 90)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_policy_loss_finish_and_scale(architecture, tmp_path):
    from rlkern.triton import policy_loss as kernels

    constants = {"AGGREGATION": 0, "SKIP_EMPTY": False, "KL": True, "BONUS": True}
    constants |= {"BONUS_SAME": False, "ROWS": kernels._ROWS, "num_sequences": None}
    warps = kernels._FINISH_WARPS
    kernel = built_policy(kernels.finish_kernel, constants, architecture, num_warps=warps)
    check("policy finish", kernel, tmp_path)
    constants = {"BLOCK": kernels._SCALE_BLOCK}
    kernel = built_policy(kernels._scale_kernel, constants, architecture, num_warps=4)
    check("policy scale", kernel, tmp_path)


# ---- return_scan and group_advantages ------------------------------------------------------------

SCAN = {  # What is none, and whether masked tokens break.
    "scan gae": (("log_ratios", "dones", "lam", "offsets", "bootstrap_value"), False),
    "scan gae break": (("log_ratios", "lam", "offsets"), True),
    "scan returns packed": (("values", "log_ratios", "lam", "mask", "dones"), False),
    "scan vtrace": ((), False),
    "scan vtrace break": ((), True),
    "scan backward": (("lam", "offsets"), False),
    "scan backward all": ((), False),
    "scan backward break": ((), True),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", SCAN)
def test_return_scan(case, architecture, tmp_path):
    from rlkern.triton import return_scan as kernels

    none, breaks = SCAN[case]
    types = dict.fromkeys(kernels._POINTERS, "*fp32") | dict.fromkeys(kernels._INTEGERS, "i32")
    types |= {"mask": "*i1", "dones": "*i1", "offsets": "*i64"}
    needs_states = "vtrace" in case or "backward" in case
    block = kernels._STATES_BLOCK if needs_states else kernels._BLOCK
    constants = dict.fromkeys(none) | {"BREAKS": breaks, "BLOCK": block}
    kernel = kernels._backward_kernel if "backward" in case else kernels._forward_kernel
    options = {"num_warps": kernels._WARPS, "maxnreg": kernels._MAX_REGISTERS}
    kernel = unspecialised(kernel, types, constants, architecture, **options)
    check(case, kernel, tmp_path)


EQUAL = ("order", "ids", "ends")
GROUPS = {  # What is none, baseline and scale, and whether groups are large.
    "group mean": ((*EQUAL, "lengths", "given", "batch"), ("mean", "std"), False),
    "group mean large": ((*EQUAL, "lengths", "given", "batch"), ("mean", "std"), True),
    "group leave_one_out": (("lengths", "given", "batch"), ("leave_one_out", "none"), False),
    "group length_weighted": (("given", "batch"), ("length_weighted", "std"), False),
    "group pass_at_k": (("lengths", "given", "batch"), ("pass_at_k", "std"), False),
    "group batch_mean": (("lengths", "given"), ("batch_mean", "batch_std"), False),
    "group given": (("lengths", "batch"), ("given", "mean"), False),
    "group none": (("lengths", "given"), ("none", "batch_std"), False),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", GROUPS)
def test_group_advantages(case, architecture, tmp_path):
    from rlkern.reference.group_advantages import BASELINES, SCALES
    from rlkern.triton import group_advantages as kernels

    none, (baseline, scale), is_large = GROUPS[case]
    types = dict.fromkeys(kernels._POINTERS, "*fp32") | dict.fromkeys(kernels._INTEGERS, "i32")
    types |= dict.fromkeys(EQUAL, "*i64") | {"batch": "*fp64"}
    constants = dict.fromkeys(none) | {
        "BASELINE": BASELINES.index(baseline),
        "SCALE": SCALES.index(scale),
        "UNBIASED": True,
        "RAW": False,
        "BLOCK": kernels._LARGE_BLOCK if is_large else kernels._BLOCK,
    }
    warps = kernels._LARGE_WARPS if is_large else kernels._WARPS
    kernel = unspecialised(kernels._group_kernel, types, constants, architecture, num_warps=warps)
    check(case, kernel, tmp_path)

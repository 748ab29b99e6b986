"""Bad input: the error names the argument, what was expected and what came."""

from __future__ import annotations

import pytest
import torch

import rlkern

LOGITS, IDS = torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
TOO_LARGE = torch.tensor([[0, 0, 0], [0, 0, 5]])

CASES = {
    "logits is a list": (
        TypeError,
        "logits: expected a torch.Tensor, got list",
        ([[1.0]], IDS),
        {},
    ),
    "integer logits": (
        TypeError,
        "logits: expected float32.*got torch.int64",
        (IDS, IDS),
        {},
    ),
    "sparse logits": (
        TypeError,
        "logits: expected a dense tensor, got the layout torch.sparse_coo",
        (LOGITS.to_sparse(), IDS),
        {},
    ),
    "scalar logits": (
        ValueError,
        r"logits: expected shape \[..., V\].*got \[\]",
        (LOGITS.sum(), IDS),
        {},
    ),
    "no vocabulary": (
        ValueError,
        r"logits: .*at least 1, got \[2, 3, 0\]",
        (LOGITS[..., :0], IDS),
        {},
    ),
    "ids of another shape": (
        ValueError,
        r"token_ids: expected shape \[2, 3\].*got \[2, 2\]",
        (LOGITS, IDS[:, :2]),
        {},
    ),
    "float ids": (
        TypeError,
        "token_ids: expected int64 or int32, got torch.float32",
        (LOGITS, IDS.float()),
        {},
    ),
    "id too large": (
        ValueError,
        r"token_ids: expected values in \[0, 5\), got 5 at \[1, 2\]",
        (LOGITS, TOO_LARGE),
        {},
    ),
    "negative id": (
        ValueError,
        r"token_ids: expected values in \[0, 5\), got -100 at \[0, 0\]",
        (LOGITS, IDS - 100),
        {},
    ),
    "mask of another shape": (
        ValueError,
        r"mask: expected shape \[2, 3\].*got \[3\]",
        (LOGITS, IDS),
        {"mask": torch.ones(3, dtype=torch.bool)},
    ),
    "float mask": (
        TypeError,
        "mask: expected bool or an integer type, got torch.float32",
        (LOGITS, IDS),
        {"mask": torch.ones(2, 3)},
    ),
    "zero temperature": (
        ValueError,
        "temperature: expected a positive finite number.*got 0",
        (LOGITS, IDS),
        {"temperature": 0.0},
    ),
    "infinite temperature": (
        ValueError,
        "temperature: .*got inf",
        (LOGITS, IDS),
        {"temperature": float("inf")},
    ),
    "NaN temperature": (
        ValueError,
        "temperature: .*got nan",
        (LOGITS, IDS),
        {"temperature": float("nan")},
    ),
    "text for temperature": (
        TypeError,
        "temperature: expected a positive number, got str",
        (LOGITS, IDS),
        {"temperature": "1"},
    ),
    "negative token temperature": (
        ValueError,
        r"temperature: expected positive finite values.*got -1.0 at \[0, 0\]",
        (LOGITS, IDS),
        {"temperature": -torch.ones(2, 3)},
    ),
    "integer token temperature": (
        TypeError,
        "temperature: expected a floating-point tensor, got torch.int64",
        (LOGITS, IDS),
        {"temperature": IDS + 1},
    ),
    "temperature of another shape": (
        ValueError,
        r"temperature: expected a shape that broadcasts to \[2, 3\].*got \[4\]",
        (LOGITS, IDS),
        {"temperature": torch.ones(4)},
    ),
    "temperature with gradient": (
        ValueError,
        "temperature: expected a tensor that needs no gradient",
        (LOGITS, IDS),
        {"temperature": torch.ones(2, 3, requires_grad=True)},
    ),
    "zero softcap": (
        ValueError,
        "softcap: expected a positive finite number.*got 0",
        (LOGITS, IDS),
        {"softcap": 0},
    ),
    "temperature whose inverse overflows": (
        ValueError,
        "temperature: .*got 1e-40",
        (LOGITS, IDS),
        {"temperature": 1e-40},
    ),
    "token temperature whose inverse overflows": (
        ValueError,
        r"temperature: .*at \[0, 0\]",
        (LOGITS, IDS),
        {"temperature": torch.tensor(1e-39)},
    ),
    "integer temperature beyond floats": (
        ValueError,
        "temperature: expected a positive finite number",
        (LOGITS, IDS),
        {"temperature": 10**400},
    ),
    "softcap that rounds to none": (
        ValueError,
        "softcap: .*got 1e-50",
        (LOGITS, IDS),
        {"softcap": 1e-50},
    ),
    "softcap beyond fp32": (
        ValueError,
        "softcap: .*got 1e[+]39",
        (LOGITS, IDS),
        {"softcap": 1e39},
    ),
    "boolean softcap": (
        TypeError,
        "softcap: expected a positive number, got bool",
        (LOGITS, IDS),
        {"softcap": True},
    ),
    "ids on another device": (
        ValueError,
        "token_ids: expected device cpu.*got meta",
        (LOGITS, IDS.to("meta")),
        {},
    ),
    "mask on another device": (
        ValueError,
        "mask: expected device cpu.*got meta",
        (LOGITS, IDS),
        {"mask": IDS.to("meta")},
    ),
    "unknown option": (
        TypeError,
        "reduction",
        (LOGITS, IDS),
        {"reduction": "mean"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(backend, name):
    error, message, (logits, ids), options = CASES[name]
    with pytest.raises(error, match=message):
        rlkern.token_logprobs(logits, ids, **options)


def test_dtensors_are_refused_with_their_mesh():
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = DTensor.from_local(LOGITS, mesh, [Replicate()])
        with pytest.raises(TypeError, match=r"logits: .*DTensor over DeviceMesh.*full_tensor\(\)"):
            rlkern.token_logprobs(sharded, IDS)
        ids = DTensor.from_local(IDS, mesh, [Replicate()])
        with pytest.raises(TypeError, match="token_ids: .*DTensor"):
            rlkern.token_logprobs(LOGITS, ids)
    finally:
        torch.distributed.destroy_process_group()


def test_the_operators_guard_memory_where_no_python_check_runs():
    op = torch.ops.rlkern.token_logprobs.default
    with pytest.raises(RuntimeError, match=r"token_ids: expected values in \[0, 5\), got 9"):
        op(LOGITS, IDS + 9, None, None, 1.0, None, False)
    with pytest.raises(RuntimeError, match="token_ids: unexpected dtype"):
        op(LOGITS, IDS.int(), None, None, 1.0, None, False)
    with pytest.raises(RuntimeError, match="mask: expected size 2 at dimension 0, got 1"):
        op(LOGITS, IDS, IDS[:1] == 0, None, 1.0, None, False)
    with pytest.raises(RuntimeError, match="rows of consecutive values"):
        op(LOGITS[..., ::2], IDS, None, None, 1.0, None, False)
    with pytest.raises(RuntimeError, match="temperature: expected a positive number"):
        op(LOGITS, IDS, None, None, 0.0, None, False)
    with pytest.raises(RuntimeError, match="logits: expected float32"):
        op(LOGITS.double(), IDS, None, None, 1.0, None, False)
    with pytest.raises(RuntimeError) as caught:
        op(LOGITS[0, 0, 0], IDS[0, 0], None, None, 1.0, None, False)
    # Not torch's error for a missing dimension, which names a header of the build machine.
    assert str(caught.value) == "rlkern: logits: expected shape [..., V], got no dimensions"


@pytest.mark.parametrize("softcap", [0.0, -30.0, float("nan"), float("inf"), 1e-50])
def test_the_operators_refuse_a_softcap_that_the_kernels_would_leave_out(softcap):
    args = (LOGITS, IDS, None, None, 1.0)
    forward = torch.ops.rlkern.token_logprobs.default
    backward = torch.ops.rlkern.token_logprobs_bwd.default
    saved = forward(*args, None, False)
    message = "softcap: expected a positive finite number"
    with pytest.raises(RuntimeError, match=message):
        forward(*args, softcap, False)
    with pytest.raises(RuntimeError, match=message):
        backward(torch.ones(2, 3), None, *args, softcap, *saved)


def test_nothing_is_written_when_an_inplace_backward_is_refused():
    logits = LOGITS.clone()
    forward = torch.ops.rlkern.token_logprobs.default
    saved = forward(logits, IDS, None, None, 1.0, None, False)
    before = logits.clone()
    with pytest.raises(RuntimeError, match="token_ids"):
        torch.ops.rlkern.token_logprobs_bwd_.default(
            torch.ones(2, 3), None, logits, IDS + 9, None, None, 1.0, None, *saved
        )
    assert torch.equal(logits, before)

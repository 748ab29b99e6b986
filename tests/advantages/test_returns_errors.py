"""What the scans refuse, in Python by the argument's name and in C++ for who calls torch.ops."""

from __future__ import annotations

import math

import pytest
import torch

import rlkern
from rlkern import _backend

X = torch.zeros(2, 3)
PER_SEQUENCE = torch.zeros(2)
META = torch.zeros(2, 3, device="meta")
PACKED = {"rewards": torch.zeros(6), "values": torch.zeros(6), "log_ratios": torch.zeros(6)}
GIVEN = {"gae": ("values",), "discounted_returns": (), "vtrace": ("values", "log_ratios")}
ALL, WITH_VALUES = tuple(GIVEN), ("gae", "vtrace")


def call(function, arguments):
    tokens = ("rewards", *GIVEN[function])
    given = {name: x for name, x in arguments.items() if name not in PACKED}
    return getattr(rlkern, function)(*(arguments.get(name, X) for name in tokens), **given)


REFUSED = [
    (ALL, {"rewards": None}, TypeError, "rewards: expected a torch.Tensor, got NoneType"),
    (ALL, {"rewards": [1.0]}, TypeError, "rewards: expected a torch.Tensor, got list"),
    (ALL, {"rewards": X.long()}, TypeError, "rewards: expected float32, bfloat16, .* got torch.in"),
    (ALL, {"rewards": X[0]}, ValueError, r"rewards: expected \[B, T\], or \[total\] with cu_seq"),
    (ALL, {"rewards": torch.zeros(())}, ValueError, r"rewards: expected \[B, T\]"),
    (ALL, {"rewards": X.to_sparse()}, TypeError, "rewards: expected a dense tensor"),
    (WITH_VALUES, {"values": None}, TypeError, "values: expected a torch.Tensor, got None"),
    (WITH_VALUES, {"values": X[:, :2]}, ValueError,
     r"values: expected shape \[2, 3\] \(rewards has \[2, 3\]\), got \[2, 2\]"),
    (WITH_VALUES, {"values": X.int()}, TypeError, "values: expected float32"),
    (WITH_VALUES, {"values": META}, ValueError, r"values: expected device cpu \(rewards's\), got"),
    (("vtrace",), {"log_ratios": None}, TypeError, "log_ratios: expected a torch.Tensor, got None"),
    (("vtrace",), {"log_ratios": X[:1]}, ValueError, r"log_ratios: expected shape \[2, 3\]"),
    (ALL, {"mask": X}, TypeError, "mask: expected bool or an integer type, got torch.float32"),
    (ALL, {"mask": X[:1] > 0}, ValueError, r"mask: expected shape \[2, 3\]"),
    (ALL, {"mask": META > 0}, ValueError, "mask: expected device cpu"),
    (ALL, {"dones": X}, TypeError, "dones: expected bool or an integer type"),
    (ALL, {"dones": PER_SEQUENCE > 0}, ValueError, r"dones: expected shape \[2, 3\] .* got \[2\]"),
    (ALL, {"bootstrap_value": X}, ValueError, r"bootstrap_value: expected shape \[2\]"),
    (ALL, {"bootstrap_value": 1.0}, TypeError, "bootstrap_value: expected a torch.Tensor, got flo"),
    (ALL, {"bootstrap_value": META[:, 0]}, ValueError, "bootstrap_value: expected device cpu"),
    (ALL, {"gamma": 1.1}, ValueError, "gamma: expected a finite number of at least 0 and at m"),
    (ALL, {"gamma": -0.1}, ValueError, "gamma: expected a finite .* got -0.1"),
    (ALL, {"gamma": math.nan}, ValueError, "gamma: expected a finite number .* got nan"),
    (ALL, {"gamma": True}, TypeError, "gamma: expected a number, got bool"),
    (ALL, {"gamma": PER_SEQUENCE}, TypeError, "gamma: expected a number, got Tensor"),
    (WITH_VALUES, {"lam": 1.5}, ValueError, "lam: expected a finite number of at least 0 and"),
    (WITH_VALUES, {"lam": None}, TypeError, "lam: expected a number, got NoneType"),
    (WITH_VALUES, {"lam": X}, ValueError, r"lam: expected shape \[2\] .* got \[2, 3\]"),
    (WITH_VALUES, {"lam": torch.tensor([0.5, 2.0])}, ValueError,
     r"lam: expected values in \[0, 1\], got 2.0 at \[1\]"),
    (WITH_VALUES, {"lam": torch.tensor([math.nan, 1.0])}, ValueError,
     r"lam: expected values in \[0, 1\], got nan at \[0\]"),
    (WITH_VALUES, {"lam": torch.ones(2, requires_grad=True)}, ValueError, "lam: expected a tens"),
    (WITH_VALUES, {"lam": META[:, 0]}, ValueError, "lam: expected device cpu"),
    (ALL, {"mask_mode": "brake"}, ValueError,
     "mask_mode: expected one of carry, break, got 'brake'; did you mean 'break'"),
    (ALL, {"mask_mode": None}, TypeError, "mask_mode: expected a str, got NoneType"),
    (("vtrace",), {"rho_bar": 0.0}, ValueError, "rho_bar: expected a finite number above 0, got 0"),
    (("vtrace",), {"c_bar": -1.0}, ValueError, "c_bar: expected a finite number above 0"),
    (("vtrace",), {"rho_pg_bar": math.inf}, ValueError, "rho_pg_bar: expected a finite number"),
    (ALL, {"cu_seqlens": torch.tensor([0, 3])}, ValueError, "cu_seqlens: expected None for padded"),
    (ALL, PACKED | {"cu_seqlens": torch.tensor([0, 7])}, ValueError,
     "cu_seqlens: expected values that rise from 0 to 6"),
    (ALL, PACKED | {"cu_seqlens": torch.tensor([1, 6])}, ValueError, "cu_seqlens: expected values"),
    (ALL, PACKED | {"cu_seqlens": torch.tensor([0, 4, 2, 6])}, ValueError, "cu_seqlens: expected"),
    (ALL, PACKED | {"cu_seqlens": torch.tensor([0.0, 6])}, TypeError, "cu_seqlens: expected int32"),
    (ALL, PACKED | {"cu_seqlens": torch.tensor([[0, 6]])}, ValueError, r"cu_seqlens: expected sha"),
    (ALL, PACKED | {"cu_seqlens": torch.tensor([0, 6]), "bootstrap_value": PER_SEQUENCE},
     ValueError, r"bootstrap_value: expected shape \[1\]"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [(function, *rest) for functions, *rest in REFUSED for function in functions],
    ids=lambda x: x[:30] if isinstance(x, str) else None,
)
def test_refuses(function, arguments, error, message):
    with pytest.raises(error, match=message):
        call(function, arguments)


def test_a_forgotten_lam_is_no_argument_of_returns():
    with pytest.raises(TypeError, match="lam"):
        rlkern.discounted_returns(X, lam=0.9)


# ---- the operator itself ----------------------------------------------------------------------

OPTIONS = [0.9, 0.9, 0.0, 1.0, 1.0, 1.0]
FLAGS = torch.ones(2, 3, dtype=torch.bool)
GUARDED = [
    ({"rewards": X.double()}, "rewards: unexpected dtype"),
    ({"rewards": X[0]}, r"expected values \[B, T\], got 1 dimensions"),
    ({"rewards": X.t().contiguous().t()}, "rewards: expected values consecutive along a sequence"),
    ({"values": None, "log_ratios": X}, "values: expected with log_ratios"),
    ({"values": X[:1]}, "values: expected size 2 at dimension 0, got 1"),
    ({"log_ratios": X[0]}, "log_ratios: expected 2 dimensions, got 1"),
    ({"mask": X}, "mask: unexpected dtype"),
    ({"dones": FLAGS[:, :2]}, "dones: expected size 3 at dimension 1, got 2"),
    ({"bootstrap_value": torch.zeros(3)}, "bootstrap_value: expected 2 values, one per sequence"),
    ({"bootstrap_value": torch.zeros(4)[::2]}, "bootstrap_value: expected contiguous float32"),
    ({"lam": torch.ones(2).double()}, "lam: expected contiguous float32"),
    ({"options": OPTIONS[:-1]}, "options: expected 6 numbers, got 5"),
    ({"offsets": torch.tensor([0, 3])}, r"expected packed values \[total\], got 2 dimensions"),
]
PACKED_GUARDED = [
    (torch.tensor([0, 7]), "offsets: expected values that rise from 0 to 6"),
    (torch.tensor([-1, 6]), "offsets: expected values that rise"),
    (torch.tensor([0, 5, 4, 6]), "offsets: expected values that rise"),
    (torch.tensor([0, 1 << 62, 6]), "offsets: expected values that rise"),
    (torch.tensor([0]), "offsets: expected values that rise"),
    (torch.tensor([0, 6]).int(), "offsets: expected contiguous int64"),
]
native = pytest.mark.skipif(
    _backend.why_not("return_scan", "native", "cpu", torch.float32) != "", reason="not built"
)


@native
@pytest.mark.parametrize(("changed", "message"), GUARDED, ids=[m[:30] for _, m in GUARDED])
def test_the_operator_guards_itself(changed, message):
    names = "rewards values log_ratios mask dones bootstrap_value lam offsets options".split()
    given = dict.fromkeys(names) | {"rewards": X, "values": X, "options": OPTIONS} | changed
    with pytest.raises(RuntimeError, match=f"rlkern: {message}"):
        torch.ops.rlkern.return_scan(*given.values())
    backward = {"grad_first": given["rewards"], "grad_second": given["values"]}
    backward |= {name: given[name] for name in ("mask", "dones", "lam", "offsets", "options")}
    if set(changed) & set(backward) - {"log_ratios"}:
        with pytest.raises(RuntimeError, match=f"rlkern: {message}"):
            torch.ops.rlkern.return_scan_bwd(*backward.values())


@native
@pytest.mark.parametrize(("offsets", "message"), PACKED_GUARDED)
def test_the_operator_guards_its_offsets(offsets, message):
    x = torch.zeros(6)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.rlkern.return_scan(x, x, None, None, None, None, None, offsets, OPTIONS)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.rlkern.return_scan_bwd(x, x, None, None, None, offsets, OPTIONS)

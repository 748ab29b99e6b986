"""The gradients of gae and discounted_returns, and the scans inside autograd and torch.compile."""

from __future__ import annotations

import pytest
import torch
from scan_batches import FUNCTIONS, GIVEN, call, random_batch
from torch.autograd import forward_ad

import rlkern
from rlkern import _schema
from rlkern.ops import _register

OPTIONS = {"gae": {"gamma": 0.97, "lam": 0.9}, "discounted_returns": {"gamma": 0.97}}
functions = pytest.mark.parametrize("function", tuple(OPTIONS))
modes = pytest.mark.parametrize("mask_mode", ["carry", "break"])
layouts = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
LEAVES = ("rewards", "values", "bootstrap_value")


def gradients(function, batch, dtype, weights, **options):
    """Of the weighted sum of all results, by name."""
    names = [name for name in LEAVES if name in ("rewards", "bootstrap_value", *GIVEN[function])]
    leaves = {name: batch[name].to(dtype).clone().requires_grad_() for name in names}
    out = call(function, batch | leaves, dtype, **options)
    given = [weight.to(dtype) for weight in weights[: len(out)]]
    return dict(zip(names, torch.autograd.grad(out, leaves.values(), given), strict=True))


@functions
@modes
@layouts
@pytest.mark.parametrize("given", ["mask, dones", "nothing"])
def test_gradients(scan_backend, poisoned, function, mask_mode, packed, given):
    batch = random_batch(packed, mask="mask" in given, dones="dones" in given)
    weights = [torch.randn_like(batch["rewards"]) for _ in range(2)]
    options = OPTIONS[function] | {"mask_mode": mask_mode}
    if function == "gae":
        options["lam"] = torch.linspace(0.1, 1, batch["bootstrap_value"].shape[0])
    with rlkern.use_backend("eager"):
        truth = gradients(function, batch, torch.float64, weights, **options)
        # Every slope is a sum of upstream gradients with positive factors: that over their
        # absolute values is what rounding errors are relative to.
        scale = gradients(function, batch, torch.float64, [w.abs() for w in weights], **options)
    # Not used: upstream gradients of masked tokens, whose results are constants.
    if "mask" in batch:
        weights = [w.masked_fill(~batch["mask"], float("nan")) for w in weights]
    poisoned(4 * batch["rewards"].numel())
    found = gradients(function, batch, scan_backend.dtype, weights, **options)
    unit = 2.0**-24 if scan_backend.dtype == torch.float32 else 2.0**-53
    inner = 2.0**-53
    largest = 3 * scale["rewards"].abs().max() + 3 * max(
        w.nan_to_num().abs().max() for w in weights
    )
    for name, exact in truth.items():
        # 10 roundings a step as in the forward pass, over at most 70 steps.
        bound = 10 * 71 * inner * largest + unit * exact.abs()
        assert ((found[name].double() - exact).abs() <= bound).all(), name
        if name != "bootstrap_value" and "mask" in batch:
            assert not found[name][~batch["mask"]].any()


@modes
def test_gradcheck(mask_mode):
    batch = random_batch(False, T=7)
    rewards, values = (batch[name].double().requires_grad_() for name in LEAVES[:2])
    bootstrap = batch["bootstrap_value"].double().requires_grad_()
    rest = {name: batch[name] for name in ("mask", "dones")} | {"mask_mode": mask_mode}

    def both(rewards, values, bootstrap):
        return rlkern.gae(rewards, values, bootstrap_value=bootstrap, gamma=0.9, lam=0.8, **rest)

    def returns(rewards, bootstrap):
        return rlkern.discounted_returns(rewards, bootstrap_value=bootstrap, gamma=0.9, **rest)

    assert torch.autograd.gradcheck(both, (rewards, values, bootstrap))
    assert torch.autograd.gradcheck(returns, (rewards, bootstrap))


@pytest.mark.parametrize("alone", LEAVES)
def test_one_input_alone_needs_a_gradient(scan_backend, alone):
    batch = random_batch(False)
    weights = [torch.randn_like(batch["rewards"]) for _ in range(2)]
    all_of_them = gradients("gae", batch, scan_backend.dtype, weights)
    leaf = batch[alone].to(scan_backend.dtype).clone().requires_grad_()
    out = call("gae", batch | {alone: leaf}, scan_backend.dtype)
    (gradient,) = torch.autograd.grad(out, leaf, [w.to(scan_backend.dtype) for w in weights])
    assert torch.equal(gradient, all_of_them[alone])


def test_one_result_alone_is_used(scan_backend):
    batch = random_batch(False)
    zeros, ones = (x(batch["rewards"]) for x in (torch.zeros_like, torch.ones_like))
    for which, weights in ((0, (ones, zeros)), (1, (zeros, ones))):
        expected = gradients("gae", batch, scan_backend.dtype, weights)["values"]
        leaf = batch["values"].to(scan_backend.dtype).clone().requires_grad_()
        out = call("gae", batch | {"values": leaf}, scan_backend.dtype)
        (gradient,) = torch.autograd.grad(out[which].sum(), leaf)  # an expanded upstream gradient
        assert torch.equal(gradient, expected)


def test_gradients_come_in_the_inputs_dtype(scan_backend):
    if scan_backend.dtype == torch.float64:
        pytest.skip("16-bit inputs are computed in fp32")
    batch = random_batch(False)
    leaf = batch["values"].bfloat16().requires_grad_()
    advantages, returns = call("gae", batch | {"values": leaf}, torch.bfloat16)
    (advantages + 2 * returns).sum().backward()
    assert leaf.grad.dtype == torch.bfloat16 and leaf.grad[:3].abs().sum() > 0


def test_without_gradients_there_is_no_graph(scan_backend):
    batch = random_batch(False)
    leaf = batch["values"].to(scan_backend.dtype).clone().requires_grad_()
    with torch.no_grad():
        assert not any(x.requires_grad for x in call("gae", batch | {"values": leaf}))
    assert not any(x.requires_grad for x in call("gae", batch, scan_backend.dtype))
    assert all(x.requires_grad for x in call("gae", batch | {"values": leaf}, scan_backend.dtype))


@functions
def test_second_derivatives_raise(scan_backend, function):
    if not scan_backend.is_kernel:
        pytest.skip("eager PyTorch has them")
    batch = random_batch(False)
    rewards = batch["rewards"].requires_grad_()
    value = call(function, batch, **OPTIONS[function])[0].square().sum()
    (slope,) = torch.autograd.grad(value, rewards, create_graph=True)
    with pytest.raises(RuntimeError, match="return_scan_bwd cannot be differentiated"):
        slope.sum().backward()


@pytest.mark.parametrize("name", ["rewards", "values", "log_ratios", "bootstrap_value"])
def test_vtrace_refuses_inputs_that_need_a_gradient(scan_backend, name):
    batch = random_batch(False)
    batch[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name}: expected a tensor that needs no gradient"):
        call("vtrace", batch, scan_backend.dtype)
    with torch.no_grad():
        call("vtrace", batch, scan_backend.dtype)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_forward_mode_tangents_are_refused(scan_backend, function):
    batch = random_batch(False)
    for name in ("rewards", *GIVEN[function], "bootstrap_value"):
        with forward_ad.dual_level():
            x = batch[name].to(scan_backend.dtype)
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            with pytest.raises(RuntimeError, match=f"{name}: .*forward-mode tangent"):
                call(function, batch | {name: dual}, scan_backend.dtype)


@pytest.mark.parametrize("function", FUNCTIONS)
@layouts
def test_compiled_as_one_graph_equals_eager(scan_backend, function, packed):
    if packed and not scan_backend.is_kernel:
        pytest.skip("the loop is as long as the longest sequence, which no graph knows")
    batch = random_batch(packed)
    leaf = batch["rewards"].to(scan_backend.dtype)
    weight = torch.randn_like(leaf)

    def step(rewards):
        out = call(function, batch | {"rewards": rewards * 1.0}, scan_backend.dtype)
        return sum(out)

    if function == "vtrace":
        expected, expected_gradient = step(leaf), None
    else:
        expected = step(leaf.requires_grad_())
        (expected_gradient,) = torch.autograd.grad(expected, leaf, weight)
    torch.compiler.reset()
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(leaf)
    # The same operators, in the same order.
    assert torch.equal(found, expected)
    if expected_gradient is not None:
        (gradient,) = torch.autograd.grad(found, leaf, weight)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-6)


@layouts
def test_opcheck(scan_backend, packed):
    if not scan_backend.is_kernel:
        pytest.skip("eager is the definition itself and has no operator")
    scan, scan_bwd = (
        getattr(torch.ops.rlkern, _schema.operator_name(op, scan_backend.name)).default
        for op in ("return_scan", "return_scan_bwd")
    )
    assert scan is _register.overload("return_scan", scan_backend.name)
    batch = random_batch(packed)
    offsets = batch["cu_seqlens"].long() if packed else None
    lam = torch.rand_like(batch["bootstrap_value"])
    numbers = [0.9, 0.8, 1.0, 1.0, 1.0, 1.0]
    flags = (batch["mask"], batch["dones"])
    for function in FUNCTIONS:
        rewards, bootstrap = batch["rewards"].clone(), batch["bootstrap_value"].clone()
        values = batch["values"].clone() if function != "discounted_returns" else None
        ratios = batch["log_ratios"] if function == "vtrace" else None
        if function != "vtrace":
            for leaf in (rewards, values, bootstrap):
                if leaf is not None:
                    leaf.requires_grad_()
        torch.library.opcheck(
            scan, (rewards, values, ratios, *flags, bootstrap, lam, offsets, numbers)
        )
    for second in (None, batch["values"]):
        torch.library.opcheck(
            scan_bwd, (batch["rewards"], second, *flags, lam, offsets, numbers),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)], ids=str)
def test_the_gradient_of_nothing(scan_backend, shape):
    rewards = torch.zeros(shape, dtype=scan_backend.dtype, requires_grad=True)
    values = torch.zeros(shape, dtype=scan_backend.dtype, requires_grad=True)
    out = rlkern.gae(rewards, values)
    (out.advantages.sum() + out.returns.sum()).backward()
    rlkern.discounted_returns(rewards).sum().backward()
    assert rewards.grad.shape == shape and values.grad.shape == shape

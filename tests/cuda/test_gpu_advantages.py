"""The CUDA kernels of the advantages on a GPU: what no test without one can see."""

from __future__ import annotations

import itertools

import gpu
import pytest
import torch
from advantage_batches import (
    KINDS,
    LENGTHS,
    U,
    close,
    group_batch,
    in_double,
    mapped,
    numbers,
    options_of,
    scan_batch,
    terms_of,
    with_garbage,
)

import rlkern
from rlkern.reference import group_advantages as groups
from rlkern.reference import whiten as whitening
from rlkern.reference.group_advantages import BASELINES, SCALES, GroupBatch, GroupOptions
from rlkern.reference.return_scan import return_scan
from rlkern.reference.whiten import WhitenOptions

pytestmark = gpu.MARKS
OPS = torch.ops.rlkern


@pytest.fixture(autouse=True)
def native():
    with rlkern.use_backend("native"):
        yield


def on_gpu(batch):
    return mapped(batch, lambda x: x.cuda())


def pairs(first, second):
    """The outputs of two calls beside each other, however many they are."""
    first, second = (x if isinstance(x, tuple) else (x,) for x in (first, second))
    return zip(first, second, strict=True)


def equal(first, second):
    return all(torch.equal(a, b) for a, b in pairs(first, second))


def calls(seed=0):
    """Each operator once: its name, its tensors on the GPU, and a call on them."""
    scan = on_gpu(scan_batch("gae", (700, 0, 2500), seed=seed))
    options = numbers(options_of("gae", True))
    yield "return_scan", scan[:7], lambda *x: OPS.return_scan(*x, None, options)
    kept = scan.rewards, scan.values, scan.mask, scan.dones, scan.lam
    yield "return_scan_bwd", kept, lambda *x: OPS.return_scan_bwd(*x, None, options)
    grouping = GroupOptions().numbers()
    batch = on_gpu(group_batch("mean", seed=seed))
    yield (
        "group_advantages by ids",
        (batch.rewards, batch.group_ids),
        lambda r, ids: OPS.group_advantages(r, 0, ids, None, None, None, grouping),
    )
    batch = on_gpu(group_batch("mean", group_size=8, seed=seed))
    yield (
        "group_advantages",
        (batch.rewards,),
        lambda r: OPS.group_advantages(r, 8, None, None, None, None, grouping),
    )
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(100_001, generator=generator, device="cuda")
    mask = torch.rand(100_001, generator=generator, device="cuda") < 0.7
    yield "masked_moments", (x, mask), OPS.masked_moments
    yield (
        "whiten",
        (x, mask),
        lambda x, m: OPS.whiten(x, m, OPS.masked_moments(x, m), WhitenOptions().numbers()),
    )


# ---- against float64 --------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [False, True], ids=["everything", "plain"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("breaks", [False, True], ids=["carry", "break"])
@pytest.mark.parametrize("kind", KINDS)
def test_return_scan(kind, breaks, packed, plain):
    lengths = (*LENGTHS, 2400)
    batch, options = scan_batch(kind, lengths, packed, plain=plain), options_of(kind, breaks)
    exact = return_scan(in_double(batch), options)
    dirty = batch if plain else with_garbage(batch, float("nan"))
    found = OPS.return_scan(*on_gpu(dirty), numbers(options))
    for a, b in zip(found, exact, strict=True):
        close(a.cpu(), b, terms_of(batch))


@pytest.mark.parametrize(
    "lengths", [(65_539,), (3,) * 70_000, (0, 0), ()], ids=["64K", "many", "none", "no"]
)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_long_many_and_none(lengths, packed):
    batch, options = scan_batch("gae", lengths, packed), options_of("gae", True)
    found = OPS.return_scan(*on_gpu(batch), numbers(options))
    if batch.rewards.numel():
        for a, b in zip(found, return_scan(in_double(batch), options), strict=True):
            close(a.cpu(), b, (terms_of(batch)[0], max(lengths)))
    else:
        assert all(x.shape == batch.rewards.shape for x in found)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("mode", ["carry", "break"])
def test_gradients_of_gae(mode, packed):
    batch = scan_batch("gae", packed=packed, seed=2)
    names = ("rewards", "values", "bootstrap_value")
    gradients = []
    upstream = torch.randn(2, *batch.rewards.shape)
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        given = mapped(batch, lambda x, d=device: x.to(d))
        leaves = [getattr(given, n).to(dtype).requires_grad_() for n in names]
        with rlkern.use_backend("eager" if device == "cpu" else "native"):
            out = rlkern.gae(
                leaves[0], leaves[1], gamma=0.99, lam=given.lam, mask=given.mask,
                dones=given.dones, bootstrap_value=leaves[2], cu_seqlens=given.offsets,
                mask_mode=mode,
            )  # fmt: skip
            g = upstream.to(device, dtype)
            gradients.append(torch.autograd.grad(tuple(out), leaves, tuple(g)))
    terms = float(upstream.abs().sum()), batch.rewards.shape[-1]
    for exact, found in zip(*gradients, strict=True):
        close(found.cpu(), exact, terms)


@pytest.mark.parametrize("group_size", [0, 1, 3, 8, 45], ids=lambda n: f"of{n}" if n else "ids")
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
def test_group_advantages(baseline, scale, group_size):
    """As tests/cuda/test_group_advantages_emulated.py derives it."""
    batch = group_batch(baseline, group_size=group_size)
    for singleton, unbiased in itertools.product(("zero", "raw"), (True, False)):
        options = GroupOptions(baseline, scale, unbiased, 1e-4, singleton)
        exact = groups.group_advantages(in_double(batch), options)
        found = OPS.group_advantages(*on_gpu(batch), options.numbers())
        torch.testing.assert_close(found.cpu().double(), exact, rtol=2 * U, atol=1e-11)


@pytest.mark.parametrize("group_size", [0, 4], ids=["ids", "of4"])
@pytest.mark.parametrize("normalized", [False, True])
def test_several_rewards(normalized, group_size):
    batch = group_batch("mean", 3, group_size)
    options = GroupOptions(joined=True, normalized=normalized)
    exact = groups.group_advantages(in_double(batch), options)
    found = OPS.group_advantages(*on_gpu(batch), options.numbers())
    torch.testing.assert_close(found.cpu().double(), exact, rtol=2 * U, atol=1e-11)


@pytest.mark.parametrize("baseline", ["mean", "pass_at_k", "length_weighted"])
def test_many_rewards_in_groups_of_any_size(baseline):
    count = 65_536
    rewards = torch.randn(count, 1)
    ids = torch.randint(0, 5000, (count,)) * 2**33
    lengths = torch.randint(1, 9000, (count,)).float() if baseline == "length_weighted" else None
    batch, options = GroupBatch(rewards, 0, ids, lengths), GroupOptions(baseline)
    exact = groups.group_advantages(in_double(batch), options)
    found = OPS.group_advantages(*on_gpu(batch), options.numbers())
    torch.testing.assert_close(found.cpu().double(), exact, rtol=2 * U, atol=1e-9)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("size", [1, 2, 5, 4097, 3_000_001])
def test_whiten(size, masked, shift):
    """As tests/cuda/test_whiten_emulated.py derives it; a value of 3 million goes through forty
    joins."""
    x = torch.randn(size + shift)[shift:]
    mask = torch.rand(size) < 0.7 if masked else None
    if masked:
        mask[:2] = True
    exact = whitening.masked_moments(x.double(), mask)
    wanted = whitening.whiten(x.double(), mask, exact, WhitenOptions())
    dirty = x if mask is None else x.masked_fill(~mask, float("nan"))
    whole = torch.cat([torch.zeros(shift), dirty]).cuda()[shift:]
    mask = None if mask is None else mask.cuda()
    moments = OPS.masked_moments(whole, mask)
    torch.testing.assert_close(moments.cpu(), exact, rtol=1e-12, atol=1e-13)
    found = OPS.whiten(whole, mask, moments, WhitenOptions().numbers())
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=2 * U, atol=1e-11, equal_nan=True)


# ---- launches ---------------------------------------------------------------------------------


def test_outputs_are_written_whatever_memory_held():
    for name, tensors, call in calls():
        for _ in range(3):
            gpu.poison_freed_memory(1, 3, 8, 120, *[x.numel() for x in tensors[:2]] * 2)
            out = call(*tensors)
            for x in out if isinstance(out, tuple) else (out,):
                assert x.isfinite().all(), name


def test_the_same_call_twice():
    for name, tensors, call in calls():
        first = call(*tensors)
        assert all(equal(first, call(*tensors)) for _ in range(5)), name


def test_bits_do_not_depend_on_the_neighbours():
    batch, options = on_gpu(scan_batch("gae", (700, 300, 2500))), numbers(options_of("gae"))
    whole = OPS.return_scan(*batch, options)
    alone = mapped(batch, lambda x: x[1:2])
    assert equal(tuple(x[1:2] for x in whole), OPS.return_scan(*alone, options))


def test_the_current_stream_is_used():
    for name, tensors, call in calls():
        given = [x for x in tensors if x is not None]
        assert len(given) == len(tensors) or name == "return_scan"

        def on(*late, call=call, tensors=tensors):
            rest = iter(late)
            return call(*(None if x is None else next(rest) for x in tensors))

        assert equal(gpu.on_another_stream(given, on), call(*tensors)), name


@gpu.needs_two_gpus
def test_the_tensors_device_is_used():
    for name, tensors, call in calls():
        expected = call(*tensors)
        found = call(*(None if x is None else x.to("cuda:1") for x in tensors))
        assert torch.cuda.current_device() == 0
        for a, b in pairs(found, expected):
            assert a.device.index == 1 and torch.equal(a.cpu(), b.cpu()), name


def test_nothing_waits_for_the_gpu():
    """Of the public functions, ragged groups among them."""
    scan = on_gpu(scan_batch("gae", (700, 2500)))
    rewards, values = scan.rewards.requires_grad_(), scan.values.requires_grad_()
    groups_of_any_size = on_gpu(group_batch("mean"))

    def step():
        out = rlkern.gae(
            rewards, values, gamma=0.99, lam=0.95, mask=scan.mask, dones=scan.dones,
            bootstrap_value=scan.bootstrap_value, mask_mode="break",
        )  # fmt: skip
        (out.advantages.sum() + out.returns.sum()).backward()
        rlkern.discounted_returns(rewards.detach(), mask=scan.mask)
        rlkern.vtrace(rewards.detach(), values.detach(), values.detach(), mask=scan.mask)
        rlkern.whiten(out.advantages.detach(), scan.mask)
        score = groups_of_any_size.rewards[:, 0]
        rlkern.group_advantages(score, group_ids=groups_of_any_size.group_ids)
        rlkern.group_advantages(score, group_size=1, singleton="raw")

    gpu.assert_nothing_waits(step)


def test_graph_capture():
    for (name, tensors, call), (_, others, _) in zip(calls(), calls(seed=1), strict=True):
        static = [None if x is None else x.clone() for x in tensors]
        graph, outputs = gpu.captured(lambda call=call, static=static: call(*static))
        for values in (tensors, others):
            for to, x in zip(static, values, strict=True):
                if to is not None:
                    to.copy_(x)
            graph.replay()
            assert equal(outputs, call(*values)), name


def test_against_the_emulated_kernels():
    """The same code on a CPU, which contracts no products and sums: double there and here, so the
    results are the same but for a rounding to fp32 now and then."""
    from emulated_advantages import emulated_advantages
    from emulated_kernels import why_not

    if reason := why_not():
        pytest.skip(reason)
    kernels = emulated_advantages()
    for (name, tensors, call), emulated in zip(
        itertools.islice(calls(), 4),
        (
            lambda *x: kernels.return_scan(*x, None, numbers(options_of("gae", True))),
            lambda *x: kernels.return_scan_bwd(*x, None, numbers(options_of("gae", True))),
            lambda r, ids: kernels.group_advantages(
                r, 0, ids, None, None, None, GroupOptions().numbers()
            ),
            lambda r: kernels.group_advantages(
                r, 8, None, None, None, None, GroupOptions().numbers()
            ),
        ),
        strict=True,
    ):
        expected = emulated(*(None if x is None else x.cpu() for x in tensors))
        found = call(*tensors)
        for a, b in pairs(found, expected):
            torch.testing.assert_close(a.cpu(), b, rtol=2 * U, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    "offsets",
    [[0, -5, 7, 12], [0, 9, 5, 12], [0, 5, 9, 2**60], [0, 5, 9, 11], [1, 5, 9, 12]],
    ids=str,
)
def test_wrong_offsets_give_nan(offsets):
    options = numbers(options_of("gae"))
    tokens = torch.randn(12, device="cuda"), torch.randn(12, device="cuda")
    offsets = torch.tensor(offsets, device="cuda")
    out = OPS.return_scan(*tokens, None, None, None, None, None, offsets, options)
    back = OPS.return_scan_bwd(*tokens, None, None, None, offsets, options)
    assert all(x.isnan().any() for x in (*out, *back))


def test_opcheck():
    batch = on_gpu(scan_batch("gae", (20, 5)))
    leaves = batch._replace(rewards=batch.rewards.requires_grad_())
    torch.library.opcheck(OPS.return_scan.default, (*leaves, numbers(options_of("gae"))))
    given = on_gpu(group_batch("mean"))
    torch.library.opcheck(OPS.group_advantages.default, (*given, GroupOptions().numbers()))
    x = torch.randn(50, device="cuda")
    torch.library.opcheck(OPS.masked_moments.default, (x, None))
    torch.library.opcheck(
        OPS.whiten.default, (x, None, OPS.masked_moments(x, None), WhitenOptions().numbers())
    )


def test_compiles_whole():
    batch = on_gpu(scan_batch("gae", (100, 40)))

    def run(values):
        out = rlkern.gae(batch.rewards, values, gamma=0.99, lam=0.95, mask=batch.mask)
        return (out.advantages * out.returns).sum()

    gradients = []
    for function in (run, torch.compile(run, fullgraph=True)):
        leaf = batch.values.clone().requires_grad_()
        function(leaf).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_tensors_of_two_devices_are_refused():
    x, options = torch.randn(4, 5, device="cuda"), numbers(options_of("gae"))
    with pytest.raises(RuntimeError, match="device"):
        OPS.return_scan(x, x.cpu(), None, None, None, None, None, None, options)
    with pytest.raises(RuntimeError, match="device"):
        OPS.group_advantages(
            x[:, :1].contiguous(), 0, torch.zeros(4, dtype=torch.long), None, None, None,
            GroupOptions().numbers(),
        )  # fmt: skip
    with pytest.raises(RuntimeError, match="device"):
        OPS.masked_moments(x, torch.ones(4, 5, dtype=torch.bool))

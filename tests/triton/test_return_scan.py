"""return_scan in Triton against float64: on a GPU, or in Triton's interpreter.

Tolerance. Everything is computed in float64 from the same fp32 numbers and rounded once, half an
ulp of fp32. Beside it stand the roundings of float64, a few per token, and of gamma and lam, each
passed as two floats and so 2^-48 of itself off. A token's share in a result has at most as many
factors as the sequence has tokens, T, and here the shares' magnitudes add up to less than 100 times
the largest result or 1: 100 T (2^-48 + 4 * 2^-53), below 5e-13 T, of these.
"""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

pytest.importorskip("triton")

from triton_device import DEVICE, INTERPRETED, MARKS, on_gpu  # noqa: E402

import rlkern  # noqa: E402
from rlkern.reference.return_scan import ScanOptions  # noqa: E402
from rlkern.triton import return_scan as kernels  # noqa: E402

pytestmark = MARKS
NAN, INF = math.nan, math.inf
HALF_ULP = 2.0**-24
FLOAT64 = 5e-13
SMALL = 16
OPS = torch.ops.rlkern
KINDS = ("gae", "discounted_returns", "vtrace")


@pytest.fixture
def small_blocks(monkeypatch):
    """The interpreter takes 0.1 ms for each lane of a block and scan."""
    if INTERPRETED:
        monkeypatch.setattr(kernels, "_BLOCK", SMALL)
        monkeypatch.setattr(kernels, "_STATES_BLOCK", SMALL)


def moved(value, dtype):
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().to(DEVICE, dtype if value.is_floating_point() else None)


def random_batch(kind, B, T, *, packed=False, masked=0.7, garbage=NAN, holes=True):
    """What the public function takes, garbage where the mask is false."""
    shape = (B, T)
    batch = {}
    if packed:
        lengths = [random.choice([0, 1, T, T]) for _ in range(B)]
        batch["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        shape = (sum(lengths),)
    mask = torch.rand(shape) < masked
    if not holes and not packed:
        # Padding on either side.
        column = torch.arange(T)
        begin, end = (torch.randint(0, T + 1, (B, 1)) for _ in range(2))
        mask = (column >= begin) & (column < end)
    if not mask.all():
        batch["mask"] = mask
    for name in ("rewards", "values", "log_ratios"):
        batch[name] = torch.where(mask, torch.randn(shape), garbage)
    if kind != "vtrace":
        del batch["log_ratios"]
    if kind == "discounted_returns":
        del batch["values"]
    return batch


def run(kind, batch, backend="triton", dtype=torch.float32):
    """Results, and the gradients of rewards, values and bootstrap_value that there are."""
    batch = {name: moved(value, dtype) for name, value in batch.items()}
    inputs = [name for name in ("rewards", "values", "bootstrap_value") if name in batch]
    if kind != "vtrace":
        for name in inputs:
            batch[name].requires_grad_()
    leaves = [batch[name] for name in inputs]
    first = [batch.pop(name) for name in ("rewards", "values", "log_ratios") if name in batch]
    with rlkern.use_backend(backend):
        out = getattr(rlkern, kind)(*first, **batch)
    out = [out] if isinstance(out, torch.Tensor) else list(out)
    if kind == "vtrace":
        return out
    generator = torch.Generator().manual_seed(0)
    upstream = [
        torch.randn(x.shape, generator=generator).where(
            batch["mask"].cpu() if "mask" in batch else torch.ones(x.shape, dtype=torch.bool), NAN
        )
        for x in out
    ]
    if backend == "eager":
        upstream = [up.nan_to_num(0.0) for up in upstream]
    upstream = [moved(up, dtype) for up in upstream]
    # Without a single token the definition leaves bootstrap_value out.
    grads = torch.autograd.grad(out, leaves, upstream, allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]
    return [x.detach() for x in (*out, *grads)]


def check(kind, batch):
    """Against float64 eager; returns what Triton computed."""
    actual = run(kind, batch)
    wanted = run(kind, batch, "eager", torch.float64)
    for got, right in zip(actual, wanted, strict=True):
        assert got.dtype == torch.float32 and got.shape == right.shape
        error = (got.double() - right).abs()
        largest = max(1.0, right.abs().max().item()) if right.numel() else 1.0
        allowed = HALF_ULP * right.abs() + FLOAT64 * batch["rewards"].shape[-1] * largest
        assert (error <= allowed).all(), (kind, error.max(), got, right)
    return actual


def random_options(kind, batch, B):
    chance = random.random
    shape = batch["rewards"].shape
    options = {"gamma": random.choice([0.97, 0.9, 1.0, 0.0])}
    options["mask_mode"] = random.choice(["carry", "break"])
    if kind != "discounted_returns":
        options["lam"] = random.choice([0.95, 0.3, 1.0, torch.rand(B)])
    if chance() < 0.5:
        options["dones"] = torch.rand(shape) < 0.1
    if chance() < 0.6:
        options["bootstrap_value"] = torch.randn(B)
    if kind == "vtrace":
        for name in ("rho_bar", "c_bar", "rho_pg_bar"):
            options[name] = random.choice([1.0, 1.3, None if name != "c_bar" else 0.7])
    return options


# ---- values and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60 if INTERPRETED else 400))
def test_random_options(seed, small_blocks):
    random.seed(seed)
    torch.manual_seed(seed)
    kind = KINDS[seed % 3]
    block = kernels._BLOCK
    B = random.choice([1, 3])
    batch = random_batch(
        kind,
        B,
        random.choice([1, 5, block - 1, block, block + 1, 2 * block, 3 * block + 5]),
        packed=random.random() < 0.5,
        masked=random.choice([0.0, 0.05, 0.5, 0.9, 1.0]),
        garbage=random.choice([NAN, INF, -INF]),
        holes=random.random() < 0.6,
    )
    check(kind, batch | random_options(kind, batch, B))


@pytest.mark.parametrize("mask_mode", ["carry", "break"])
@pytest.mark.parametrize("kind", KINDS)
def test_gaps_longer_than_a_block(kind, mask_mode, small_blocks):
    """Whole blocks without a counting token, before, between and after the others."""
    torch.manual_seed(1)
    block = kernels._BLOCK
    batch = random_batch(kind, 2, 7 * block + 3)
    mask = torch.zeros(2, 7 * block + 3, dtype=torch.bool)
    mask[0, [block + 2, block + 3, 4 * block - 1, 4 * block, 4 * block + 7]] = True
    mask[1, [0, 7 * block + 2]] = True
    batch["mask"] = mask
    for name in ("rewards", "values", "log_ratios"):
        if name in batch:
            batch[name] = torch.where(mask, torch.randn(mask.shape), NAN)
    check(kind, batch | {"gamma": 0.99, "mask_mode": mask_mode, "bootstrap_value": torch.randn(2)})


@pytest.mark.parametrize("kind", KINDS)
def test_whole_blocks(kind):
    """The size that a call has, in either mode."""
    random.seed(kind)
    torch.manual_seed(2)
    batch = random_batch(kind, 1, kernels._BLOCK + 100)
    for mask_mode in ("carry", "break"):
        check(kind, batch | {"mask_mode": mask_mode, "gamma": 0.99})


def test_gamma_of_10000_steps():
    """gamma^10000 of a last reward: fp32 would have it wrong by 1e-4."""
    rewards = torch.zeros(1, 10_000)
    rewards[0, -1] = 1.0
    (returns, *_) = check("discounted_returns", {"rewards": rewards, "gamma": 0.9999})
    assert returns[0, 0].item() == pytest.approx(0.9999**9999, rel=2 * HALF_ULP)


@on_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("B", "T"), [(1, 300_000), (100_000, 3)])
def test_large_batches(kind, B, T):
    batch = random_batch(kind, B, T, masked=0.9)
    check(kind, batch | {"gamma": 0.99})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("B", "T"), [(0, 5), (2, 0), (0, 0), (1, 1)])
def test_little_or_nothing(kind, B, T, small_blocks):
    check(kind, random_batch(kind, B, T, masked=1.0) | {"bootstrap_value": torch.randn(B)})


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_that_are_all_empty(kind, small_blocks):
    batch = random_batch(kind, 1, 0, masked=1.0)
    batch = {name: value.reshape(0) for name, value in batch.items()}
    check(kind, batch | {"cu_seqlens": torch.zeros(4, dtype=torch.long)})


# ---- independence --------------------------------------------------------------------------------


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_garbage_under_the_mask_changes_nothing(kind, small_blocks):
    results = []
    for garbage in (0.0, NAN, -INF):
        torch.manual_seed(3)
        results.append(run(kind, random_batch(kind, 2, 40, garbage=garbage)))
    assert not any(x.isnan().any() for x in results[0])
    assert all(same(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_again_beside_others_and_elsewhere(kind, small_blocks):
    torch.manual_seed(4)
    T = 3 * SMALL + 5
    batch = random_batch(kind, 3, T)
    first = run(kind, batch)
    assert same(run(kind, batch), first)
    # In rows of another stride and alignment.
    wide = {}
    for name, value in batch.items():
        row = torch.zeros(3, T + 7, dtype=value.dtype)
        row[:, 3 : T + 3] = value
        wide[name] = row.to(DEVICE)[:, 3 : T + 3]
    assert same(run(kind, wide), first)
    alone = run(kind, {name: value[1:2] for name, value in batch.items()})
    assert torch.equal(alone[0], first[0][1:2])
    packed = {name: value.reshape(-1) for name, value in batch.items()}
    packed["cu_seqlens"] = torch.tensor([0, T, 2 * T, 3 * T])
    assert all(
        torch.equal(x.view(y.shape), y) for x, y in zip(run(kind, packed), first, strict=True)
    )


def test_offsets_beyond_32_bits(small_blocks):
    """Rows 2^31 elements apart; on a CPU the memory between them is never touched."""
    apart = 2**31 + 24
    try:
        memory = torch.empty(apart + 8, dtype=torch.float32, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"no address space for 8 GiB: {error}")
    torch.manual_seed(5)
    batch = random_batch("gae", 2, 8, masked=1.0)
    far = memory.as_strided((2, 8), (apart, 1))
    far.copy_(batch["values"])
    assert same(run("gae", batch | {"values": far}), run("gae", batch))


@pytest.mark.parametrize(
    "offsets", [[0, 30, 10], [5, 20, 10], [-7, 3, 30], [0, 4, 90], [90, 95, -3]]
)
@pytest.mark.parametrize("mask_mode", ["carry", "break"])
def test_offsets_that_lie_stay_inside_the_tensors(offsets, mask_mode, small_blocks, monkeypatch):
    """Values of offsets cannot be looked at on a GPU. No memory beside the tensors is read (NaN in
    the results of sequences) or written, and what no sequence holds is NaN."""
    total, guard = 30, 128
    around = []

    new_empty = torch.Tensor.new_empty

    def guarded(self, size, **kwargs):
        if isinstance(size, int):  # the interpreter's own
            return new_empty(self, size, **kwargs)
        memory = torch.full((math.prod(size) + 2 * guard,), 7.0, device=self.device)
        around.append(memory)
        return memory[guard : memory.numel() - guard].view(size)

    def inside(value, fill):
        memory = torch.full((total + 2 * guard,), fill, dtype=value.dtype, device=DEVICE)
        memory[guard : guard + total] = value
        return memory[guard : guard + total]

    monkeypatch.setattr(torch.Tensor, "new_empty", guarded)
    floats = [inside(torch.ones(total), NAN) for _ in range(3)]
    flags = [inside(torch.arange(total) % 3 > 0, True) for _ in range(2)]
    places = torch.tensor(offsets, device=DEVICE)
    numbers = [float(x) for x in ScanOptions(0.9, 0.9, mask_mode == "break")]
    out = kernels.forward(*floats, *flags, None, None, places, numbers)
    grads = kernels.backward(*floats[:2], *flags, None, places, numbers)
    held = torch.zeros(total, dtype=torch.bool)
    for begin, end in itertools.pairwise(offsets):
        held[max(begin, 0) : max(end, 0)] = True
    between = torch.zeros(total, dtype=torch.bool)
    between[max(offsets[0], 0) : max(offsets[-1], 0)] = True
    assert not grads[2].isnan().any()
    for x in (*out, *grads[:2]):
        assert x[~held].isnan().all()
        # Elsewhere a sequence and the NaN may fall onto the same token.
        assert not x[held & between].isnan().any()
    for memory in around:
        assert (memory[:guard] == 7.0).all() and (memory[-guard:] == 7.0).all()


@pytest.mark.parametrize("offsets", [[0, 5, 9], [2, 5, 12], [12, 12, 0]])
def test_what_no_sequence_holds_is_nan(offsets, small_blocks):
    numbers = [float(x) for x in ScanOptions(0.9, 0.9, False)]
    rewards, values = (torch.ones(12, device=DEVICE) for _ in range(2))
    places = torch.tensor(offsets, device=DEVICE)
    out = OPS.return_scan_triton(rewards, values, *[None] * 5, places, numbers)
    grads = OPS.return_scan_bwd_triton(rewards, values, *[None] * 3, places, numbers)
    held = torch.zeros(12, dtype=torch.bool)
    held[offsets[0] : offsets[-1]] = True
    for x in (*out, *grads[:2]):
        assert torch.equal(x.isnan().cpu(), ~held)
    with pytest.raises(ValueError, match="rise from 0 to 12, got one value"):
        OPS.return_scan_triton(rewards, values, *[None] * 5, places[:1], numbers)


# ---- the operators -------------------------------------------------------------------------------


def test_operators_pass_opcheck(small_blocks):
    torch.manual_seed(6)
    rewards, values = torch.randn(2, 2, 5, device=DEVICE, requires_grad=True).unbind()
    mask = torch.rand(2, 5, device=DEVICE) < 0.7
    bootstrap = torch.randn(2, device=DEVICE, requires_grad=True)
    numbers = [float(x) for x in ScanOptions(0.9, 0.9, False)]
    given = (mask, None, None, None, numbers)
    torch.library.opcheck(
        OPS.return_scan_triton.default,
        (
            rewards.detach().requires_grad_(),
            values.detach(),
            None,
            *given[:2],
            bootstrap,
            *given[2:],
        ),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    torch.library.opcheck(
        OPS.return_scan_bwd_triton.default,
        (rewards.detach(), values.detach(), *given),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_tensors_that_would_be_misread_are_refused():
    rewards = torch.zeros(2, 4, device=DEVICE)
    nothing = [None] * 7
    numbers = [float(x) for x in ScanOptions(0.9, 0.9, False)]
    with pytest.raises(TypeError, match="float32"):
        kernels.forward(rewards.double(), *nothing, numbers)
    with pytest.raises(ValueError, match="consecutive along a sequence"):
        kernels.forward(rewards, torch.zeros(4, 2, device=DEVICE).t(), *nothing[1:], numbers)
    with pytest.raises(ValueError, match="values: expected with log_ratios"):
        kernels.forward(rewards, None, rewards, *nothing[2:], numbers)
    with pytest.raises(ValueError, match="2 float32, one per sequence"):
        kernels.forward(rewards, *nothing[:4], torch.zeros(1, device=DEVICE), *nothing[5:], numbers)
    with pytest.raises(ValueError, match="6 numbers"):
        kernels.forward(rewards, *nothing, numbers[:3])


@on_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_for_the_gpu(kind):
    batch = {n: moved(x, torch.float32) for n, x in random_batch(kind, 3, 50).items()}
    first = [batch.pop(name) for name in ("rewards", "values", "log_ratios") if name in batch]

    def call():
        with rlkern.use_backend("triton"):
            return getattr(rlkern, kind)(*first, **batch)

    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")

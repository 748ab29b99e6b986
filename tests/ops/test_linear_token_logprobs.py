"""linear_token_logprobs against float64 eager PyTorch, and against token_logprobs of the logits.

Tolerances. A logit is a sum of D products rounded in its dtype's arithmetic: fp32 products are good
to D 2^-24 of the sum of magnitudes. For 16-bit types the stated bound is that of the same lines in
eager PyTorch, measured on the same inputs, and a little more: the logits are rounded alike.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import rlkern
from rlkern.ops import _head

V, D = 211, 24
FEW = 64 * V * 4  # a budget of 64 tokens in fp32: several chunks below
NAN = float("nan")


def inputs(shape=(3, 70), dtype=torch.float32, vocab=V, bias=True):
    hidden = torch.randn(*shape, D).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, D) / 2).to(dtype).requires_grad_()
    given = {"mask": torch.rand(shape) < 0.7}
    if bias:
        given["bias"] = torch.randn(vocab).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(vocab, shape), given


def eager(hidden, weight, ids, *, bias=None, mask=None, temperature=1.0, softcap=None,
          logit_scale=1.0):  # fmt: skip
    """The lines of a trainer; float64 in, float64 out."""
    z = F.linear(hidden, weight, bias) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.expand(ids.shape)[..., None]
    p = (z / temperature).to(torch.promote_types(z.dtype, torch.float32)).log_softmax(-1)
    logprobs = p.gather(-1, ids[..., None]).squeeze(-1)
    entropy = -(p.exp() * p).sum(-1)
    if mask is not None:
        logprobs, entropy = logprobs.where(mask, 0.0), entropy.where(mask, 0.0)
    return logprobs, entropy


def leaves(*tensors):
    return [t.detach().double().requires_grad_() for t in tensors]


def results(function, hidden, weight, ids, given, upstream):
    """logprobs, entropy, and the gradients of hidden, weight and bias."""
    logprobs, entropy = function(hidden, weight, ids, **given)
    wanted = [hidden, weight] + ([given["bias"]] if given.get("bias") is not None else [])
    g, h = (u.to(logprobs.dtype) for u in upstream)
    grads = torch.autograd.grad((g * logprobs + h * entropy).sum(), wanted)
    return [logprobs.detach(), entropy.detach(), *grads]


def truth(hidden, weight, ids, given, upstream):
    h, w = leaves(hidden, weight)
    given = dict(given)
    if given.get("bias") is not None:
        (given["bias"],) = leaves(given["bias"])
    return results(eager, h, w, ids, given, upstream)


def ours(hidden, weight, ids, **options):
    return rlkern.linear_token_logprobs(hidden, weight, ids, return_entropy=True, **options)


def distance(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


OPTIONS = [
    {},
    {"temperature": 0.7, "logit_scale": 0.25},
    {"softcap": 3.0, "logit_scale": 2.0},
    {"softcap": 3.0, "temperature": "per token", "logit_scale": 0.5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("budget", [FEW, 1 << 30], ids=["chunks", "one chunk"])
def test_equals_float64(backend, options, budget):
    hidden, weight, ids, given = inputs()
    options = dict(options)
    if options.get("temperature") == "per token":
        options["temperature"] = torch.rand(3, 1) + 0.5
    upstream = torch.randn(2, *ids.shape)
    expected = truth(hidden, weight, ids, given | options, upstream)
    given = given | options | {"memory_budget": budget}
    actual = results(ours, hidden, weight, ids, given, upstream)
    for value, exact in zip(actual, expected, strict=True):
        assert value.dtype == torch.float32
        # D products and V terms of a sum, each rounded by 2^-24, and exp of a z of up to 20.
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_worse_than_eager_in_its_dtype(backend, dtype):
    hidden, weight, ids, given = inputs(dtype=dtype)
    upstream = torch.randn(2, *ids.shape)
    expected = truth(hidden, weight, ids, given, upstream)
    theirs = results(eager, hidden, weight, ids, given, upstream)
    actual = results(ours, hidden, weight, ids, given | {"memory_budget": FEW // 2}, upstream)
    for mine, other, exact in zip(actual, theirs, expected, strict=True):
        # A quarter of the type's rounding on top: the parts of the weight's gradient are rounded
        # before they are added, eager's whole sum once.
        assert distance(mine, exact) <= distance(other, exact) + torch.finfo(dtype).eps / 4


@pytest.mark.parametrize("vocab", [1, 2, 50257, 151936])
def test_vocabularies(backend, vocab):
    hidden, weight, ids, given = inputs((5,), vocab=vocab, bias=False)
    upstream = torch.randn(2, 5)
    expected = truth(hidden, weight, ids, given, upstream)
    actual = results(ours, hidden, weight, ids, given, upstream)
    for value, exact in zip(actual, expected, strict=True):
        # In norm: a gradient of hidden is a sum over the vocabulary, with an error of its own.
        assert distance(value, exact) <= 1e-5


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0), (65,), (2, 3, 4)], ids=str)
def test_shapes(backend, shape):
    hidden, weight, ids, given = inputs(shape, bias=False)
    upstream = torch.randn(2, *shape)
    expected = truth(hidden, weight, ids, given, upstream)
    actual = results(ours, hidden, weight, ids, given, upstream)
    for value, exact in zip(actual, expected, strict=True):
        assert value.shape == exact.shape
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=2e-5)


def test_float64_and_gradcheck():
    hidden, weight, ids, given = inputs((2, 5), dtype=torch.float64, vocab=13)
    options = {"temperature": 0.8, "softcap": 4.0, "logit_scale": 0.5, "mask": given["mask"]}

    def function(h, w, b):
        return tuple(ours(h, w, ids, bias=b, **options))

    assert torch.autograd.gradcheck(function, (hidden, weight, given["bias"]))


def test_masked_tokens_cost_and_change_nothing(backend):
    hidden, weight, ids, given = inputs(bias=False)
    mask = given["mask"]
    upstream = torch.randn(2, *ids.shape)
    clean = results(ours, hidden, weight, ids, {"mask": mask}, upstream)
    spoilt = hidden.detach().clone()
    spoilt[~mask] = NAN
    ids = ids.where(mask, -100)
    dirty = results(ours, spoilt.requires_grad_(), weight, ids, {"mask": mask}, upstream)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert (clean[0][~mask] == 0).all() and (clean[2][~mask] == 0).all()
    nothing = results(ours, hidden, weight, ids.clamp(min=0), {"mask": mask & False}, upstream)
    assert all((value == 0).all() for value in nothing)


def test_same_as_token_logprobs_of_the_logits(backend):
    hidden, weight, ids, _ = inputs((40,), bias=False)
    with torch.no_grad():
        logits = torch.mm(hidden, weight.t())
        expected = rlkern.token_logprobs(logits, ids, return_entropy=True)
        actual = ours(hidden, weight, ids)
    assert torch.equal(actual.logprobs, expected.logprobs)
    assert torch.equal(actual.entropy, expected.entropy)
    assert torch.equal(actual.logprobs, rlkern.linear_token_logprobs(hidden, weight, ids).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_invariant(backend, dtype):
    hidden, weight, ids, _ = inputs((300,), dtype=dtype, vocab=1003, bias=False)
    options = {"batch_invariant": True, "memory_budget": 128 * 1003 * hidden.element_size()}

    def run(rows):
        part = hidden.detach()[rows].requires_grad_()
        logprobs = rlkern.linear_token_logprobs(part, weight, ids[rows], **options)
        return logprobs.detach(), torch.autograd.grad(logprobs.sum(), part)[0]

    whole = run(slice(None))
    for rows in (slice(0, 1), slice(7, 8), slice(3, 67), slice(100, 300), slice(299, 300)):
        for part, of_whole in zip(run(rows), whole, strict=True):
            assert torch.equal(part, of_whole[rows])


def test_only_the_products_that_are_needed(backend, monkeypatch):
    """In products of N D V: one forward, and one more for each gradient; of several chunks the
    logits once more."""
    hidden, weight, ids, _ = inputs((64,), bias=False)
    counted = []
    for name in ("mm", "addmm"):
        real = getattr(torch, name)

        def count(*args, real=real, **kwargs):
            counted.append(1)
            return real(*args, **kwargs)

        monkeypatch.setattr(torch, name, count)
    real_add = torch.Tensor.addmm_

    def count_add(*args, **kwargs):
        counted.append(1)
        return real_add(*args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "addmm_", count_add)

    def products(h, w, ids=ids, retain_graph=False, **options):
        counted.clear()
        out = rlkern.linear_token_logprobs(h, w, ids, **options)
        if out.requires_grad:
            out.sum().backward(retain_graph=retain_graph)
        return len(counted)

    frozen = weight.detach()
    assert products(hidden, weight) == 3
    assert products(hidden, frozen) == 2
    assert products(hidden.detach(), weight) == 2
    assert products(hidden.detach(), frozen) == 1
    with torch.no_grad():
        assert products(hidden, weight) == 1
    twice = torch.cat([hidden, hidden])
    assert products(twice, weight, torch.cat([ids, ids]), memory_budget=FEW) == 8
    assert products(hidden, weight, retain_graph=True) == 4
    assert products(hidden, weight, batch_invariant=True) == 4


def saved_sizes(function):
    """What a call saves for its backward, in numbers of values; and its result."""
    sizes = []

    def pack(x):
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        found = function()
    return sizes, found


KEPT = [
    {},
    {"bias": None, "softcap": 3.0, "temperature": 0.7, "logit_scale": 1.5},
    {"logits_dtype": torch.float32},
    {"mask": torch.zeros(3, 70, dtype=torch.bool)},
    {"mask": torch.zeros(3, 70, dtype=torch.bool).index_fill(1, torch.tensor([2, 9]), True)},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", KEPT, ids=str)
def test_logits_that_are_kept_give_the_gradients_of_made_ones(backend, dtype, options):
    """Bit for bit: whichever way the backward came by its logits, and as often as it runs."""
    hidden, weight, ids, given = inputs(dtype=dtype)
    given |= options
    wanted = [hidden, weight] + ([] if given["bias"] is None else [given["bias"]])
    sizes, (logprobs, entropy) = saved_sizes(lambda: ours(hidden, weight, ids, **given))
    assert given["mask"].sum() * V in sizes
    upstream = torch.randn(2, *ids.shape)
    loss = (torch.stack([logprobs, entropy]) * upstream).sum()
    made = torch.autograd.grad(loss, wanted, retain_graph=True)
    again = torch.autograd.grad(loss, wanted, retain_graph=True)
    kept = torch.autograd.grad(loss, wanted)
    for one, two, three in zip(made, again, kept, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_logits_are_kept_within_the_budget_only(backend):
    """And not where no backward is to come, nor a whole chunk for fewer tokens."""
    hidden, weight, ids, _ = inputs((65,), bias=False)

    def saved(h, w, **options):
        ids_of = ids[: h.shape[0]]
        sizes, _ = saved_sizes(lambda: rlkern.linear_token_logprobs(h, w, ids_of, **options))
        return max(sizes, default=0)

    assert saved(hidden, weight) == 65 * V
    assert saved(hidden[:64], weight, memory_budget=FEW) == 64 * V
    assert saved(hidden, weight, memory_budget=FEW) == weight.numel()
    assert saved(hidden, weight, batch_invariant=True) == weight.numel()
    assert saved(hidden.detach(), weight.detach()) == 0
    with torch.no_grad():
        assert saved(hidden, weight) == 0


@pytest.mark.parametrize("hooked", [False, True], ids=["plain", "saved tensors' hooks"])
def test_a_backward_that_failed_can_be_repeated(backend, monkeypatch, hooked):
    """Though the gradient had taken the place of the logits before memory ran out."""
    hidden, weight, ids, _ = inputs((40,), bias=False)

    def loss():
        return rlkern.linear_token_logprobs(hidden, weight, ids).sum()

    expected = torch.autograd.grad(loss(), [hidden, weight])
    sizes, found = saved_sizes(loss) if hooked else ([40 * V], loss())
    assert 40 * V in sizes

    def out_of_memory(*_):
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(_head.GradientSum, "add_product", out_of_memory)
        with pytest.raises(MemoryError, match="no room"):
            torch.autograd.grad(found, [hidden, weight])
    for again, exact in zip(torch.autograd.grad(found, [hidden, weight]), expected, strict=True):
        assert torch.equal(again, exact)


def test_who_exports_is_not_made_to_guard_on_the_number_of_tokens():
    """A budget of 64 tokens stands in the graph as a number of rows, not as a bound on them."""
    hidden, weight, ids, _ = inputs((50,), bias=False)

    class Model(torch.nn.Module):
        def forward(self, h, w, tokens):
            return rlkern.linear_token_logprobs(h, w, tokens, memory_budget=FEW)

    count = torch.export.Dim("tokens", min=2, max=4096)
    exported = torch.export.export(
        Model(), (hidden, weight, ids), dynamic_shapes=({0: count}, None, {0: count})
    )
    more = torch.cat([hidden, hidden]), weight, torch.cat([ids, ids])
    torch.testing.assert_close(exported.module()(*more), Model()(*more))


def test_tied_embeddings(backend):
    _, weight, ids, _ = inputs((40,), bias=False)
    tokens = torch.randint(V, (40,))

    def loss(function, w):
        return function(torch.tanh(w[tokens]), w, ids)[0].sum()

    (exact,) = leaves(weight)
    (expected,) = torch.autograd.grad(loss(eager, exact), exact)
    (actual,) = torch.autograd.grad(loss(ours, weight), weight)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=2e-5)


def test_accumulation_over_micro_batches(backend):
    hidden, weight, ids, given = inputs((80,), bias=False)
    del given["mask"]
    upstream = torch.randn(2, 80)
    expected = truth(hidden, weight, ids, given, upstream)
    for rows in (slice(0, 30), slice(30, 80)):
        out = ours(hidden[rows], weight, ids[rows])
        (out.logprobs * upstream[0, rows] + out.entropy * upstream[1, rows]).sum().backward()
    torch.testing.assert_close(weight.grad.double(), expected[3], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(hidden.grad.double(), expected[2], rtol=1e-5, atol=2e-5)


def test_autocast(backend):
    hidden, weight, ids, given = inputs(bias=True)
    upstream = torch.randn(2, *ids.shape)
    with torch.autocast("cpu", torch.bfloat16):
        actual = results(ours, hidden, weight, ids, given, upstream)
        half = {n: x.bfloat16() if n == "bias" else x for n, x in given.items()}
        expected = ours(hidden.bfloat16(), weight.bfloat16(), ids, **half)
    assert torch.equal(actual[0], expected.logprobs) and actual[3].dtype == torch.float32


def test_activation_checkpointing(backend):
    hidden, weight, ids, given = inputs()
    upstream = torch.randn(2, *ids.shape)
    plain = results(ours, hidden, weight, ids, given, upstream)

    def inside(h, w, i, **options):
        return checkpoint(lambda *a: tuple(ours(*a, **options)), h, w, i, use_reentrant=False)

    again = results(inside, hidden, weight, ids, given, upstream)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_compiles(backend):
    hidden, weight, ids, given = inputs()
    upstream = torch.randn(2, *ids.shape)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    plain = results(ours, hidden, weight, ids, given, upstream)
    again = results(compiled, hidden, weight, ids, given, upstream)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_opcheck(backend):
    hidden, weight, ids, given = inputs((70,))
    arguments = (
        hidden, weight, given["bias"], ids, given["mask"], None, 1.0, None, True, True, 64, False,
        False, backend,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.rlkern.linear_token_logprobs, arguments)
    logprobs, entropy, state, _ = torch.ops.rlkern.linear_token_logprobs(*arguments)
    factors = [x.detach() for x in (hidden, weight, given["bias"])]
    torch.library.opcheck(
        torch.ops.rlkern.linear_token_logprobs_bwd,
        (
            torch.randn(70), None, *factors, ids, given["mask"], None, 1.0, None,
            logprobs.detach(), entropy.detach(), state, 64, False, False, backend,
            [True, True, False],
        ),
    )  # fmt: skip


def test_repeats_bit_for_bit(backend):
    hidden, weight, ids, given = inputs(dtype=torch.bfloat16)
    upstream = torch.randn(2, *ids.shape)
    given["memory_budget"] = FEW
    first = results(ours, hidden, weight, ids, given, upstream)
    again = results(ours, hidden, weight, ids, given, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_second_derivatives_are_refused():
    hidden, weight, ids, _ = inputs((8,), bias=False)
    (grad,) = torch.autograd.grad(
        rlkern.linear_token_logprobs(hidden, weight, ids).sum(), hidden, create_graph=True
    )
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()


def test_second_derivatives_are_refused_of_a_graph_that_is_not_kept():
    hidden, weight, ids, _ = inputs((8,), bias=False)
    loss = rlkern.linear_token_logprobs(hidden, weight, ids).sum()
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True, retain_graph=False)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(grad.pow(2).sum(), weight)


X, W, IDS = torch.zeros(2, 3, D), torch.zeros(V, D), torch.zeros(2, 3, dtype=torch.long)
REFUSED = [
    ({"hidden": [0]}, TypeError, "hidden: expected a torch.Tensor, got list"),
    ({"hidden": X.long()}, TypeError, "hidden: expected float32"),
    ({"hidden": X[..., :0]}, ValueError, r"hidden: expected shape \[..., D\]"),
    ({"weight": W[:, :3]}, ValueError, rf"weight: expected shape \[V, {D}\]"),
    ({"weight": W[:0]}, ValueError, "weight: expected shape"),
    ({"weight": W.bfloat16()}, TypeError, "weight: expected torch.float32 .hidden's dtype"),
    ({"weight": W.to("meta")}, ValueError, "weight: expected device cpu .hidden's., got meta"),
    ({"bias": W[:, 0][:-1]}, ValueError, rf"bias: expected shape \[{V}\]"),
    ({"bias": W[:, 0].double()}, TypeError, "bias: expected torch.float32"),
    ({"token_ids": IDS[:1]}, ValueError, r"token_ids: expected shape \[2, 3\] .hidden without"),
    ({"token_ids": IDS.float()}, TypeError, "token_ids: expected int64 or int32"),
    ({"token_ids": IDS + V}, ValueError, rf"token_ids: expected values in \[0, {V}\)"),
    ({"mask": IDS[:1]}, ValueError, r"mask: expected shape \[2, 3\]"),
    ({"mask": X[..., 0]}, TypeError, "mask: expected bool"),
    ({"temperature": 0.0}, ValueError, "temperature: expected a positive"),
    ({"temperature": torch.ones(5)}, ValueError, "temperature: expected a shape that broadcasts"),
    ({"softcap": -1.0}, ValueError, "softcap: expected a positive"),
    ({"logit_scale": 0}, ValueError, "logit_scale: expected a positive"),
    ({"memory_budget": 1.5}, TypeError, "memory_budget: expected an int, got float"),
    ({"memory_budget": 0}, ValueError, "memory_budget: expected at least 1 byte"),
    ({"batch_invariant": 1}, TypeError, "batch_invariant: expected a bool, got 1"),
]


@pytest.mark.parametrize(
    ("change", "error", "message"), REFUSED, ids=[message[:40] for *_, message in REFUSED]
)
def test_refuses(change, error, message):
    given = {"hidden": X, "weight": W, "token_ids": IDS} | change
    with pytest.raises(error, match=message):
        rlkern.linear_token_logprobs(**given)


def test_refuses_tangents():
    import torch.autograd.forward_ad as forward

    with forward.dual_level(), pytest.raises(RuntimeError, match="weight: expected a tensor"):
        rlkern.linear_token_logprobs(X, forward.make_dual(W, W), IDS)

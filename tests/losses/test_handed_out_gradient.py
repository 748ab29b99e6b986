"""On the CPU a backward returns the gradient that the forward wrote, for an upstream of 1: never in
a way that a caller could notice, but for its address."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rlkern import PolicyLoss, ValueLoss, _backend, kl_penalty, use_backend

X = torch.linspace(-2, -0.1, 24).reshape(4, 6)
MASK = torch.arange(6) < torch.tensor([[6], [2], [0], [5]])
ADVANTAGES = torch.tensor([1.0, -2.0, 0.5, 3.0])


def policy(x, **given):
    loss = PolicyLoss.preset("grpo")
    return loss(x, ADVANTAGES, old_logprobs=X, ref_logprobs=X + 0.1, mask=MASK, **given).loss


def sequence_policy(x):
    return PolicyLoss.preset("gspo")(x, ADVANTAGES, old_logprobs=X, mask=MASK).loss


def bonus(x):
    """The entropy's gradient."""
    loss = PolicyLoss(entropy_coef=0.1)
    return loss(X, ADVANTAGES, old_logprobs=X, entropy=x, mask=MASK).loss


def value(x):
    return ValueLoss()(x, X + 1, old_values=X, mask=MASK).loss


LOSSES = [policy, sequence_policy, bonus, value]


@pytest.fixture(autouse=True)
def _native():
    if _backend.why_not("policy_loss", "native", "cpu", torch.float32):
        pytest.skip("no native kernels")
    with use_backend("native"):
        yield


@pytest.fixture(params=LOSSES, ids=lambda loss: loss.__name__)
def loss(request):
    return request.param


def leaf():
    return (X + 0.05 * X.flip(0)).requires_grad_()


def expected(loss):
    x = leaf()
    with use_backend("eager"):
        (grad,) = torch.autograd.grad(loss(x), x)
    assert grad.abs().max() > 0
    return grad


def close(actual, wanted):
    torch.testing.assert_close(actual, wanted, rtol=2e-6, atol=1e-8)


def test_it_is_handed_out_where_the_graph_ends(loss):
    x = leaf()
    out = loss(x)
    addresses = [saved.data_ptr() for saved in out.grad_fn.saved_tensors]
    (grad,) = torch.autograd.grad(out, x)
    assert grad.data_ptr() in addresses
    close(grad, expected(loss))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, x)


def test_a_kept_graph_gives_a_tensor_of_its_own(loss):
    x = leaf()
    out = loss(x)
    grads = []
    for keep in (True, True, False):
        (grad,) = torch.autograd.grad(out, x, retain_graph=keep)
        close(grad, expected(loss))
        grads.append(grad)
        grad.fill_(float("nan"))
    assert len({grad.data_ptr() for grad in grads}) == 3


def test_gradients_accumulate_in_a_leaf(loss):
    x = leaf()
    for _ in range(3):
        loss(x).backward()
    close(x.grad, 3 * expected(loss))
    out = loss(x)
    x.grad = None
    out.backward(retain_graph=True)
    x.grad.zero_()
    out.backward()
    close(x.grad, expected(loss))


def test_any_upstream_gradient(loss):
    wanted = expected(loss)
    for factor in (0.0, 1.0, -2.5):
        x = leaf()
        loss(x).backward(torch.tensor(factor))
        close(x.grad, factor * wanted)
    x = leaf()
    out = loss(x)
    (out + out).backward()
    close(x.grad, 2 * wanted)


def test_hooks_see_and_change_it(loss):
    x = leaf()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        out = loss(x)
    x.register_hook(lambda grad: grad.mul_(2))
    out.backward()
    close(x.grad, 2 * expected(loss))


def test_under_a_transform(loss):
    x = leaf()
    upstream = torch.tensor([1.0, 1.0, -3.0])
    (grads,) = torch.autograd.grad(loss(x), x, upstream, is_grads_batched=True)
    close(grads, upstream[:, None, None] * expected(loss))


def test_of_tensors_without_data():
    mode = FakeTensorMode()
    x, y = (mode.from_tensor(t) for t in (leaf(), X))
    with mode:
        PolicyLoss(clip_low=0.2)(x, y, old_logprobs=y).loss.backward()
        ValueLoss(clip=None)(x, y).loss.backward()
    assert x.grad.shape == X.shape


def test_every_node_has_the_name_of_its_operator(loss):
    wanted = "value_loss" if loss is value else "policy_loss"
    assert wanted in type(loss(leaf()).grad_fn).__name__
    assert "kl_penalty" in type(kl_penalty(leaf(), X).grad_fn).__name__


def test_only_first_derivatives(loss):
    x = leaf()
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(loss(x), x, create_graph=True)

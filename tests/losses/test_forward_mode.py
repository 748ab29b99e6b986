"""The losses are differentiated backwards only, and say so."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

import rlkern
from rlkern import PolicyLoss


def _called(name, x):
    """Each differentiable input of a loss, x, in its place."""
    others = -torch.rand(2, 3)
    loss = PolicyLoss.preset("ppo", entropy_coef=0.1)
    return {
        "logprobs": lambda: loss(x, torch.ones(2), old_logprobs=others, entropy=others),
        "entropy": lambda: loss(others, torch.ones(2), old_logprobs=others, entropy=x),
        "values": lambda: rlkern.ValueLoss(clip=None)(x, others),
        "kl logprobs": lambda: rlkern.kl_penalty(x, others),
        "ref_logprobs": lambda: rlkern.kl_penalty(others, x),
    }[name]()


@pytest.mark.parametrize("name", ["logprobs", "entropy", "values", "kl logprobs", "ref_logprobs"])
@pytest.mark.parametrize("backend", ["native", "eager"])
def test_forward_mode_is_refused(name, backend):
    """A kernel would drop the tangent and give a derivative of 0."""
    argument = name.split()[-1]
    x = -torch.rand(2, 3)
    with rlkern.use_backend(backend), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(RuntimeError, match=f"{argument}: .* forward-mode tangent"):
            _called(name, dual)


def test_an_objective_hands_out_nothing_that_could_be_changed():
    loss = PolicyLoss.preset("ppo")
    assert isinstance(loss._numbers, tuple) and not hasattr(loss, "numbers")

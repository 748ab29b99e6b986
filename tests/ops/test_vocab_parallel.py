"""A vocabulary spread over processes gives what the whole gives.

Tolerances. A part's log-sum is rounded to fp32 once more than the whole's, 2^-24 of at most log V
plus the spread of the row's maxima, and its gradients follow it: 1e-6 of the value or of 1 covers
both. 16-bit gradients are rounded from those, and may fall on the other side: one unit, 2^-8.
"""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing as mp
from columns_of_parts import CASES, WIDTHS, V, hidden_case, logits_case, process

import rlkern
from rlkern.ops import _register
from rlkern.ops._checks import ELSEWHERE

RANKS = range(len(WIDTHS))
ALL = slice(None)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("columns")
    mp.spawn(process, (str(folder / "store"), str(folder)), nprocs=len(WIDTHS))
    return [torch.load(folder / f"{rank}.pt") for rank in RANKS]


def assert_close(actual, expected, rtol):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol, equal_nan=True)


@pytest.mark.parametrize("name", CASES)
def test_logits(parts, name):
    whole = logits_case(name, ALL, None)
    rtol = 1e-12 if name == "float64" else 1e-6
    for place, expected in enumerate(whole[:2]):
        for part in parts:
            assert_close(part[name][place], expected, rtol)
            # The same bits on every rank.
            first, same = (x[name][place] for x in (parts[0], part))
            assert same.nan_to_num(nan=7.0).equal(first.nan_to_num(nan=7.0))
    gradient = torch.cat([part[name][2] for part in parts], -1)
    assert_close(gradient, whole[2], 2.0**-8 if name == "bf16" else rtol)


def test_a_token_with_nearly_all_the_mass_keeps_its_log_probability(parts):
    for part in parts:
        exact = -torch.tensor(-17.0, dtype=torch.float64).exp().log1p()
        assert_close(part["fp32"][0][7].double() / exact, torch.ones_like(exact), 1e-6)


def test_hidden_states(parts):
    """A product of 12 terms rounds to 12 * 2^-24 of its magnitudes, a sum of 150 tokens' gradients
    to as much of theirs: 1e-5 of the largest entry."""
    whole = hidden_case(ALL, None)
    for place in range(3):
        for part in parts:
            assert_close(part["hidden"][place], whole[place], 1e-5)
    for place in (3, 4):
        joined = torch.cat([part["hidden"][place] for part in parts])
        largest = whole[place].abs().max()
        assert_close(joined / largest, whole[place] / largest, 1e-5)


def test_ids_count_over_all_columns(parts):
    for part in parts:
        assert part["refusal"].startswith(f"token_ids: expected values in [0, {V}), got {V + 40}")


def test_what_is_no_group_is_refused():
    with pytest.raises(TypeError, match="vocab_group: expected a torch.distributed process group"):
        rlkern.token_logprobs(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), vocab_group=2)


# ---- a row without its chosen token ---------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_row_whose_chosen_token_is_elsewhere(served_backend, softcap):
    """Its entropy and state are those of any other choice; its gradient that of the others."""
    logits = (2 * torch.randn(5, 203)).to(served_backend.dtype)
    ids = torch.full((5,), ELSEWHERE)
    forward = _register.overload("token_logprobs", served_backend.name)
    logprobs, entropy, state = forward(logits, ids, None, None, 1.0, softcap, True)
    _, same_entropy, same_state = forward(logits, ids * 0 + 9, None, None, 1.0, softcap, True)
    assert logprobs.isnan().all()
    assert_close(entropy, same_entropy, 1e-6)
    assert_close(state, same_state, 1e-6)

    g, h = torch.randn(2, 5, dtype=entropy.dtype)
    logp = torch.full_like(entropy, -1.5)  # of a token in other columns
    grad = _register.overload("token_logprobs_bwd", served_backend.name)(
        g, h, logits, ids, None, None, 1.0, softcap, logp, entropy, state
    )
    z = logits.double()
    slope = 1.0 if softcap is None else 1 - (z / softcap).tanh() ** 2
    z = z if softcap is None else softcap * (z / softcap).tanh()
    p = (z - z.logsumexp(-1, keepdim=True)).exp()
    mean = (p * z).sum(-1, keepdim=True)
    exact = (-g[:, None] * p + h[:, None] * p * (mean - z)) * slope
    # 2^-8 of a value that is rounded to 16 bits, fp32 arithmetic else.
    rtol = 2.0**-8 if logits.element_size() == 2 else 2e-6
    torch.testing.assert_close(grad.double(), exact.double(), rtol=rtol, atol=1e-6)


def test_it_is_no_token_id_of_the_public_functions():
    with pytest.raises(ValueError, match="token_ids: expected values in"):
        rlkern.token_logprobs(torch.zeros(1, 2), torch.tensor([ELSEWHERE]))

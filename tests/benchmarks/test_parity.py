"""Parity with TRL's GRPOTrainer: on recorded completions here, over seeds in the slow test; and
that the verdicts see what is no parity."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import parity, parity_page, report

pytest.importorskip("trl", reason="TRL is the one to compare with")
pytest.importorskip("rlkern_loops", reason="the loop is what is compared")

from rlkern_loops import model  # noqa: E402
from rlkern_loops.grpo import GRPOConfig  # noqa: E402
from rlkern_loops.prepare import prepare  # noqa: E402

from benchmarks import parity_runs as runs  # noqa: E402

OPTIONS = parity.RECORDED | {
    "device": "cpu", "hidden_size": 16, "warm_start_steps": 20, "warm_start_batch_size": 16,
    "prompts_per_step": 6, "group_size": 4, "loss": "dapo", "learning_rate": 3e-3,
}  # fmt: skip
EPS = parity.ADAM_EPS[0]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Rounds of a hardly trained model, its folder, the setting and the options."""
    folder = str(tmp_path_factory.mktemp("parity"))
    config = GRPOConfig(**OPTIONS, output_dir=folder)
    # The task's rule would give this model nothing: a number of right digits has a signal.
    setting = replace(prepare(config, "cpu"), reward=right_digits)
    config = replace(config, model=setting.model)
    policy = model.load(setting.model, config, "cpu")
    return runs.record(policy, setting, config), setting.model, setting, config


def right_digits(prompts, completions, answers, finished):
    pairs = zip(completions, answers, strict=True)
    return torch.tensor([float(sum(map(str.__eq__, text, right))) for text, right in pairs])


@pytest.fixture(scope="module")
def theirs(given):
    return runs.trl_on(*given, EPS)


def test_recorded_completions_make_the_same_updates(given, theirs):
    rounds, *_ = given
    assert all(len(set(of_round.rewards.tolist())) > 1 for of_round in rounds)
    ours = runs.ours_on(*given, EPS)
    assert len(ours.grad_norms) == 6
    found = runs.compare(theirs, ours)
    assert all(difference <= parity_page.BOUND for difference in parity_page.judged(found).values())
    # Or a bound of the move would be idle, and the clip range in no way compared.
    assert found["moved"] > 0.01 and max(ours.clip_frac) > 0.01
    assert theirs.clip_frac == pytest.approx(ours.clip_frac, abs=1e-3)


def test_mini_batches_and_the_rate_are_the_same(given):
    rounds, start, setting, config = given
    config = replace(config, **parity.OBJECTIVES["grpo, mini-batches"])
    trl = runs.trl_on(rounds, start, setting, config, EPS)
    found = parity_page.judged(runs.compare(trl, runs.ours_on(*given[:3], config, EPS)))
    assert len(trl.grad_norms) == 12 and max(found.values()) <= parity_page.BOUND


@pytest.mark.parametrize("change", parity.CONTROLS.values(), ids=parity.CONTROLS)
def test_another_convention_is_seen(given, theirs, change):
    rounds, start, setting, config = given
    other = runs.ours_on(rounds, start, setting, replace(config, **change), EPS)
    found = parity_page.judged(runs.compare(theirs, other))
    assert max(found.values()) > parity_page.BOUND


def test_other_prompts_than_recorded_are_refused(given):
    rounds, start, setting, config = given
    asked, *rest = rounds[0]
    shifted = runs.Recorded([*asked[1:], asked[0]], *rest)  # no longer whole groups
    with pytest.raises(AssertionError, match="other prompts"):
        runs.trl_on([shifted, *rounds[1:]], start, setting, config, EPS)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"unbiased": False}, "unbiased: expected True"),
        ({"baseline": "leave_one_out"}, "baseline: expected 'mean'"),
        ({"loss": "gmpo"}, "loss: expected one of grpo, bnpo"),
        ({"scale": "mean"}, "scale: expected one of std"),
        ({"kl_coef": 0.1, "kl_estimator": "k2"}, "kl_estimator: expected 'k3'"),
    ],
)
def test_what_trl_has_no_equal_of_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        runs.trl_options(GRPOConfig(**OPTIONS | change), 4)


def test_every_option_reaches_trl(tmp_path):
    """A name that TRL's GRPOConfig does not know would be an error of its own, a value that it
    changes would not."""
    from trl import GRPOConfig as Theirs

    told = runs.trl_options(GRPOConfig(**OPTIONS | {"kl_coef": 0.1, "mask_truncated": True}), 4)
    config = Theirs(output_dir=str(tmp_path), **told)
    assert {name: getattr(config, name) for name in told} == told
    assert (told["beta"], told["epsilon"], told["epsilon_high"]) == (0.1, 0.2, 0.28)


# ---- verdicts -----------------------------------------------------------------------------------


def run_of(ours, theirs, seed=1):
    both = {name: {"rewards": [0.1] * 5 + [last] * parity_page.LAST, "accuracy": 0.5, "seconds": 1}
            for name, last in zip(parity_page.TRAINERS, (ours, theirs), strict=True)}  # fmt: skip
    return both | {"seed": seed, "accuracy_before": 0.2}


@pytest.mark.parametrize(
    "pairs, held",
    [
        (((0.4, 0.5), (0.6, 0.55)), True),
        # Ours, 0.5 in the mean, lies beyond [0.51, 0.9]; theirs within [0.0, 1.0].
        (((0.0, 0.51), (1.0, 0.9)), False),
        # The other way round.
        (((0.51, 0.0), (0.9, 1.0)), False),
        (((0.1, 0.8), (0.2, 0.9)), False),
    ],
)
def test_each_mean_must_lie_in_the_others_range(pairs, held):
    content = {"steps": 15, "runs": [run_of(*pair) for pair in pairs]}
    assert parity_page.holds("seeds", content) == held
    assert ("NO" not in parity_page.RENDER["seeds"](content)) == held


def test_a_reward_is_final_in_the_last_steps_alone():
    assert parity_page.final(run_of(0.7, 0.2)["rlkern"]) == pytest.approx(0.7)


SAME = {"grad_norm": 1e-6, "parameters": 1e-6, "move": 1e-6, "move_without_key_biases": 1e-6,
        "coordinate": 1e-3, "moved": 0.03}  # fmt: skip


def recorded_of(difference, control, eps=1e-5):
    three = dict.fromkeys(("trl to rlkern", "trl to float64", "rlkern to float64"), difference)
    norms = {"trl": [1.0, 2.0], "rlkern": [1.0, 2.000001]}
    entry = {"objective": "dapo", "adam_eps": eps, "grad_norms": norms, "clip_frac": norms, **three}
    return {"entries": [entry], "controls": [{"name": "another"} | control], "rewards": [0.1],
            "completions": 8}  # fmt: skip


@pytest.mark.parametrize("name", parity_page.JUDGED)
def test_a_difference_is_no_parity_and_a_control_must_have_one(name):
    apart = SAME | {name: 2e-4}
    assert parity_page.holds("recorded", recorded_of(SAME, apart))
    assert not parity_page.holds("recorded", recorded_of(apart, apart))
    assert not parity_page.holds("recorded", recorded_of(SAME, SAME))


def test_with_the_default_eps_the_keys_biases_do_not_count():
    control = SAME | {"move": 2e-4}
    assert parity_page.holds("recorded", recorded_of(SAME | {"move": 2e-3}, control, eps=1e-8))
    spoilt = SAME | {"move_without_key_biases": 2e-4}
    assert not parity_page.holds("recorded", recorded_of(spoilt, control, eps=1e-8))


def test_the_keys_biases_are_the_middle_of_their_vector():
    start = {"h.0.attn.c_attn.bias": torch.zeros(6), "w": torch.zeros(2)}
    end = {"h.0.attn.c_attn.bias": torch.ones(6), "w": torch.ones(2)}
    other = {"h.0.attn.c_attn.bias": torch.tensor([1.0, 1, 3, 1, 1, 1]), "w": torch.ones(2)}
    found = runs.compare(runs.Trace([2.2], [], start, other), runs.Trace([2.0], [], start, end))
    assert found["move_without_key_biases"] == 0 and found["coordinate"] == 2
    assert found["move"] == pytest.approx(2 / 8**0.5) and found["grad_norm"] == pytest.approx(0.1)


# ---- the page -----------------------------------------------------------------------------------


def test_the_report_writes_the_page_again(tmp_path):
    from test_harness import MACHINE

    contents = {
        "recorded": recorded_of(SAME, SAME | {"move": 0.5}),
        "seeds": {"steps": 15, "runs": [run_of(0.4, 0.5, 1), run_of(0.6, 0.55, 2)]},
    }
    folder = tmp_path / "parity"
    folder.mkdir()
    for part, content in contents.items():
        (folder / f"{part}.json").write_text(json.dumps(content | {"machine": MACHINE}))
    report.write_folder(tmp_path)
    page = (folder / "index.md").read_text()
    assert MACHINE["commit"] in page and "NO" not in page
    for part in contents:
        assert f"({part}.png)" in page
        assert (folder / f"{part}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("given", [["--seeds", "1"], ["--steps", "3"], ["--jobs", "x"], ["else"]])
def test_a_slip_is_named(given, capsys):
    with pytest.raises(SystemExit):
        parity.main(given)
    assert given[0] in capsys.readouterr().err


@pytest.mark.slow
def test_two_seeds_from_the_command_line(tmp_path, capsys):
    """Ten steps teach little, and two seeds are no range: what they do say is that both start
    from one place, and that all of it is kept."""
    code = parity.main(["seeds", "--seeds", "2", "--steps", "10", "--output-dir", str(tmp_path)])
    content = json.loads((tmp_path / "seeds.json").read_text())
    assert code == (not parity_page.holds("seeds", content))
    assert [run["seed"] for run in content["runs"]] == [1, 2]
    for run in content["runs"]:
        for trainer in parity_page.TRAINERS:
            assert len(run[trainer]["rewards"]) == 10
        # Means of 512 completions at the same weights: 5 standard errors of a difference.
        first = [run[trainer]["rewards"][0] for trainer in parity_page.TRAINERS]
        assert abs(first[0] - first[1]) < 5 * (2 * 0.25 / 512) ** 0.5
    assert "final rewards" in capsys.readouterr().out and (tmp_path / "seeds.png").exists()

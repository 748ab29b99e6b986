"""PolicyLoss against TRL's own `_compute_loss` (run in float64 on the same fp32 inputs): every loss
type, every option that formulas.md serves, alone and combined."""

from __future__ import annotations

import functools
import math
import random
import warnings

import pytest
import torch
from batches import RTOL, call, close, random_batch

from rlkern import PolicyLoss
from rlkern.losses import RolloutCorrection

pytest.importorskip("trl")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # GMPO is experimental there, and says so
    from trl_peer import trl_loss

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LOSS_TYPES = (*CLIPPED, "cispo", "sapo", "vespo", "gmpo")
AGGREGATION = {
    "grpo": "seq_mean_token_mean",
    "sapo": "seq_mean_token_mean",
    "gmpo": "seq_mean_token_mean",
    "bnpo": "token_mean",
    "dapo": "token_mean",
    "cispo": "token_mean",
    "vespo": "token_mean",
    "dr_grpo": "seq_mean_token_sum_norm",
    "luspo": "seq_mean_token_sum",
}
SURROGATE = {name: name for name in ("cispo", "sapo", "vespo", "gmpo")}
GLOBAL_TOKENS = 41.0
MAX_COMPLETION_LENGTH = 256  # trl_peer's default

# TRL's metric, ours.
NAMES = {
    "kl": "kl",
    "entropy": "entropy",
    "clip_ratio/low_mean": "clip_frac_low",
    "clip_ratio/high_mean": "clip_frac_high",
    "clip_ratio/region_mean": "clip_frac",
    "clip_ratio/low_min": "clip_frac_low_min",
    "clip_ratio/high_max": "clip_frac_high_max",
    "cispo_clip_ratio": "cispo_clip_ratio",
    "vespo/phi_seq_mean": "vespo_phi_mean",
    "policy_loss": "policy_loss",
}
CORRECTIONS = {
    "token_truncate": RolloutCorrection(level="token", high=1.3),
    "token_mask": RolloutCorrection(level="token", mode="mask", low=0.6, high=1.4),
    "sequence_truncate": RolloutCorrection(level="sequence", low=0.9, high=3.0),
    "sequence_mask": RolloutCorrection(level="sequence", mode="mask", high=3.0),
}


def options_of(loss_type):
    """TRL's options with values, as far as this loss type has them; "advantages", "old" and
    "sampling" are the batch's."""
    options = {
        "beta": [0.04],
        "top_entropy_quantile": [0.3],
        "old": ["none"],
        "steps_per_generation": [4],
    }
    if loss_type == "gmpo":
        return options | {"epsilon_low": [0.1], "epsilon_high": [0.2]}
    modes = [m for m in CORRECTIONS if loss_type != "vespo" or m.startswith("token")]
    options |= {
        "advantages": ["per token"],
        "entropy_coef": [0.1, -0.01],
        "use_bias_correction_kl": [True],
        "off_policy_mask_threshold": [0.05],
        "sampling": ["given"],
        "correction": modes,
    }
    if loss_type == "vespo":
        return options | {"vespo_k_pos": [1.5], "vespo_lambda_neg": [1.25]}
    options["importance_sampling_level"] = ["sequence"]
    if loss_type == "sapo":
        options |= {"sapo_temperature_pos": [2.0], "sapo_temperature_neg": [0.5]}
    elif loss_type == "cispo":
        options["epsilon_high"] = [1.2, 5.0]
    else:
        options |= {"delta": [1.1, 1.5], "epsilon_low": [0.1], "epsilon_high": [0.28]}
    return options


def cases_of(loss_type):
    options, rng = options_of(loss_type), random.Random(loss_type)
    alone = [{name: value} for name, values in options.items() for value in values]
    mixed = [
        {name: rng.choice(values) for name, values in options.items() if rng.random() < 0.5}
        for _ in range(25)
    ]
    return [complete(loss_type, case) for case in [{}, *alone, *mixed]]


def complete(loss_type, case):
    case = dict(case)
    if "use_bias_correction_kl" in case:
        case.setdefault("beta", 0.1)
    if "sampling" in case:
        case.setdefault("off_policy_mask_threshold", 0.02)
    if loss_type == "cispo":
        case.setdefault("epsilon_high", 1.2)
    if loss_type == "gmpo":
        case.setdefault("epsilon_low", 0.4)
        case.setdefault("epsilon_high", 0.4)
    return case


def ours(loss_type, case):
    """The PolicyLoss that a TRL configuration is."""
    fields = {
        "surrogate": SURROGATE.get(loss_type, "clip"),
        "aggregation": AGGREGATION[loss_type],
        "ratio_level": case.get("importance_sampling_level", "token"),
        "log_ratio_clamp": None,
        "kl_coef": case.get("beta", 0.0),
        "kl_ratio_weighted": case.get("use_bias_correction_kl", False),
        "entropy_coef": case.get("entropy_coef", 0.0),
        "off_policy_threshold": case.get("off_policy_mask_threshold"),
        "correction": CORRECTIONS.get(case.get("correction")),
        "sapo_tau_pos": case.get("sapo_temperature_pos"),
        "sapo_tau_neg": case.get("sapo_temperature_neg"),
    }
    if loss_type == "vespo":
        del fields["log_ratio_clamp"]  # TRL clamps there, and there alone
        fields |= {name: value for name, value in case.items() if name.startswith("vespo")}
    elif loss_type == "cispo":
        fields["clip_high"] = case["epsilon_high"] - 1
    elif loss_type != "sapo":
        fields["clip_low"] = case.get("epsilon_low", 0.2)
        fields["clip_high"] = case.get("epsilon_high", 0.2)
        fields["ratio_cap"] = case.get("delta")
    return PolicyLoss(**fields)


def weights(correction, e):
    """TRL's importance_sampling_ratio, as its generation step makes it from old - sampling."""
    if correction.level == "sequence":
        e = e.sum(-1, keepdim=True)
    ratio = e.exp()
    if correction.mode == "truncate":
        return ratio.clamp(correction.low, correction.high)
    low = -math.inf if correction.low is None else correction.low
    high = math.inf if correction.high is None else correction.high
    return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)


@functools.cache
def peers(loss_type, seed):
    """(case, our loss, its arguments, TRL's loss, gradient, entropy gradient, metrics)."""
    return [one(loss_type, case, 100 * seed + i) for i, case in enumerate(cases_of(loss_type))]


def one(loss_type, case, seed):
    loss = ours(loss_type, case)
    batch = random_batch(5, 8, per_token="advantages" in case, seed=seed)
    double = {n: x.double() if x.is_floating_point() else x for n, x in batch.items()}
    mask = batch["mask"]
    logprobs = double["logprobs"].requires_grad_()
    entropy = double["entropy"].requires_grad_()
    old = None if "old" in case else double["old_logprobs"]
    inputs = {
        "completion_mask": mask.long(),
        "advantages": double["advantages"],
        "old_per_token_logps": old,
        "ref_per_token_logps": double["ref_logprobs"],
        "num_items_in_batch": torch.tensor(GLOBAL_TOKENS, dtype=torch.float64),
    }
    options = {
        n: v for n, v in case.items() if n not in ("advantages", "correction", "old", "sampling")
    }
    given = {n: batch[n] for n in ("logprobs", "advantages", "mask", "entropy")}
    if old is not None:
        given["old_logprobs"] = batch["old_logprobs"]
    if loss.kl_coef:
        given["ref_logprobs"] = batch["ref_logprobs"]
    if loss.correction is not None:
        base = logprobs.detach() if old is None else old
        e = torch.nan_to_num((base - double["rollout_logprobs"]) * mask, nan=0.0)
        inputs["importance_sampling_ratio"] = weights(loss.correction, e)
        options |= {"use_vllm": True, "vllm_importance_sampling_correction": True}
    if "sampling" in case or (
        loss.correction is not None and loss.off_policy_threshold is not None
    ):
        inputs["sampling_per_token_logps"] = double["rollout_logprobs"]
    if loss.correction is not None or "sampling_per_token_logps" in inputs:
        given["rollout_logprobs"] = batch["rollout_logprobs"]
    if "top_entropy_quantile" in case:
        quantile = torch.quantile(batch["entropy"][mask], 1 - case["top_entropy_quantile"])
        high = batch["entropy"] >= quantile
        given["token_weights"] = high.float()
        if loss.entropy_coef:
            given["entropy_mask"] = high
    if loss.aggregation == "seq_mean_token_sum_norm":
        given["normalizer"] = MAX_COMPLETION_LENGTH
    elif loss_type in ("dapo", "cispo", "vespo"):
        given["normalizer"] = GLOBAL_TOKENS / case.get("steps_per_generation", 1)

    value, metrics = trl_loss(
        logprobs, entropy, inputs, gmpo=loss_type == "gmpo", loss_type=loss_type, **options
    )
    value.backward()
    if loss_type == "gmpo":
        # TRL counts -A for a sequence without a token; here it is 0, as formulas.md has it.
        value = value + double["advantages"][~mask.any(1)].sum() / len(mask)
    return case, loss, given, value.detach(), logprobs.grad, entropy.grad, metrics


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_equals_trl(backend, loss_type, seed):
    # sapo's temperatures pass through fp32 in TRL (torch.where over two numbers).
    rtol = max(RTOL[backend.dtype], 1e-7 if loss_type == "sapo" else 1e-9)
    for case, loss, given, value, grad, entropy_grad, metrics in peers(loss_type, seed):
        message = f"{loss_type} {case}: "
        normalizer = {n: given[n] for n in ("normalizer",) if n in given}
        batch = {n: x for n, x in given.items() if n != "normalizer"}
        called = call(loss, batch, backend.dtype, **normalizer)
        scale = abs(float(value)) + float(grad.abs().sum())
        assert abs(float(called.loss) - float(value)) <= rtol * scale, message
        close(called.grad, grad, rtol, message + "gradient ")
        if loss.entropy_coef:
            close(called.entropy_grad, entropy_grad, rtol, message + "entropy gradient ")
        compare_metrics(called.metrics, metrics, case, message)


def compare_metrics(mine, trl, case, message):
    for name, theirs in trl.items():
        if name == "policy_loss" and case.get("beta"):
            continue  # TRL's includes the KL term
        sequence = case.get("importance_sampling_level") == "sequence"
        if sequence and "advantages" in case and name.startswith(("clip", "cispo")):
            # One ratio per sequence, one advantage per token: TRL's shapes then make it a mean
            # over tokens; ours stays one over sequences.
            continue
        value = float(mine[NAMES[name]])
        # TRL turns the counts into fp32.
        assert value == pytest.approx(theirs, rel=1e-5, abs=1e-5), (message, name, value, theirs)


def test_accumulated_gradients_are_scaled_by_the_number_of_sequences(backend):
    """TRL divides by current_gradient_accumulation_steps; here the denominator says so."""
    batch = random_batch(5, 8)
    logprobs = batch["logprobs"].double().requires_grad_()
    inputs = {
        "completion_mask": batch["mask"].long(),
        "advantages": batch["advantages"].double(),
        "old_per_token_logps": batch["old_logprobs"].double(),
    }
    value, _ = trl_loss(
        logprobs, batch["entropy"], inputs, loss_type="grpo", current_gradient_accumulation_steps=4
    )
    value.backward()
    loss = PolicyLoss.preset("grpo", kl_coef=0.0)
    names = ("logprobs", "advantages", "mask", "old_logprobs")
    called = call(loss, {n: batch[n] for n in names}, backend.dtype, num_sequences=20)
    close(called.grad, logprobs.grad, RTOL[backend.dtype])

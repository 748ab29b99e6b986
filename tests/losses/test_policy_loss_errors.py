"""What PolicyLoss refuses: the message names the argument, what was expected and what came."""
# ruff: noqa: E501  (a table: one case a line)

from __future__ import annotations

import pytest
import torch

from rlkern import PolicyLoss
from rlkern.losses import RolloutCorrection

CORRECTION = RolloutCorrection()
SEQUENCE = RolloutCorrection(level="sequence")

# Fields, exception, parts of the message.
FIELDS = [
    ({"surrogate": "clpi"}, ValueError, "surrogate: .*'clpi'; did you mean 'clip'"),
    ({"surrogate": None}, TypeError, "surrogate: expected a str, got NoneType"),
    ({"ratio_level": "sequenc"}, ValueError, "ratio_level: .*did you mean 'sequence'"),
    ({"kl_estimator": "k4"}, ValueError, "kl_estimator: expected one of k1, .*got 'k4'"),
    ({"kl_clamp": "ver"}, ValueError, "kl_clamp: .*did you mean 'verl'"),
    ({"aggregation": "token-mean"}, ValueError, "aggregation: .*did you mean 'token_mean'"),
    ({"entropy_aggregation": "smae"}, ValueError, "entropy_aggregation: .*did you mean 'same'"),
    ({"skip_empty": 1}, TypeError, "skip_empty: expected a bool, got 1"),
    ({"kl_ratio_weighted": "yes"}, TypeError, "kl_ratio_weighted: expected a bool, got 'yes'"),
    ({"kl_coef": float("nan")}, ValueError, "kl_coef: expected a finite number, got nan"),
    ({"kl_coef": "0.1"}, TypeError, "kl_coef: expected a number, got str"),
    ({"entropy_coef": float("inf")}, ValueError, "entropy_coef: expected a finite number, got inf"),
    ({"off_policy_threshold": True}, TypeError, "off_policy_threshold: expected a number, got bool"),
    ({"log_ratio_clamp": 0.0}, ValueError, "log_ratio_clamp: expected a finite number above 0"),
    ({"correction": "token"}, TypeError, "correction: expected a RolloutCorrection .*'token'"),
    ({"clip_low": -0.1}, ValueError, "clip_low: expected a finite number of at least 0, got -0.1"),
    ({"clip_low": 1.2}, ValueError, "clip_low: expected an offset from 1 .*got 1.2"),
    ({"clip_high": "0.2"}, TypeError, "clip_high: expected a number, got str"),
    ({"dual_clip": 1.0}, ValueError, "dual_clip: expected a finite number above 1, got 1.0"),
    ({"ratio_cap": 0.0}, ValueError, "ratio_cap: expected a finite number above 0, got 0.0"),
    ({"surrogate": "sapo", "sapo_tau_pos": 0.0}, ValueError, "sapo_tau_pos: .*above 0, got 0.0"),
    ({"surrogate": "vespo", "vespo_k_neg": -1}, ValueError, "vespo_k_neg: .*above 0, got -1"),
    # Options that others contradict.
    ({"surrogate": "cispo", "dual_clip": 3.0}, ValueError,
     "dual_clip: expected None with surrogate 'cispo' .it is an option of clip.*got 3.0"),
    ({"sapo_tau_pos": 1.0}, ValueError, "sapo_tau_pos: expected None with surrogate 'clip'"),
    ({"vespo_k_pos": 1.0}, ValueError, "vespo_k_pos: .*option of vespo.*got 1.0"),
    ({"surrogate": "sapo", "clip_low": 0.2}, ValueError, "clip_low: expected None with surrogate"),
    ({"surrogate": "reinforce", "ratio_cap": 2.0}, ValueError, "ratio_cap: expected None"),
    ({"surrogate": "gmpo", "ratio_level": "sequence", "aggregation": "seq_mean_token_mean"},
     ValueError, "ratio_level: expected 'token' with surrogate 'gmpo', got 'sequence'"),
    ({"surrogate": "dppo_tv", "ratio_level": "sequence_sum"}, ValueError, "ratio_level: expected"),
    ({"ratio_level": "sequence", "log_ratio_clamp": 5.0}, ValueError, "log_ratio_clamp: .*got 5.0"),
    ({"surrogate": "gmpo"}, ValueError, "aggregation: expected 'seq_mean_token_mean' .*'gmpo'"),
    ({"skip_empty": True}, ValueError, "skip_empty: expected False with aggregation 'token_mean'"),
    ({"kl_estimator": "k1", "kl_clamp": "verl"}, ValueError, "kl_clamp: .*'openrlhf'.*got 'verl'"),
    ({"entropy_aggregation": "same"}, ValueError, "entropy_aggregation: .*entropy_coef 0"),
    ({"surrogate": "vespo", "correction": SEQUENCE}, ValueError, "correction: expected level 'tok"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "error", "message"), FIELDS, ids=lambda x: str(x)[:50])
def test_fields(fields, error, message):
    with pytest.raises(error, match=message):
        PolicyLoss(**fields)
    # A changed copy is checked like a new one.
    if "surrogate" not in fields:
        with pytest.raises(error, match=message):
            PolicyLoss().replace(**fields)


def test_unknown_names():
    with pytest.raises(ValueError, match="preset: expected one of .*'grop'; did you mean 'grpo'"):
        PolicyLoss.preset("grop")
    with pytest.raises(TypeError, match="epsilon: expected a field of PolicyLoss .*clip_low"):
        PolicyLoss.preset("grpo", epsilon=0.2)
    with pytest.raises(TypeError, match="epsilon"):
        PolicyLoss(epsilon=0.2)
    with pytest.raises(TypeError):
        PolicyLoss("clip")


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"level": "tokens"}, ValueError, "level: .*'tokens'; did you mean 'token'"),
        ({"mode": "clip"}, ValueError, "mode: expected one of truncate, mask, got 'clip'"),
        ({"high": None}, ValueError, "low, high: expected at least one bound"),
        ({"low": 3.0, "high": 2.0}, ValueError, r"low: expected at most high \(2.0\), got 3.0"),
        ({"low": -1.0}, ValueError, "low: expected a finite number of at least 0, got -1.0"),
        ({"high": "2"}, TypeError, "high: expected a number, got str"),
    ],
)
def test_rollout_correction(fields, error, message):
    with pytest.raises(error, match=message):
        RolloutCorrection(**fields)


# ---- calls ----------------------------------------------------------------------------------

X = torch.randn(3, 4)
PACKED = torch.randn(7)
CU = torch.tensor([0, 3, 3, 7])
NORM = {"aggregation": "seq_mean_token_sum_norm"}
SEQ = {"aggregation": "seq_mean_token_mean"}
BONUS = {"entropy_coef": 0.1}

# Fields, arguments beyond logprobs X and advantages [3], exception, parts of the message.
CALLS = [
    # Types and dtypes.
    ({}, {"logprobs": [1.0]}, TypeError, "logprobs: expected a torch.Tensor, got list"),
    ({}, {"logprobs": X.long()}, TypeError, "logprobs: expected float32, .*got torch.int64"),
    ({}, {"advantages": [1.0] * 3}, TypeError, "advantages: expected a torch.Tensor, got list"),
    ({}, {"advantages": torch.ones(3, dtype=torch.int64)}, TypeError, "advantages: expected float"),
    ({}, {"old_logprobs": X.int()}, TypeError, "old_logprobs: expected float.*torch.int32"),
    ({}, {"mask": X}, TypeError, "mask: expected bool or an integer type, got torch.float32"),
    (BONUS, {"entropy": X, "entropy_mask": X}, TypeError, "entropy_mask: expected bool or an int"),
    ({}, {"token_weights": X > 0}, TypeError, "token_weights: expected float.*torch.bool"),
    ({}, {"logprobs": PACKED, "cu_seqlens": CU.float()}, TypeError, "cu_seqlens: expected int32 or"),
    ({}, {"normalizer": "3"}, TypeError, "normalizer: expected a number, got str"),
    ({}, {"normalizer": float("nan")}, ValueError, "normalizer: expected a finite number, got nan"),
    # Shapes.
    ({}, {"logprobs": PACKED}, ValueError, r"logprobs: expected \[B, T\], or .*cu_seqlens, got \[7\]"),
    ({}, {"logprobs": torch.randn(2, 3, 4)}, ValueError, r"logprobs: expected .*got \[2, 3, 4\]"),
    ({}, {"advantages": torch.ones(4)}, ValueError,
     r"advantages: expected shape \[3\] or \[3, 4\] .*got \[4\]"),
    ({}, {"advantages": torch.ones(3, 1)}, ValueError, r"advantages: .*got \[3, 1\]"),
    ({}, {"old_logprobs": X[:2]}, ValueError, r"old_logprobs: expected shape \[3, 4\].*got \[2, 4\]"),
    ({}, {"ref_logprobs": X[:, :2]}, ValueError, r"ref_logprobs: .*got \[3, 2\]"),
    ({"correction": CORRECTION}, {"rollout_logprobs": X[0]}, ValueError, "rollout_logprobs: expect"),
    ({}, {"entropy": X.t()}, ValueError, r"entropy: expected shape \[3, 4\].*got \[4, 3\]"),
    ({}, {"mask": X[:1] > 0}, ValueError, r"mask: expected shape \[3, 4\].*got \[1, 4\]"),
    ({}, {"token_weights": X[0]}, ValueError, r"token_weights: .*got \[4\]"),
    ({}, {"cu_seqlens": CU}, ValueError, "cu_seqlens: expected None for padded logprobs"),
    ({}, {"logprobs": PACKED, "cu_seqlens": CU[None]}, ValueError, r"cu_seqlens: expected shape \[B"),
    ({}, {"logprobs": PACKED, "cu_seqlens": CU + 1}, ValueError, "cu_seqlens: expected values that"),
    ({}, {"logprobs": PACKED, "cu_seqlens": CU.flip(0)}, ValueError, "cu_seqlens: .*rise from 0 to 7"),
    ({}, {"logprobs": PACKED, "cu_seqlens": CU, "advantages": torch.ones(4)}, ValueError,
     r"advantages: expected shape \[3\] or \[7\]"),
    ({}, {"normalizer": torch.ones(1)}, ValueError, "normalizer: .*0-dimensional tensor"),
    # Devices.
    ({}, {"old_logprobs": X.to("meta")}, ValueError, "old_logprobs: expected device cpu .*got meta"),
    ({}, {"advantages": torch.ones(3, device="meta")}, ValueError, "advantages: expected device cpu"),
    ({}, {"mask": (X > 0).to("meta")}, ValueError, "mask: expected device cpu"),
    ({}, {"logprobs": PACKED, "cu_seqlens": CU.to("meta")}, ValueError, "cu_seqlens: expected devi"),
    ({}, {"normalizer": torch.tensor(3.0, device="meta")}, ValueError, "normalizer: expected device"),
    # Gradients that nobody computes.
    ({}, {"old_logprobs": X.clone().requires_grad_()}, ValueError,
     r"old_logprobs: expected a tensor that needs no gradient.*pass old_logprobs.detach\(\)"),
    ({}, {"advantages": torch.ones(3).requires_grad_()}, ValueError, "advantages: .*no gradient"),
    ({}, {"token_weights": X.clone().requires_grad_()}, ValueError, "token_weights: .*no gradient"),
    ({}, {"normalizer": torch.tensor(3.0, requires_grad=True)}, ValueError, "normalizer: .*no grad"),
    # Missing.
    ({"kl_coef": 0.1}, {}, ValueError, "ref_logprobs: expected a tensor, since kl_coef is 0.1"),
    (BONUS, {}, ValueError, "entropy: expected a tensor, since entropy_coef is 0.1, got None"),
    ({"correction": CORRECTION}, {}, ValueError, "rollout_logprobs: expected a tensor, since"),
    (NORM, {}, ValueError, "normalizer: expected .*since aggregation 'seq_mean_token_sum_norm'"),
    # Without use.
    ({}, {"rollout_logprobs": X}, ValueError, "rollout_logprobs: expected None, since the loss has"),
    ({}, {"entropy_mask": X > 0}, ValueError, "entropy_mask: expected None, since entropy_coef is 0"),
    ({}, {"entropy_normalizer": 3.0}, ValueError, "entropy_normalizer: expected None, since"),
    (BONUS | {"entropy_aggregation": "same"}, {"entropy": X, "entropy_normalizer": 3.0},
     ValueError, "entropy_normalizer: expected None, since"),
    (SEQ, {"normalizer": 3.0}, ValueError, "normalizer: expected None, since aggregation 'seq_mean"),
    ({}, {"num_sequences": 3.0}, ValueError, "num_sequences: expected None, since aggregation 'tok"),
    (SEQ | {"skip_empty": True}, {"num_sequences": 3.0}, ValueError,
     "num_sequences: expected None, since skip_empty counts the sequences"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "arguments", "error", "message"), CALLS, ids=[str(call[-1])[:40] for call in CALLS]
)
def test_calls(fields, arguments, error, message):
    given = {"logprobs": X, "advantages": torch.ones(3)} | arguments
    with pytest.raises(error, match=message):
        PolicyLoss(**fields)(given.pop("logprobs"), given.pop("advantages"), **given)


def test_an_unknown_argument():
    with pytest.raises(TypeError, match="logprob_old"):
        PolicyLoss()(X, torch.ones(3), logprob_old=X)


def test_a_backend_that_cannot_serve_the_call():
    import rlkern

    with rlkern.use_backend("native"), pytest.raises(RuntimeError, match="float32, bfloat16"):
        PolicyLoss()(X.double(), torch.ones(3).double())


def test_what_is_used_is_not_refused():
    one = torch.ones(3)
    for out in (
        PolicyLoss(kl_coef=0.1)(X, one, ref_logprobs=X),
        PolicyLoss(**NORM)(X, one, normalizer=3, num_sequences=torch.tensor(2)),
        PolicyLoss(off_policy_threshold=0.1)(X, one, rollout_logprobs=X),
        PolicyLoss(**BONUS)(X, X, entropy=X, entropy_mask=X > 0, entropy_normalizer=4),
    ):
        assert out.loss.isfinite() and out.metrics["tokens"] == X.numel()

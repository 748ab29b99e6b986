"""Published objectives by name."""

from __future__ import annotations

from typing import Any

_GSPO = {"clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "seq_mean_token_mean"}
#: Published objectives as fields of PolicyLoss; docs/losses.md says where each comes from.
PRESETS: dict[str, dict[str, Any]] = {
    "ppo": {"clip_low": 0.2, "clip_high": 0.2},
    "grpo": {
        "clip_low": 0.2,
        "clip_high": 0.2,
        "kl_coef": 0.04,
        "aggregation": "seq_mean_token_mean",
    },
    "bnpo": {"clip_low": 0.2, "clip_high": 0.2},
    "dr_grpo": {"clip_low": 0.2, "clip_high": 0.2, "aggregation": "seq_mean_token_sum_norm"},
    "dapo": {"clip_low": 0.2, "clip_high": 0.28},
    "gspo": _GSPO | {"ratio_level": "sequence"},
    "gspo_token": _GSPO | {"ratio_level": "sequence_token"},
    "cispo": {"surrogate": "cispo", "clip_high": 4.0},
    "sapo": {"surrogate": "sapo", "aggregation": "seq_mean_token_mean"},
    "gmpo": {
        "surrogate": "gmpo",
        "clip_low": 0.4,
        "clip_high": 0.4,
        "aggregation": "seq_mean_token_mean",
    },
    "vespo": {"surrogate": "vespo"},
    "luspo": _GSPO | {"ratio_level": "sequence", "aggregation": "seq_mean_token_sum"},
    "rloo": {
        "clip_low": 0.2,
        "clip_high": 0.2,
        "ratio_level": "sequence_sum",
        "aggregation": "seq_mean_token_mean",
    },
    "dppo_tv": {"surrogate": "dppo_tv", "clip_low": 0.15, "clip_high": 0.15},
    "dppo_kl": {"surrogate": "dppo_kl", "clip_low": 0.05, "clip_high": 0.05},
    "reinforce": {"surrogate": "reinforce"},
}

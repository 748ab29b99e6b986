"""Log-probability and entropy of chosen tokens from hidden states and the lm_head.

The logits are scale * (h W^T + b). A positive scale passes through the cap and the temperature:

    cap_c(scale x) / T = cap_{c / scale}(x) / (T / scale),    cap_c(x) = c tanh(x / c)

so that the row pass over h W^T + b needs no product of its own for it.
"""

from __future__ import annotations

from torch import Tensor


def without_scale(
    scale: float, temperature: float, token_temperature: Tensor | None, softcap: float | None
) -> tuple[float, Tensor | None, float | None]:
    """Temperature, number or per token, and cap that the scale is folded into."""
    if scale == 1:
        return temperature, token_temperature, softcap
    per_token = None if token_temperature is None else token_temperature / scale
    return (
        temperature / scale if per_token is None else temperature,
        per_token,
        None if softcap is None else softcap / scale,
    )

"""How much a policy may stray from the reference: the weight of the KL, fixed or adaptive."""

from __future__ import annotations


class AdaptiveKL:
    """kl_coef, and with a target its controller: a proportional one, the error clipped to 0.2.

        kl_coef *= 1 + clip(kl / target - 1, -0.2, 0.2) * completions / horizon

    (Ziegler et al., 2019, https://arxiv.org/abs/1909.08593.)
    """

    def __init__(self, kl_coef: float, target: float | None, horizon: int):
        self.kl_coef, self.target, self.horizon = kl_coef, target, horizon

    def update(self, kl: float, completions: int) -> None:
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.kl_coef *= 1 + error * completions / self.horizon

    def state_dict(self) -> dict[str, float]:
        return {"kl_coef": self.kl_coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.kl_coef = state["kl_coef"]

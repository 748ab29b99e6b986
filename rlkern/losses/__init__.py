"""PolicyLoss and ValueLoss: descriptions of an objective, called on log-probabilities or values."""

from rlkern.losses.calls import LossOutput
from rlkern.losses.policy import PolicyLoss, RolloutCorrection
from rlkern.losses.presets import PRESETS
from rlkern.losses.value import ValueLoss

__all__ = ["PRESETS", "LossOutput", "PolicyLoss", "RolloutCorrection", "ValueLoss"]

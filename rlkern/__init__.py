"""rlkern: the loss layer of LLM reinforcement learning, as kernels."""

from rlkern import _native

_native.load()

from rlkern._backend import use_backend  # noqa: E402
from rlkern.losses import LossOutput, PolicyLoss, RolloutCorrection, ValueLoss  # noqa: E402
from rlkern.metrics import Metrics  # noqa: E402
from rlkern.ops.group_advantages import group_advantages  # noqa: E402
from rlkern.ops.kl_divergence import kl_divergence  # noqa: E402
from rlkern.ops.kl_penalty import kl_penalty  # noqa: E402
from rlkern.ops.linear_kl_divergence import linear_kl_divergence  # noqa: E402
from rlkern.ops.linear_token_logprobs import linear_token_logprobs  # noqa: E402
from rlkern.ops.returns import GAE, VTrace, discounted_returns, gae, vtrace  # noqa: E402
from rlkern.ops.token_logprobs import TokenLogprobs, token_logprobs  # noqa: E402
from rlkern.ops.whiten import whiten  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "GAE",
    "LossOutput",
    "Metrics",
    "PolicyLoss",
    "RolloutCorrection",
    "TokenLogprobs",
    "VTrace",
    "ValueLoss",
    "discounted_returns",
    "gae",
    "group_advantages",
    "kl_divergence",
    "kl_penalty",
    "linear_kl_divergence",
    "linear_token_logprobs",
    "token_logprobs",
    "use_backend",
    "vtrace",
    "whiten",
]

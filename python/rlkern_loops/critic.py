"""The critic: what PPO expects of a completion before each of its tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rlkern_loops import model
from rlkern_loops.rollout import Completions, completion_hidden


class Critic(nn.Module):
    """A value head, on a backbone of its own or on the policy's.

    Args:
        hidden_size: D of the hidden states.
        trunk: the backbone; None: the policy's is shared.
    """

    def __init__(self, hidden_size: int, trunk: nn.Module | None = None):
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(hidden_size, 1)
        # 0 everywhere at the start: the first advantages are the rewards themselves.
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, policy: nn.Module, completions: Completions, policy_hidden: Tensor) -> Tensor:
        """Values [B, T] fp32, each before its token is written.

        Args:
            policy: the causal LM that wrote the completions.
            completions: B of at most T tokens.
            policy_hidden: [B, T, D], the policy's hidden states of them.
        """
        hidden = policy_hidden
        if self.trunk is not None:
            hidden = completion_hidden(policy, completions, trunk=self.trunk)
        return self.head(hidden)[..., 0].float()


def load_critic(
    config: Any, policy: nn.Module, start: str, reward: str | None, device: str
) -> Critic:
    """The critic that the options name.

    Args:
        config: has critic, critic_model, model, dataset, and what `model.load` reads.
        policy: the causal LM.
        start: name or folder of the policy at the start.
        reward: that of the reward model, or None.
        device: where it goes.

    Raises:
        ModelError: it cannot be loaded, or reads other tokens than the policy.
    """
    if config.critic == "shared":
        return Critic(policy.config.get_text_config().hidden_size).to(device)
    # The built-in tasks' models share a tokenizer; elsewhere nothing says that two models do.
    ours = config.model is None and config.dataset is None and reward is not None
    name = config.critic_model or ("reward" if ours else "policy")
    if name == "reward" and reward is None:
        raise model.ModelError("critic_model: expected a model, as no reward model is used")
    name = {"reward": reward, "policy": start}.get(name, name)
    trunk = model.load_backbone(name, config, device)
    read, written = (len(m.get_input_embeddings().weight) for m in (trunk, policy))
    if read != written:
        raise model.ModelError(
            f"critic_model: expected the policy's vocabulary of {written} tokens, got {read} in "
            f"{name!r}"
        )
    return Critic(trunk.config.get_text_config().hidden_size, trunk).to(device)

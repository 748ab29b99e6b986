"""TRL's own loss code on given log-probabilities, without a model or a trainer."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import torch
from trl.experimental.gmpo.gmpo_trainer import GMPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer


class OneProcess:
    """What the trainer asks of its accelerator."""

    num_processes = 1
    sync_gradients = False

    def gather(self, tensor):
        return tensor

    gather_for_metrics = gather

    def pad_across_processes(self, tensor, dim=0, pad_index=0):
        return tensor

    def reduce(self, tensor, reduction="sum"):
        return tensor


def trl_loss(logprobs, entropy, inputs, *, gmpo=False, **options):
    """(loss, metrics) of GRPOTrainer._compute_loss for a [B, T] of log-probabilities.

    `inputs` are the trainer's own: advantages, completion_mask and so on. `options` are its
    attributes and config fields under their own names.
    """
    defaults = {
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "beta": 0.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "loss_type": "grpo",
        "use_vllm": False,
        "vllm_importance_sampling_correction": False,
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": 256,
        "use_adaptive_entropy": False,
        "entropy_coef": 0.0,
    }
    config = {
        "use_bias_correction_kl": False,
        "delta": None,
        "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05,
        "vespo_k_pos": 2.0,
        "vespo_lambda_pos": 3.0,
        "vespo_k_neg": 3.0,
        "vespo_lambda_neg": 2.0,
        "steps_per_generation": 1,
    }
    for name, value in options.items():
        (config if name in config else defaults)[name] = value
    trainer = SimpleNamespace(
        **defaults,
        args=SimpleNamespace(**config),
        accelerator=OneProcess(),
        _metrics={"train": defaultdict(list)},
        _entropy_bonus_enabled=defaults["entropy_coef"] != 0,
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        _get_per_token_logps_and_entropies=lambda *a, **k: (logprobs, entropy, None),
    )
    trainer.get_high_entropy_mask = lambda *a: GRPOTrainer.get_high_entropy_mask(trainer, *a)
    mask = inputs["completion_mask"]
    ids = torch.zeros_like(mask)
    everything = {"prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, **inputs}
    cls = GMPOTrainer if gmpo else GRPOTrainer
    trainer.model = SimpleNamespace(training=True)
    loss = cls._compute_loss(trainer, trainer.model, everything)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}

"""Language models of transformers: loading them, and the hidden states behind their logits.

The losses start from hidden states and the lm_head, so that no logits are held; what a model does
between the two (Cohere's and Granite's scale, Gemma's cap) is read from its config, and `load`
compares once with the model's own logits.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from rlkern_loops.errors import RunError

_FLASH = "flash_attention_2"


class ModelError(RunError):
    """A model that cannot be loaded, or that the losses cannot be taken from."""


def attention_name(wanted: str, precision: str, device: str) -> str | None:
    """transformers' name of an attention. None leaves it to choose scaled_dot_product_attention,
    or what a model has in its place."""
    if wanted == "auto":
        has_flash = importlib.util.find_spec("flash_attn") is not None
        return _FLASH if has_flash and precision == "bf16" and device != "cpu" else None
    return _FLASH if wanted == "flash" else wanted


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model, padding on the left, with a token to pad with."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model: cannot load a tokenizer from {name!r}: {error}") from error
    tokenizer.padding_side = "left"
    if tokenizer.eos_token_id is None:
        raise ModelError(f"model: the tokenizer of {name!r} has no end token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def max_positions(name: str) -> int | None:
    """The longest sequence that a model has positions for, by its config; None: any."""
    try:
        settings = AutoConfig.from_pretrained(name).get_text_config()
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model: cannot load {name!r}: {error}") from error
    return getattr(settings, "max_position_embeddings", None)


def load(name: str, config: Any, device: str, *, frozen: bool = False) -> nn.Module:
    """A causal LM by hub name or from a folder, without dropout.

    Dropout would make the ratio of new to old probabilities differ from 1 before any step. Weights
    that are trained stay in fp32, where steps of 1e-6 are not lost to rounding; those that are not
    are in bf16 with precision "bf16".

    Args:
        name: hub name or folder.
        config: has precision, attention and gradient_checkpointing.
        device: where it goes.
        frozen: no gradients.

    Raises:
        ModelError: it cannot be loaded, its logits are not made from its last hidden states, or it
            does not tell packed sequences apart.
    """
    model = _load(AutoModelForCausalLM, name, config, device, frozen)
    with precision(config, device):
        _check_head(model, name)
        if _reads_packed(model):
            _check_packing(model, name)
    return model


def load_backbone(name: str, config: Any, device: str) -> nn.Module:
    """The trunk of a causal LM or of a sequence classifier, to be trained; otherwise as `load`."""
    return _load(AutoModel, name, config, device, frozen=False)


def _load(kind: Any, name: str, config: Any, device: str, frozen: bool) -> nn.Module:
    try:
        settings = AutoConfig.from_pretrained(name)
        for key, value in vars(settings).items():
            if "drop" in key and isinstance(value, float):
                setattr(settings, key, 0.0)
        with _no_report():
            model, found = kind.from_pretrained(
                name,
                config=settings,
                dtype=torch.bfloat16 if frozen and config.precision == "bf16" else torch.float32,
                attn_implementation=attention_name(config.attention, config.precision, device),
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise ModelError(f"model: cannot load {name!r}: {error}") from error
    if missing := sorted(found["missing_keys"]):
        raise ModelError(
            f"model: {name!r} lacks weights of {type(model).__name__}: {', '.join(missing[:3])}"
        )
    model = model.to(device)
    if frozen:
        model.requires_grad_(False)
    elif config.gradient_checkpointing:
        # transformers 5.24 renames it; both take torch.utils.checkpoint's arguments first.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    return model.train(not frozen)


@contextlib.contextmanager
def _no_report() -> Iterator[None]:
    """Without transformers' table of weights that a trunk leaves out of a file; missing ones are
    an error here."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def head(model: nn.Module) -> dict[str, Any]:
    """What stands between hidden states and logits, as arguments of rlkern's lm_head operators."""
    lm_head, settings = model.get_output_embeddings(), model.config.get_text_config()
    scale = float(getattr(settings, "logit_scale", None) or 1.0)
    return {
        "weight": lm_head.weight,
        "bias": lm_head.bias,
        "softcap": getattr(settings, "final_logit_softcapping", None),
        "logit_scale": scale / float(getattr(settings, "logits_scaling", None) or 1.0),
    }


@torch.no_grad()
def _check_head(model: nn.Module, name: str) -> None:
    ids = torch.arange(4, device=model.device)[None] % model.config.get_text_config().vocab_size
    arguments = {"attention_mask": torch.ones_like(ids), "use_cache": False}
    with evaluating(model):
        own = model(ids, **arguments).logits.float()
        hidden = backbone(model)(ids, **arguments).last_hidden_state
    parts = head(model)
    made = nn.functional.linear(hidden, parts["weight"], parts["bias"]).float()
    made = made * parts["logit_scale"]
    if parts["softcap"]:
        made = parts["softcap"] * torch.tanh(made / parts["softcap"])
    # The same steps, each rounded to 8 bits in bf16 (a product of two, a scale, a cap): within four
    # of its units. A step left out, or another one, changes the logits by their own size.
    if not torch.allclose(own, made, rtol=2**-6, atol=2**-6 * own.abs().max().item()):
        raise ModelError(
            f"model: the logits of {name!r} are not its lm_head times its last hidden states, "
            "which the losses here start from"
        )


def precision(config: Any, device: str) -> contextlib.AbstractContextManager:
    """Autocast to bf16 where the options ask for it."""
    return torch.autocast(
        torch.device(device).type, torch.bfloat16, enabled=config.precision == "bf16"
    )


@torch.no_grad()
def _check_packing(model: nn.Module, name: str) -> None:
    """A model that ignores position ids would read one sequence on in the next, in silence."""
    ids = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
    trunk = backbone(model)
    with evaluating(model):
        alone = trunk(ids[:, 4:], use_cache=False).last_hidden_state.float()
        packed = _packed(trunk, ids.view(2, 4), torch.ones_like(ids).view(2, 4))[1].float()
    # As in _check_head; a token of another sequence in the attention shifts a state by its size.
    if not torch.allclose(alone[0], packed, rtol=2**-5, atol=2**-5 * alone.abs().max().item()):
        raise ModelError(f"attention: {name!r} reads packed sequences as one; expected sdpa")


def backbone(model: nn.Module) -> nn.Module:
    """The model without its lm_head (or without a classifier's score)."""
    return model.base_model


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """eval() within the block: gradient checkpointing in train() would turn the cache off."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def positions(attention_mask: Tensor) -> Tensor:
    """Position ids [B, L] that count tokens, so that left padding shifts nothing."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def forward_arguments(model: nn.Module) -> set[str]:
    """Names that the model's forward takes: not every one counts positions, or calls its cache
    alike."""
    return set(inspect.signature(model.forward).parameters)


def hidden_states(trunk: nn.Module, ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The last hidden states [B, L, D] of padded sequences; what stands at padding is arbitrary.

    flash-attn reads the sequences packed into one row, without padding, and tells them apart by
    their position ids, which start from 0 again.

    Args:
        trunk: a backbone.
        ids: [B, L] int64.
        attention_mask: [B, L] int64, 1 where a token stands.
    """
    read = _packed if _reads_packed(trunk) else _padded
    return read(trunk, ids, attention_mask)


def _reads_packed(trunk: nn.Module) -> bool:
    return trunk.config._attn_implementation == _FLASH


def _padded(trunk: nn.Module, ids: Tensor, attention_mask: Tensor) -> Tensor:
    arguments = {"attention_mask": attention_mask, "use_cache": False}
    if "position_ids" in forward_arguments(trunk):
        arguments["position_ids"] = positions(attention_mask)
    return trunk(ids, **arguments).last_hidden_state


def _packed(trunk: nn.Module, ids: Tensor, attention_mask: Tensor) -> Tensor:
    stands = attention_mask.bool()
    hidden = trunk(
        ids[stands][None], position_ids=positions(attention_mask)[stands][None], use_cache=False
    ).last_hidden_state[0]
    return hidden.new_zeros(*ids.shape, hidden.shape[-1]).masked_scatter(stands[..., None], hidden)

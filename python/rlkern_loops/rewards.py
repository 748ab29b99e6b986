"""Rewards: rules, functions of the user and reward models, behind one checked call."""

from __future__ import annotations

import importlib
import inspect
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rlkern_loops.errors import RewardError, did_you_mean, shorten
from rlkern_loops.verifiers import VERIFIERS, Verifier

#: prompts, completions, answers (texts) and finished (whether the model ended the completion
#: itself), N each -> rewards [N] fp32 on the CPU; NaN stands for "no verdict".
Reward = Callable[[list[str], list[str], list[str], list[bool]], torch.Tensor]

_ARGUMENTS = ("prompts", "completions", "answers", "finished")


def load_reward(spec: str, *, device: str = "cpu") -> Reward:
    """The reward that `spec` describes.

    Args:
        spec: one of, or a sum of several such as "numeric+0.2*format_tags":
            - a verifier of `verifiers.VERIFIERS`;
            - `module:function`, importable from the current folder. It is called with those of the
              keywords prompts, completions, answers and finished that its signature takes, and
              returns one number each; NaN or None for a completion that it has no verdict on.
            - `model:PATH_OR_NAME`, a sequence classifier of transformers with one label, which
              reads prompt and completion as one text.
        device: where a reward model is put.

    Raises:
        RewardError: here, where there is no such reward; and from every call of the reward, where
            it raises, or returns the wrong number of values, something that is no number, or an
            infinite one. NaN passes through: `rlkern.group_advantages` leaves it out of its group.
    """
    terms = [(weight, _load_one(name, device)) for weight, name in _terms(spec)]
    if len(terms) == 1 and terms[0][0] == 1:
        return terms[0][1]

    def total(prompts, completions, answers, finished):
        return sum(w * one(prompts, completions, answers, finished) for w, one in terms)

    return total


def check_reward(spec: str) -> None:
    """Before anything long begins: that `load_reward` will not refuse `spec`.

    Reward models are not looked for; they take long themselves.

    Raises:
        RewardError: as `load_reward`.
    """
    for _, name in _terms(spec):
        if not name.startswith("model:"):
            _load_one(name, "cpu")


def _terms(spec: str) -> list[tuple[float, str]]:
    """The weights and names of a sum."""
    terms = []
    # The folder of a reward model may have a + in its name.
    whole = spec.startswith("model:") and os.path.isdir(spec.removeprefix("model:"))
    for term in [spec] if whole else spec.split("+"):
        match = re.fullmatch(r"\s*(?:([-\d.eE]+)\s*\*)?\s*(.+?)\s*", term)
        try:
            weight, name = (float(match[1] or 1), match[2]) if match else (math.nan, "")
        except ValueError:
            weight, name = math.nan, ""
        if not math.isfinite(weight):
            raise RewardError(
                f"reward: expected terms such as 'numeric' or '0.2*format_tags' joined by +, got "
                f"{spec!r}"
            )
        terms.append((weight, name))
    return terms


def _load_one(name: str, device: str) -> Reward:
    if name in VERIFIERS:
        return checked(name, _by_rule(VERIFIERS[name]))
    if name.startswith("model:"):
        return checked(name, _load_model(name.removeprefix("model:"), device))
    if ":" in name:
        return checked(name, _load_function(name))
    raise RewardError(
        f"reward: no verifier {name!r}{did_you_mean(name, VERIFIERS)}; expected "
        f"{', '.join(VERIFIERS)}, module:function or model:PATH"
    )


def checked(name: str, reward: Callable[..., Any]) -> Reward:
    """`reward` with its result as a tensor [N] fp32, and with all that goes wrong in it named.

    Raises:
        RewardError: from the returned function; see `load_reward`.
    """

    def call(
        prompts: list[str], completions: list[str], answers: list[str], finished: list[bool]
    ) -> torch.Tensor:
        try:
            values = reward(prompts, completions, answers, finished)
        except RewardError:
            raise
        except Exception as error:
            raise RewardError(
                f"reward {name!r} raised {type(error).__name__}: {error}{_where(error)}; the first "
                f"completion of its batch was {shorten(completions[0] if completions else '')!r}"
            ) from error
        return _as_tensor(name, values, completions)

    return call


def _where(error: Exception) -> str:
    """The line of the reward that an error came through, for who gets no traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [i for i, frame in enumerate(frames) if frame.filename == __file__]
    called = frames[ours[-1] + 1 :]
    return f" ({called[0].filename}, line {called[0].lineno})" if called else ""


def _as_tensor(name: str, values: Any, completions: list[str]) -> torch.Tensor:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
    if hasattr(values, "tolist"):  # a tensor or an array of NumPy
        values = values.tolist()
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise RewardError(
            f"reward {name!r}: expected {len(completions)} numbers, got {type(values).__name__}"
        )
    if len(values) != len(completions):
        raise RewardError(
            f"reward {name!r}: expected {len(completions)} numbers, one a completion, got "
            f"{len(values)}"
        )
    numbers = torch.tensor([_number(value) for value in values], dtype=torch.float32)
    for i in numbers.isinf().nonzero().flatten().tolist():
        raise RewardError(
            f"reward {name!r}: expected a finite number, NaN or None, got {values[i]!r} for "
            f"{shorten(completions[i])!r}"
        )
    return numbers


def _number(value: Any) -> float:
    """`value` as a float, infinite (which no reward may be) if it is no number."""
    if value is None:
        return math.nan
    try:
        return math.inf if isinstance(value, str) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.inf


# ---- rules --------------------------------------------------------------------------------------


def _by_rule(rule: Verifier) -> Reward:
    def judge(prompts, completions, answers, finished):
        return [rule(*pair) for pair in zip(completions, answers, strict=True)]

    return judge


# ---- functions of the user ----------------------------------------------------------------------


def _load_function(name: str) -> Callable[..., Any]:
    module_name, _, function_name = name.partition(":")
    # A command's own folder, not the current one, is what Python looks into first.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise RewardError(
            f"reward {name!r}: cannot import {module_name!r}: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value)]
        raise RewardError(
            f"reward {name!r}: {module_name} has no function {function_name!r}"
            f"{did_you_mean(function_name, known)}"
        )
    taken = _taken(name, function)

    def judge(*lists):
        return function(**{k: v for k, v in zip(_ARGUMENTS, lists, strict=True) if k in taken})

    return judge


def _taken(name: str, function: Callable[..., Any]) -> tuple[str, ...]:
    """Which of the four lists a function takes, all of them if it takes any keyword."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # written in C, without a signature
        return _ARGUMENTS
    for key, parameter in parameters.items():
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        optional = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        optional |= parameter.default is not parameter.empty
        if not optional and not (named and key in _ARGUMENTS):
            raise RewardError(
                f"reward {name!r}: its parameter {key!r} is none of {', '.join(_ARGUMENTS)}"
                f"{did_you_mean(key, _ARGUMENTS)}"
            )
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return _ARGUMENTS
    return tuple(key for key in _ARGUMENTS if key in parameters)


# ---- reward models ------------------------------------------------------------------------------


def model_reward(model: Any, tokenizer: Any, *, batch_size: int = 32) -> Reward:
    """The score of a sequence classifier for prompt + completion, as one text.

    Texts longer than the model's positions lose their beginning: it is the completion, at the end,
    that is judged.

    Args:
        model: a sequence classifier of transformers with one label.
        tokenizer: its tokenizer.
        batch_size: texts at a time.

    Raises:
        RewardError: the model has several labels, or its tokenizer no token to pad with.
    """
    if model.config.num_labels != 1:
        raise RewardError(f"reward model: expected one label, got {model.config.num_labels}")
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise RewardError("reward model: its tokenizer has neither a padding nor an end token")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    # By its padding the classifier finds the last token of a text, whose score counts.
    model.config.pad_token_id = tokenizer.pad_token_id
    tokenizer.truncation_side = "left"
    positions = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    longest = min(positions, tokenizer.model_max_length)
    # A tokenizer without a limit says so by 1e30, which is no length to cut to.
    limit = {"truncation": True, "max_length": longest} if longest < 10**9 else {}

    @torch.no_grad()
    def judge(prompts, completions, answers, finished):
        model.eval()
        texts = [prompt + written for prompt, written in zip(prompts, completions, strict=True)]
        scores = []
        for start in range(0, len(texts), batch_size):
            encoded = tokenizer(
                texts[start : start + batch_size], padding=True, padding_side="right",
                return_tensors="pt", **limit,
            ).to(model.device)  # fmt: skip
            scores.append(model(**encoded).logits[:, 0].float().cpu())
        return torch.cat(scores) if scores else torch.zeros(0)

    return judge


def _load_model(path: str, device: str) -> Reward:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            path, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # of the file system, of the network, or of a configuration
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RewardError(f"reward 'model:{path}': {reason}") from error
    if missing := sorted(loading["missing_keys"]):
        # transformers draws them at random: the scores would be noise, under a mere warning.
        raise RewardError(
            f"reward 'model:{path}': the weights of {', '.join(missing[:3])} are not in it; "
            "expected a trained sequence classifier"
        )
    return model_reward(model.to(device), tokenizer)

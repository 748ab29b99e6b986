"""Tiny models and short runs that the loops' tests share."""

from __future__ import annotations

import json

import pytest
import torch
from rlkern_loops.rollout import sample
from rlkern_loops.tasks import Addition
from rlkern_loops.tiny import char_tokenizer, tiny_gpt2
from transformers import AutoConfig, AutoModelForCausalLM

#: Options of a run of seconds.
SHORT = {
    "device": "cpu", "steps": 3, "warm_start_steps": 10, "warm_start_batch_size": 16,
    "prompts_per_step": 8, "eval_every": 2, "hidden_size": 16, "minibatches": 2,
    "reward_model_steps": 5, "samples_every": 0, "print_every": 100,
}  # fmt: skip


@pytest.fixture
def short(tmp_path):
    """Options of a run of seconds, in a folder of its own."""
    return SHORT | {"output_dir": str(tmp_path / "run")}


@pytest.fixture(scope="session")
def task():
    return Addition()


@pytest.fixture(scope="session")
def tokenizer(task):
    return char_tokenizer(task.alphabet)


@pytest.fixture
def policy(tokenizer):
    torch.manual_seed(0)
    return tiny_gpt2(tokenizer, hidden_size=16, num_layers=2, num_heads=2)


@pytest.fixture
def written(policy, tokenizer):
    """Twelve completions of three prompts, of different lengths."""
    torch.manual_seed(3)
    written = sample(
        policy, tokenizer, ["07+85=", "1+1=", "30+4="], max_new_tokens=9, temperature=1.0,
        group_size=4,
    )  # fmt: skip
    assert len(set(written.mask.sum(1).tolist())) > 3
    return written


@pytest.fixture(scope="session")
def make_model(tmp_path_factory, tokenizer):
    """Saves a tiny random model of a transformers architecture with its tokenizer; the folder."""
    sizes = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 64, "bos_token_id": None, "initializer_range": 0.3,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip

    def make(kind, **options):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | options))
        folder = str(tmp_path_factory.mktemp("models") / kind)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def folders(make_model):
    """Models with rotary positions, as large ones have, by name."""
    return {
        "llama": make_model("llama", attention_dropout=0.1),
        "qwen": make_model("qwen2", attention_dropout=0.1),
    }


@pytest.fixture
def sums(tmp_path, task):
    """Problems of the addition task as a JSON-lines file."""
    path = tmp_path / "sums.jsonl"
    examples = [task.example(a, a + 3) for a in range(40)]
    path.write_text("".join(json.dumps(e._asdict()) + "\n" for e in examples))
    return str(path)


@pytest.fixture
def records():
    """Reads back what a run logged."""

    def read(folder, phase="train"):
        with open(f"{folder}/metrics.jsonl") as file:
            return [r for r in map(json.loads, file) if r["phase"] == phase]

    return read

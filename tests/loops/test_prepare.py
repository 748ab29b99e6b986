"""What a run starts from: prompts as the model reads them, in the sets they belong to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rlkern_loops.errors import DataError
from rlkern_loops.grpo import GRPOConfig
from rlkern_loops.model import ModelError, load_tokenizer
from rlkern_loops.prepare import prepare
from transformers import AutoModelForCausalLM


@pytest.fixture
def options(short, folders, sums):
    return short | {
        "model": folders["llama"], "dataset": sums, "reward": "numeric", "eval_size": 10,
        "max_new_tokens": 5,
    }  # fmt: skip


def test_a_dataset_is_cut_in_two(options):
    setting = prepare(GRPOConfig(**options), "cpu")
    assert len(setting.train) == 30 and len(setting.validation) == 10
    assert not {e.prompt for e in setting.train} & {e.prompt for e in setting.validation}
    assert setting.held_out == setting.validation and setting.eval_name == "eval/accuracy"
    assert setting.model == options["model"] and setting.max_new_tokens == 5


def test_evaluation_data_of_its_own(options, tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text("".join(f'{{"prompt": "{i}+0=", "answer": "{i}"}}\n' for i in range(20)))
    options |= {"eval_dataset": str(path), "limit": 25}
    setting = prepare(GRPOConfig(**options), "cpu")
    assert len(setting.train) == 25
    assert [e.prompt for e in setting.validation] == [f"{i}+0=" for i in range(10)]


def test_prompts_are_put_into_the_chat_template(options, folders, tmp_path):
    tokenizer = load_tokenizer(folders["llama"])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '+' if m['role'] == 'system' else '=' }}{{ m['content'] }}"
        "{% endfor %}{% if add_generation_prompt %}={% endif %}"
    )
    folder = str(tmp_path / "chat")
    AutoModelForCausalLM.from_pretrained(folders["llama"]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    options |= {"model": folder, "chat_template": True, "system_prompt": "123"}
    setting = prepare(GRPOConfig(**options), "cpu")
    prompt = setting.train[0].prompt
    assert prompt.startswith("+123=") and prompt.endswith("==")
    assert setting.sampling["add_special_tokens"] is False


def test_what_the_model_has_no_positions_for_is_left_out(options, tmp_path, capsys):
    path = tmp_path / "long.jsonl"
    rows = [{"prompt": "1" * n, "answer": "1"} for n in (5, 10, 59, 60, 70)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options |= {"dataset": str(path), "eval_dataset": options["dataset"], "max_new_tokens": 5}
    setting = prepare(GRPOConfig(**options), "cpu")  # of 64 positions
    assert [len(e.prompt) for e in setting.train] == [5, 10, 59]
    assert "2 prompts of more than 59 tokens are left out" in capsys.readouterr().out
    setting = prepare(GRPOConfig(**options, max_prompt_tokens=8), "cpu")
    assert [len(e.prompt) for e in setting.train] == [5]
    with pytest.raises(DataError, match="max_new_tokens: expected fewer than the 64 positions"):
        prepare(GRPOConfig(**options | {"max_new_tokens": 64}), "cpu")


def test_defaults_that_do_not_fit_are_told_to_be_defaults(options):
    for name, left_out in (("eval_size", 200), ("max_new_tokens", 256)):
        given = {key: value for key, value in options.items() if key != name}
        with pytest.raises(DataError, match=rf"^{name}: .*, got {left_out} \(the default\)$"):
            prepare(GRPOConfig(**given), "cpu")
    with pytest.raises(DataError, match="^eval_size: .*, got 100$"):
        prepare(GRPOConfig(**options | {"eval_size": 100}), "cpu")


def test_what_is_not_there_is_named(options, tmp_path):
    with pytest.raises(DataError, match="missing.jsonl"):
        prepare(GRPOConfig(**options | {"dataset": str(tmp_path / "missing.jsonl")}), "cpu")
    with pytest.raises(ModelError, match=f"model: cannot load .*{tmp_path}"):
        prepare(GRPOConfig(**options | {"model": str(tmp_path)}), "cpu")


def test_small_models_are_made_once(short):
    config = GRPOConfig(**short)
    first = prepare(config, "cpu")
    written = {p: p.stat().st_mtime_ns for p in _files(first.model)}
    assert written and prepare(config, "cpu", resumed=True).model == first.model
    assert {p: p.stat().st_mtime_ns for p in _files(first.model)} == written
    prepare(config, "cpu")
    assert {p: p.stat().st_mtime_ns for p in _files(first.model)} != written


def _files(folder):
    return sorted(Path(folder).iterdir())


def test_a_folder_that_cannot_be_written_is_named(short, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.raises(DataError, match="output_dir: cannot write .*warm_start.*No space left"):
        prepare(GRPOConfig(**short), "cpu")

"""Examples: from files and data sets, and in an order that a run can go on with."""

from __future__ import annotations

import json

import pytest
from rlkern_loops.data import Example, Sampler, fit_prompts, hold_out, load_examples, render
from rlkern_loops.errors import DataError
from rlkern_loops.tiny import char_tokenizer

ROWS = [{"question": f"{i}+1=", "answer": str(i + 1), "level": i} for i in range(5)]
EXPECTED = [Example(row["question"], row["answer"]) for row in ROWS]


def load(source, split="train", prompt_column="question", answer_column="answer", **options):
    return load_examples(
        str(source), split=split, prompt_column=prompt_column, answer_column=answer_column,
        **options,
    )  # fmt: skip


def lines(path, *rows):
    path.write_text(
        "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    )
    return path


@pytest.fixture
def file(tmp_path):
    return lines(tmp_path / "data.jsonl", *ROWS)


# ---- where they come from -----------------------------------------------------------------------


def test_json_lines_and_a_json_list(tmp_path, file):
    assert load(file) == EXPECTED
    assert load(file, limit=2) == EXPECTED[:2]
    (tmp_path / "list.json").write_text(json.dumps(ROWS, indent=1))
    assert load(tmp_path / "list.json") == EXPECTED
    # A line separator of Unicode inside a string ends no line of JSON; a blank line is none.
    odd = {"question": "a\u2028b", "answer": ""}
    path = lines(tmp_path / "odd.jsonl", json.dumps(odd, ensure_ascii=False) + "\n", "\n", ROWS[0])
    assert load(path) == [Example("a\u2028b", ""), EXPECTED[0]]


def test_answers_can_be_left_out(file):
    assert load(file, answer_column="")[1] == Example("1+1=", "")


def test_folders_that_datasets_saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(test=data).save_to_disk(tmp_path / "many")
    assert load(tmp_path / "one") == load(tmp_path / "one", split="test") == EXPECTED
    assert load(tmp_path / "many", split="test", limit=3) == EXPECTED[:3]
    with pytest.raises(DataError, match=r"split: .*many' has 'test', got 'train'"):
        load(tmp_path / "many")


def test_a_folder_of_data_files(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "repo").mkdir()
    lines(tmp_path / "repo" / "train.jsonl", *ROWS)
    lines(tmp_path / "repo" / "test.jsonl", *ROWS[:2])
    assert load(tmp_path / "repo") == EXPECTED
    assert load(tmp_path / "repo", split="test") == EXPECTED[:2]
    assert load(tmp_path / "repo", split="train[:3]") == EXPECTED[:3]
    with pytest.raises(DataError, match=r"repo', split 'tset': .*tset"):
        load(tmp_path / "repo", split="tset")


def test_a_missing_source_is_named(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"nowhere.jsonl': cannot be read: No such file"):
        load(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match=r"dataset '.*nowhere': no such folder"):
        load(tmp_path / "nowhere")
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"dataset 'no/such', split 'train': "):
        load("no/such")


@pytest.mark.parametrize(
    "rows,message",
    [
        ([], "expected at least one row, got an empty data set"),
        ([{"questoin": "1", "answer": "2"}],
         r"row 1: no column 'question' \(did you mean 'questoin'\?\); there are 'questoin', "),
        ([ROWS[0], {"question": "1", "answer": 2}],
         "row 2, column 'answer': expected text, got int 2"),
        ([{"question": None, "answer": "2"}],
         "row 1, column 'question': expected text, got NoneType"),
        ([{"question": " \n", "answer": "2"}], "row 1, column 'question': expected a prompt"),
        (["[1, 2]\n"], "row 1: expected an object with columns, got list"),
        ([ROWS[0], '{"question": \n'], "line 2: not JSON"),
        (["\n", "[1, 2\n"], "line 2: not JSON"),
        (["\x00\n"], "line 1: not JSON"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_said(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        load(lines(tmp_path / "data.jsonl", *rows))


def test_a_json_file_that_is_cut_off(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps(ROWS, indent=1)[:-20])
    with pytest.raises(DataError, match=r"list.json', line \d+: not JSON"):
        load(tmp_path / "list.json")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="binary.jsonl': cannot be read"):
        load(tmp_path / "binary.jsonl")


def test_options_that_mean_nothing_are_refused(file):
    assert load(file, split="test") == EXPECTED
    with pytest.raises(DataError, match=r"split: expected a plain name, .* got 'train\[:2\]'"):
        load(file, split="train[:2]")
    other = file.rename(file.with_suffix(".csv"))
    with pytest.raises(DataError, match=r"expected a .jsonl or .json file, got '.csv'"):
        load(other)
    file = other.rename(file)
    with pytest.raises(DataError, match="limit: expected at least 1 example, got 0"):
        load(file, limit=0)


# ---- prompts ------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer():
    return char_tokenizer("0123456789+=")


def test_render_without_and_with_a_chat_template(tokenizer):
    example = EXPECTED[0]
    assert render(example, tokenizer, chat_template=False) == "0+1="
    with pytest.raises(DataError, match="system_prompt: expected none without chat_template"):
        render(example, tokenizer, chat_template=False, system_prompt="Be brief.")
    with pytest.raises(DataError, match="chat_template: the tokenizer has none"):
        render(example, tokenizer, chat_template=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert render(example, tokenizer, chat_template=True, system_prompt="Be brief.") == (
        "system: Be brief.\nuser: 0+1=\nassistant: "
    )
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(DataError, match="chat_template: no system role"):
        render(example, tokenizer, chat_template=True)


def test_longer_prompts_are_left_out_and_counted(tokenizer):
    examples = [Example("1" * n, "") for n in (3, 7, 5)]
    assert fit_prompts(examples, tokenizer, 5) == ([examples[0], examples[2]], 1)
    with pytest.raises(DataError, match="max_prompt_tokens: expected at least 3, .* got 2"):
        fit_prompts(examples, tokenizer, 2)


def test_what_is_held_out_is_never_trained_on():
    examples = [Example(str(i % 40), str(i)) for i in range(100)]  # most prompts thrice
    train, held_out = hold_out(examples, 10, seed=3)
    assert len(held_out) == 10 and train
    assert not {e.prompt for e in train} & {e.prompt for e in held_out}
    assert set(train) | set(held_out) <= set(examples)
    assert hold_out(examples, 10, seed=3) == (train, held_out) != hold_out(examples, 10, seed=4)
    assert sorted(hold_out(examples, 0, seed=3)[0]) == sorted(examples)
    for count in (100, 101, -1):
        with pytest.raises(DataError, match=f"eval_size: expected fewer than .* got {count}"):
            hold_out(examples, count, seed=3)


# ---- order --------------------------------------------------------------------------------------


def test_every_epoch_has_each_example_once_in_another_order():
    examples = [Example(str(i), "") for i in range(10)]
    sampler = Sampler(examples, seed=1)
    epochs = [sampler.next(10) for _ in range(3)]
    assert all(sorted(epoch) == sorted(examples) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != examples
    assert Sampler(examples, seed=1).next(30) == sum(epochs, [])
    assert Sampler(examples, seed=2).next(10) != epochs[0]


@pytest.mark.parametrize("taken", [0, 3, 10, 14, 25])
def test_a_sampler_goes_on_from_its_state(taken):
    examples = [Example(str(i), "") for i in range(10)]
    whole = Sampler(examples, seed=1)
    whole.next(taken)
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = Sampler(examples, seed=1)
    resumed.next(4)
    resumed.load_state_dict(state)
    assert [resumed.next(7) for _ in range(5)] == [whole.next(7) for _ in range(5)]


def test_a_state_of_other_data_is_refused():
    state = Sampler(EXPECTED, seed=1).state_dict()
    with pytest.raises(DataError, match="seed: .* resume with the same"):
        Sampler(EXPECTED, seed=2).load_state_dict(state)
    with pytest.raises(DataError, match="examples: .* resume with the same"):
        Sampler(EXPECTED[1:], seed=1).load_state_dict(state)
    with pytest.raises(DataError, match="expected at least one, got none"):
        Sampler([], seed=1)

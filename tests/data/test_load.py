from __future__ import annotations

import json
import random

import datasets
import pytest

from prunetune.config.schema import DataConfig
from prunetune.core.errors import DataError
from prunetune.data.load import load_bundle

ROWS = [{"id": index, "question": f"Is {index} even?", "answer": f"Number {index}."} for index in range(60)]


@pytest.fixture(autouse=True)
def _short_general_text(tmp_path, monkeypatch):
    """The default text takes a second to collect and has its own tests."""
    monkeypatch.setattr("prunetune.data.prose.general_text", lambda avoid: f"Prose without {len(avoid)} answers.")


@pytest.fixture
def load(chat_tokenizer):
    def call(train, *, tokenizer=chat_tokenizer, max_length=128, seed=0, completion_only=None, **config):
        config = DataConfig(train=train, **config)
        return load_bundle(
            config, tokenizer=tokenizer, max_length=max_length, seed=seed, completion_only=completion_only
        )

    return call


def asked(dataset) -> set[str]:
    return {row["prompt"][-1]["content"] for row in dataset}


def test_rows_are_converted_split_and_measured(load, write_rows):
    bundle = load(write_rows(ROWS), validation_fraction=0.1)
    assert (
        (bundle.facts["rows"], bundle.facts["validation_rows"])
        == (54, 6)
        == (len(bundle.train), len(bundle.validation))
    )
    assert bundle.train.column_names == ["prompt", "completion"]
    assert asked(bundle.train) | asked(bundle.validation) == {row["question"] for row in ROWS}
    assert bundle.facts["format"] == "prompt_completion"
    assert 0.1 < bundle.facts["target_share"] < 0.6
    lengths = bundle.facts["length_tokens"]
    assert lengths["min"] <= lengths["p50"] <= lengths["p95"] <= lengths["max"] < 128
    assert any("columns: question + answer" in note for note in bundle.facts["notes"])
    assert "54 training and 6 validation rows" in bundle.description
    assert bundle.general_text == "Prose without 54 answers."
    json.dumps(bundle.facts)


def test_the_split_depends_on_content_and_not_on_order_or_seed(load, write_rows):
    shuffled = ROWS[:]
    random.Random(3).shuffle(shuffled)
    one = load(write_rows(ROWS, "a.jsonl"), validation_fraction=0.2, seed=0)
    other = load(write_rows(shuffled, "b.jsonl"), validation_fraction=0.2, seed=5)
    assert asked(one.validation) == asked(other.validation)
    assert len(asked(one.validation)) == 12


def test_no_question_is_on_both_sides(load, write_rows):
    rows = [{"prompt": f"Question {index // 3}?" + " " * (index % 2), "completion": f"A{index}"} for index in range(90)]
    bundle = load(write_rows(rows), validation_fraction=0.2)
    train, validation = ({text.strip() for text in asked(part)} for part in (bundle.train, bundle.validation))
    assert train.isdisjoint(validation)
    assert len(bundle.train) + len(bundle.validation) == 90
    assert len(bundle.validation) == 18


def test_exact_duplicates_are_dropped_and_counted(load, write_rows):
    bundle = load(write_rows([*ROWS, *ROWS[:20]]))
    assert bundle.facts["duplicates"] == 20
    assert len(bundle.train) + len(bundle.validation) == 60
    assert any("20 of 80 training rows (25.0%) repeat" in note for note in bundle.facts["notes"])


def test_max_rows_takes_a_nested_sample_of_the_training_rows(load, write_rows):
    path = write_rows(ROWS)
    ten, twenty = (load(path, max_rows=count) for count in (10, 20))
    assert (len(ten.train), len(twenty.train)) == (10, 20)
    assert asked(ten.train) < asked(twenty.train)
    assert asked(ten.validation) == asked(twenty.validation)
    assert asked(load(path, max_rows=10, seed=1).train) != asked(ten.train)


def test_given_validation_is_used_and_overlap_is_reported(load, write_rows):
    train, validation = write_rows(ROWS[:50], "train.jsonl"), write_rows(ROWS[45:], "validation.jsonl")
    bundle = load(train, validation=validation, validation_rows=12)
    assert len(bundle.train) == 50
    assert len(bundle.validation) == 12
    whole = load(train, validation=validation)
    assert whole.facts["validation_overlap"] == 5
    assert any("5 of 15 validation rows" in text for text in whole.facts["warnings"])


def test_the_validation_split_of_the_source_is_used(load, tmp_path):
    parts = {"train": ROWS[:40], "validation": ROWS[40:]}
    saved = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()})
    saved.save_to_disk(str(tmp_path / "saved"))
    bundle = load(str(tmp_path / "saved"))
    assert (len(bundle.train), len(bundle.validation)) == (40, 20)


def test_rows_without_completion_are_all_listed_with_their_lines(load, write_rows):
    rows = [dict(row) for row in ROWS]
    for index in (3, 4, 5, 10, 20, 30):
        rows[index]["answer"] = None
    with pytest.raises(DataError) as caught:
        load(write_rows(rows))
    text = str(caught.value)
    assert "rows.jsonl: 6 of 60 rows cannot be used" in text
    assert text.count("answer is missing") == 5
    assert "lines 4-6, 11, 21, 31" in text


def test_long_rows_are_counted_and_only_lost_ones_are_left_out(load, write_rows):
    rows = [*ROWS[:40], *({"question": "word " * 200 + str(i), "answer": "x"} for i in range(10))]
    rows += [{"question": f"Short {i}?", "answer": "word " * 200} for i in range(10)]
    bundle = load(write_rows(rows), validation=write_rows(ROWS[50:], "validation.jsonl"))
    assert bundle.facts["truncated_rows"] == 20
    assert bundle.facts["dropped_rows"] == 10
    assert len(bundle.train) == 50
    assert any(
        "20 of 60 training rows (33.3%) are longer" in text and "10 of them" in text
        for text in bundle.facts["warnings"]
    )


def test_nothing_left_to_learn_names_a_length_that_would_do(load, write_rows):
    with pytest.raises(DataError, match=r"max_length is 8 tokens.*every answer is cut away.*at least (\d+)") as caught:
        load(write_rows(ROWS), max_length=8)
    enough = int(str(caught.value).split("at least ")[1].split()[0])
    assert load(write_rows(ROWS), max_length=enough).facts["rows"] >= 50


def test_a_template_that_leaves_the_answers_out_is_refused(load, write_rows, chat_tokenizer):
    broken = type(chat_tokenizer)(tokenizer_object=chat_tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    broken.chat_template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match="has a target token"):
        load(write_rows(ROWS), tokenizer=broken)


def test_a_template_without_end_of_turn_is_warned_about(load, write_rows, chat_tokenizer):
    endless = type(chat_tokenizer)(tokenizer_object=chat_tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    endless.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    assert any("may not learn to stop" in text for text in load(write_rows(ROWS), tokenizer=endless).facts["warnings"])
    assert not load(write_rows(ROWS)).facts["warnings"]


def test_rows_that_the_template_refuses_are_listed(load, write_rows, chat_tokenizer):
    strict = type(chat_tokenizer)(tokenizer_object=chat_tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    strict.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + chat_tokenizer.chat_template
    )
    rows = [{"system": "Be brief." if index == 7 else "", **row} for index, row in enumerate(ROWS)]
    with pytest.raises(DataError, match="line 8: the model's chat template refuses it: System role not supported"):
        load(write_rows(rows), tokenizer=strict, max_rows=None, validation=write_rows(ROWS, "validation.jsonl"))


def test_conversations_need_a_chat_template(load, write_rows, raw_tokenizer):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 2
    with pytest.raises(DataError, match="no chat template"):
        load(write_rows(rows), tokenizer=raw_tokenizer)


def test_conversations_with_one_answer_learn_the_answer_only(load, write_rows):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    one = [{"messages": [{"role": "user", "content": f"Ask {i}"}, turns[1]]} for i in range(20)]
    several = [{"messages": [*row["messages"], *turns]} for row in one]
    single, multiple = load(write_rows(one, "a.jsonl")), load(write_rows(several, "b.jsonl"))
    assert single.train.column_names == ["prompt", "completion"]
    assert single.facts["target_share"] < 0.5
    assert multiple.train.column_names == ["messages"]
    assert multiple.facts["target_share"] == 1.0
    assert load(write_rows(one), completion_only=False).facts["target_share"] == 1.0


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (ROWS[:1], {}, "has 1 different row"),
        ([ROWS[0]] * 5, {}, "has 1 different row"),
        (ROWS, {"validation_fraction": 0}, "data.validation_fraction is 0"),
        (ROWS, {"validation_fraction": "100%"}, "data.validation_fraction is 1"),
        (ROWS, {"format": "alpaca"}, "data.format is alpaca"),
        (ROWS, {"general_text": "nowhere.txt"}, "data.general_text is nowhere.txt"),
    ],
)
def test_impossible_settings_say_what_to_set(load, write_rows, rows, settings, message):
    with pytest.raises(DataError, match=message):
        load(write_rows(rows), **settings)


def test_two_rows_are_enough(load, write_rows):
    bundle = load(write_rows(ROWS[:2]))
    assert (len(bundle.train), len(bundle.validation)) == (1, 1)


def test_one_prompt_for_all_rows_is_split_with_a_warning(load, write_rows):
    bundle = load(write_rows([{"prompt": "Write a line.", "completion": f"Line {i}"} for i in range(40)]))
    assert (len(bundle.train), len(bundle.validation)) == (38, 2)
    assert any("in common with training" in text for text in bundle.facts["warnings"])


def test_general_text_from_a_file(load, write_rows, tmp_path):
    (tmp_path / "prose.txt").write_text("Some prose.")
    assert load(write_rows(ROWS), general_text=str(tmp_path / "prose.txt")).general_text == "Some prose."


def test_pydocs_is_a_source_like_any_other(load):
    bundle = load("pydocs", max_rows=50, validation_rows=30)
    assert len(bundle.train) == 50
    assert 10 <= len(bundle.validation) <= 30
    assert bundle.facts["held_out_modules"]
    assert "pydocs" in bundle.description

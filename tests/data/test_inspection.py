"""Looking at rows before training: what is recognised, what is trained, and what is wrong."""

from __future__ import annotations

import pytest

from prunetune.core.errors import DataError
from prunetune.data.inspection import inspect
from prunetune.data.selection import select
from prunetune.data.selection_folder import write_selection
from tests.data.conftest import CHATML, make_tokenizer
from tests.data.selections import stored
from tests.support import tiny_tokenizer

QUESTION = "What is the {} thing that one should know about number {} of all the many things there are"
ANSWER = "It is the {} thing, which nobody would have guessed, and number {} is the one that follows it"
WORDS = ("first", "second", "third", "fourth", "fifth", "sixth")


def rows(count=6):
    return [{"question": QUESTION.format(WORDS[i], 7 * i), "answer": ANSWER.format(WORDS[i], i)} for i in range(count)]


def test_a_clean_file_has_nothing_to_complain_about(write_rows, chat_tokenizer):
    found = inspect(write_rows(rows()), chat_tokenizer, max_length=None)
    assert found.layout == "rows are laid out as prompt_completion (columns: question + answer)"
    assert (found.rows, found.bad, found.altered, found.exact, found.near) == (6, {}, {}, {}, {})
    assert found.chat
    assert found.stops == 1.0
    assert found.warnings == []
    assert 0 < found.facts["target_share"] < 1
    assert found.facts["length_tokens"]["max"] >= found.facts["length_tokens"]["p50"]


def test_shown_rows_are_the_text_with_the_trained_part_marked(write_rows, chat_tokenizer):
    found = inspect(write_rows(rows()), chat_tokenizer, max_length=None)
    assert len(found.shown) == 3
    for shown in found.shown:
        row = rows()[shown.place - 1]
        context, trained = (
            "".join(text for text, state in shown.segments if state == wanted) for wanted in ("context", "trained")
        )
        assert context == f"<|im_start|>user\n{row['question']}<|im_end|>\n<|im_start|>assistant\n"
        assert trained == f"{row['answer']}<|im_end|>\n"


def test_cut_rows_lose_their_end_and_their_targets(write_rows, chat_tokenizer):
    whole = inspect(write_rows(rows()), chat_tokenizer, max_length=None)
    limit = whole.facts["length_tokens"]["max"] - 5
    found = inspect(write_rows(rows()), chat_tokenizer, max_length=limit)
    assert 0 < found.truncated == found.stops_cut <= 6
    assert any("lose their end" in text for text in found.warnings)
    assert inspect(write_rows(rows()), chat_tokenizer, max_length=8).no_target == 6
    assert any(state == "cut" for shown in found.shown for _, state in shown.segments) or found.truncated < 6


def test_bad_rows_are_listed_with_their_lines(tmp_path, chat_tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"question": "a b", "answer": "c d"}\n\n{"question": "e f"\n{"question": "g h", "answer": ""}\n'
        '[1]\n{"question": "i j", "answer": "k l"}\n'
    )
    found = inspect(path, chat_tokenizer)
    assert found.rows == 5
    assert list(found.bad) == [3, 4, 5]
    assert "is not JSON" in found.bad[3]
    assert found.bad[4] == "answer is empty"
    assert "not an object" in found.bad[5]
    assert any("3 of 5 rows cannot be used" in text for text in found.warnings)


def test_duplicates_are_found(chat_tokenizer):
    data = rows()
    near = {**data[1], "answer": data[1]["answer"] + " of course"}
    found = inspect([*data, data[0], near], chat_tokenizer)
    assert found.exact == {7: 1}
    assert found.near in ({8: 2}, {2: 8})
    assert any("repeat others (1 exactly, 1 nearly)" in text for text in found.warnings)
    assert inspect(data, chat_tokenizer, near_duplicates=False).near is None


def test_text_that_does_not_survive_its_tokens_is_named():
    found = inspect(
        [{"prompt": "w1 w2", "completion": "w3 hello"}, {"prompt": "w1", "completion": "w4"}], tiny_tokenizer()
    )
    assert found.altered == {1: "the answer 'w3 hello' does not come back from its tokens"}


def test_a_template_that_drops_the_system_message_is_noticed():
    careless = make_tokenizer(CHATML.replace("for m in messages", "for m in messages if m['role'] != 'system'"))
    found = inspect([{"system": "Be brief.", "prompt": "a", "completion": "b"}], careless)
    assert found.altered == {1: "the prompt 'Be brief.' does not come back from its tokens"}


def test_a_template_without_end_of_turn_is_noticed():
    endless = make_tokenizer(CHATML.replace("<|im_end|>", ""))
    found = inspect(rows(), endless)
    assert found.stops == 0.0
    assert any("may not learn to stop" in text for text in found.warnings)


def test_without_a_template_rows_are_plain_text(raw_tokenizer):
    found = inspect(rows(), raw_tokenizer, max_length=None)
    assert not found.chat
    assert found.stops == 1.0
    assert found.warnings == []


def test_a_selection_is_inspected_as_it_will_be_trained(tmp_path):
    kept = select(stored(), tokens_method="loss", tokens_kept=0.5)
    write_selection(kept, tmp_path / "kept")
    found = inspect(tmp_path / "kept", tiny_tokenizer(), max_length=None)
    assert "laid out as tokens" in found.layout
    assert found.facts["target_tokens"] == kept.kept.sum()
    assert (found.altered, found.exact, found.stops) == ({}, {}, 1.0)
    for shown in found.shown:
        trained = sum(len(text.split()) for text, state in shown.segments if state == "trained")
        assert trained == sum(label != -100 for label in kept.dataset()[shown.place - 1]["labels"])


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "no rows"),
        ([{"a": "b"}], "fit no layout"),
        ([{"prompt": "", "completion": ""}], "1 of 1 rows cannot be used"),
        ("nowhere.jsonl", "no such file"),
    ],
)
def test_what_cannot_be_inspected_is_refused(data, said, chat_tokenizer):
    with pytest.raises(DataError, match=said):
        inspect(data, chat_tokenizer)

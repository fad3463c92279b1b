from __future__ import annotations

import pytest

from prunetune.core.errors import DataError
from prunetune.data.formats import (
    BadRowError,
    as_prompt_completion,
    converter,
    question_of,
    recognise,
    single_exchanges,
)

USER = {"role": "user", "content": "Two plus two?"}
BOT = {"role": "assistant", "content": "Four."}


@pytest.mark.parametrize(
    ("columns", "name", "read_from"),
    [
        (["id", "prompt", "completion"], "prompt_completion", ("prompt", "completion")),
        (["question", "answer"], "prompt_completion", ("question", "answer")),
        (["instruction", "input", "output"], "alpaca", ("instruction", "input", "output")),
        (["instruction", "output"], "alpaca", ("instruction", "output")),
        (["instruction", "response"], "prompt_completion", ("instruction", "response")),
        (["messages"], "messages", ("messages",)),
        (["conversations", "id"], "messages", ("conversations",)),
        (["messages", "question", "answer"], "messages", ("messages",)),
        (["prompt", "completion", "text"], "prompt_completion", ("prompt", "completion")),
        (["text"], "text", ("text",)),
    ],
)
def test_columns_tell_the_layout(columns, name, read_from):
    layout = recognise(columns)
    assert (layout.name, layout.columns) == (name, read_from)
    assert " + ".join(read_from) in layout.sentence


def test_wanted_layout_wins_over_the_recognised_one():
    assert recognise(["prompt", "completion", "text"], "text").columns == ("text",)


def test_unknown_columns_are_named_with_what_to_do():
    with pytest.raises(DataError, match=r"columns are body, title.*rename"):
        recognise(["title", "body"])
    with pytest.raises(DataError, match=r"data.format is alpaca.*instruction"):
        recognise(["prompt", "completion"], "alpaca")


def test_strings_become_a_conversation_for_a_chat_model():
    turn = converter(recognise(["question", "answer"]), chat=True)
    assert turn({"question": "Two plus two?", "answer": "Four."}) == {"prompt": [USER], "completion": [BOT]}


def test_raw_strings_are_not_glued_together():
    turn = converter(recognise(["prompt", "completion"]), chat=False)
    assert turn({"prompt": "Why?", "completion": "So."}) == {"prompt": "Why?\n", "completion": "So."}
    assert turn({"prompt": "Why? ", "completion": "So."}) == {"prompt": "Why? ", "completion": "So."}
    assert turn({"prompt": "Why?", "completion": " So."}) == {"prompt": "Why?", "completion": " So."}


def test_alpaca_input_follows_the_instruction():
    turn = converter(recognise(["instruction", "input", "output"]), chat=False)
    assert turn({"instruction": "Add.", "input": "1 2", "output": "3"})["prompt"] == "Add.\n\n1 2\n"
    assert turn({"instruction": "Add.", "input": "", "output": "3"})["prompt"] == "Add.\n"


def test_system_column_is_kept():
    turn = converter(recognise(["system_prompt", "question", "response"]), chat=True)
    row = turn({"system_prompt": "Be brief.", "question": "Two plus two?", "response": "Four."})
    assert row["prompt"] == [{"role": "system", "content": "Be brief."}, USER]


def test_sharegpt_turns_become_messages():
    turn = converter(recognise(["conversations"]), chat=True)
    row = {"conversations": [{"from": "human", "value": "Two plus two?"}, {"from": "gpt", "value": "Four."}]}
    assert turn(row) == {"messages": [USER, BOT]}


def test_one_answer_at_the_end_is_a_prompt_and_a_completion():
    one, two = {"messages": [USER, BOT]}, {"messages": [USER, BOT, USER, BOT]}
    assert single_exchanges([one])
    assert not single_exchanges([one, two])
    assert as_prompt_completion(one) == {"prompt": [USER], "completion": [BOT]}


@pytest.mark.parametrize(
    ("columns", "row", "reason"),
    [
        (["prompt", "completion"], {"prompt": "a"}, "completion is missing"),
        (["prompt", "completion"], {"prompt": "a", "completion": " \n"}, "completion is empty"),
        (["prompt", "completion"], {"prompt": "a", "completion": 4}, "completion is int, not text"),
        (["prompt", "completion"], {"prompt": None, "completion": "b"}, "prompt is missing"),
        (["messages"], {"messages": [USER]}, "no message of the assistant"),
        (["messages"], {"messages": [BOT]}, "no message of the user"),
        (["messages"], {"messages": []}, "messages is empty"),
        (["messages"], {"messages": [USER, {"role": "oracle", "content": "x"}]}, "message 2 has the role 'oracle'"),
        (["messages"], {"messages": [USER, {**BOT, "tool_calls": [{}]}]}, "message 2 has a tool call"),
        (["messages"], {"messages": [USER, {"role": "assistant", "content": ""}]}, "message 2 .assistant. has no text"),
        (["text"], {"text": ""}, "text is empty"),
    ],
)
def test_unusable_rows_say_why(columns, row, reason):
    with pytest.raises(BadRowError, match=reason):
        converter(recognise(columns), chat=True)(row)


def test_the_same_question_in_other_clothes_is_the_same():
    chat = {"prompt": [{"role": "user", "content": "Why  not? "}], "completion": [BOT]}
    assert question_of(chat) == question_of({"prompt": "WHY NOT?\n", "completion": "x"}) == "why not?"

"""How rows are laid out: recognising the layout and converting it to what TRL's SFTTrainer takes.

A layout is prompt_completion, messages, alpaca, text or tokens. Where rows come from is ``sources.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prunetune.core.errors import DataError
from prunetune.model.token_rows import IGNORED_LABEL

Row = Mapping[str, Any]
# Columns that mean prompt and completion, the most telling first.
PAIRS = (
    ("prompt", "completion"), ("prompt", "response"), ("instruction", "response"), ("question", "answer"),
    ("question", "response"), ("query", "response"), ("query", "answer"), ("problem", "solution"),
    ("input", "output"),
)  # fmt: skip
CONVERSATIONS = ("messages", "conversations", "conversation", "dialog")
TEXTS = ("text", "content", "document")
SYSTEMS = ("system", "system_prompt")
TOKENS = ("input_ids", "labels")
ROLES = {
    "human": "user", "user": "user", "prompter": "user", "gpt": "assistant", "assistant": "assistant",
    "bot": "assistant", "chatgpt": "assistant", "model": "assistant", "system": "system",
}  # fmt: skip


class BadRowError(ValueError):
    """A row cannot be used; the text says why, without saying where the row is."""


@dataclass(frozen=True)
class Layout:
    """A recognised layout: its name, the columns it is read from, and a sentence to print."""

    name: str
    columns: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """What was recognised, for a person."""
        listed = " + ".join(self.columns)
        return f"rows are laid out as {self.name} (columns: {listed})"


def recognise(columns: Sequence[str], wanted: str = "auto") -> Layout:
    """The layout of rows that have these columns.

    Args:
        columns: names of all columns that occur.
        wanted: ``auto``, or the layout that the rows must have.

    Raises:
        DataError: the columns fit no known layout, or not the wanted one.
    """
    has = set(columns)
    found = [Layout("messages", (name,)) for name in CONVERSATIONS if name in has]
    if {"instruction", "output"} <= has:
        extra = tuple(name for name in ("input",) if name in has)
        found.append(Layout("alpaca", ("instruction", *extra, "output")))
    pairs = [Layout("prompt_completion", pair) for pair in PAIRS if set(pair) <= has]
    if set(TOKENS) <= has:
        found.insert(0, Layout("tokens", TOKENS))
    # A question column beside messages is a copy; prompt + completion are never one.
    first = [pair for pair in pairs if pair.columns == ("prompt", "completion")]
    found = [*first, *found, *pairs, *(Layout("text", (name,)) for name in TEXTS if name in has)]
    for layout in found:
        if wanted in ("auto", layout.name):
            return layout
    expected = {
        "auto": "prompt + completion, question + answer, instruction (+ input) + output, messages, or text",
        "prompt_completion": "two columns such as prompt + completion or question + answer",
        "alpaca": "instruction + output (input may be empty)",
        "messages": "a column messages or conversations",
        "text": "a column text",
        "tokens": "two columns input_ids + labels, as a selection has them",
    }[wanted]
    listed = ", ".join(sorted(map(str, has))) or "none"
    raise DataError(
        f"data.format is {wanted} and the columns are {listed}: they fit no layout that can be trained on. "
        f"Expected {expected}; rename the columns, or set data.format"
    )


def converter(layout: Layout, *, chat: bool) -> Callable[[Row], dict[str, Any]]:
    """A function that turns one row into what SFTTrainer takes.

    Args:
        layout: how the rows are laid out.
        chat: whether strings become conversations, so that the tokenizer's chat template applies to them.

    Returns:
        A function from a row to ``{"prompt", "completion"}`` (both strings, or both lists of messages),
        ``{"messages"}``, ``{"text"}`` or ``{"input_ids", "labels"}``. It raises BadRowError.
    """
    if layout.name == "tokens":
        return _token_row
    if layout.name == "text":
        return lambda row: {"text": _text(row, layout.columns[0])}
    if layout.name == "messages":
        return lambda row: _conversation(row, layout.columns[0])
    if layout.name == "alpaca":
        return lambda row: _pair(row, _alpaca_prompt(row), _text(row, "output"), chat)
    prompt, completion = layout.columns
    return lambda row: _prompt_completion(row, prompt, completion, chat)


def _text(row: Row, column: str) -> str:
    """The text of a column, which must not be empty."""
    value = row.get(column)
    if value is None:
        raise BadRowError(f"{column} is missing")
    if not isinstance(value, str):
        raise BadRowError(f"{column} is {type(value).__name__}, not text")
    if not value.strip():
        raise BadRowError(f"{column} is empty")
    return value


def _token_row(row: Row) -> dict[str, Any]:
    """Token ids and labels as they are; a selection decided them."""
    ids, labels = row.get("input_ids"), row.get("labels")
    if not isinstance(ids, list) or not isinstance(labels, list) or len(ids) != len(labels):
        raise BadRowError("input_ids and labels are not two lists of one length")
    if not ids:
        raise BadRowError("input_ids is empty")
    return {"input_ids": ids, "labels": labels}


def _alpaca_prompt(row: Row) -> str:
    instruction = _text(row, "instruction")
    extra = row.get("input")
    return f"{instruction}\n\n{_text(row, 'input')}" if extra is not None and str(extra).strip() else instruction


def _prompt_completion(row: Row, prompt: str, completion: str, chat: bool) -> dict[str, Any]:
    if isinstance(row.get(prompt), list) and isinstance(row.get(completion), list):
        answer = _messages(row[completion], completion)
        if any(message["role"] != "assistant" for message in answer):
            raise BadRowError(f"{completion} has a message that is not the assistant's")
        return {"prompt": _messages(row[prompt], prompt), "completion": answer}
    # The answer is looked at first: a row without one is the common fault.
    answer_text = _text(row, completion)
    return _pair(row, _text(row, prompt), answer_text, chat)


def _pair(row: Row, prompt: str, completion: str, chat: bool) -> dict[str, Any]:
    """A prompt and a completion, as conversation or as strings; a system column goes before the prompt."""
    system = next((row[name] for name in SYSTEMS if isinstance(row.get(name), str) and row[name].strip()), None)
    if chat:
        opening = [{"role": "system", "content": system}] if system else []
        return {
            "prompt": [*opening, {"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": completion}],
        }
    prompt = f"{system}\n\n{prompt}" if system else prompt
    # TRL joins the two as they are: without white space the answer would be glued to the question.
    joined = prompt[-1].isspace() or completion[0].isspace()
    return {"prompt": prompt if joined else prompt + "\n", "completion": completion}


def _conversation(row: Row, column: str) -> dict[str, Any]:
    """One conversation; with a single answer at its end it becomes prompt and completion."""
    messages = _messages(row.get(column), column)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise BadRowError(f"{column} has no message of the assistant")
    if all(message["role"] != "user" for message in messages):
        raise BadRowError(f"{column} has no message of the user")
    return {"messages": messages}


def _messages(value: Any, column: str) -> list[dict[str, str]]:
    """Messages with role and content; ShareGPT's from/value and lists of text parts are understood."""
    if not isinstance(value, list) or not value:
        raise BadRowError(f"{column} is {'empty' if value == [] else 'missing or not a list of messages'}")
    messages = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise BadRowError(f"{column}: message {number} is {type(message).__name__}, not an object")
        given = message.get("role") or message.get("from")
        role = ROLES.get(str(given).lower())
        if role is None or message.get("tool_calls"):
            what = "a tool call" if message.get("tool_calls") else f"the role {given!r}"
            raise BadRowError(f"{column}: message {number} has {what}; user, assistant and system can be trained on")
        content = message.get("content") if message.get("content") is not None else message.get("value")
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            content = "".join(str(part.get("text") or "") for part in content)
        if not isinstance(content, str) or not content.strip():
            raise BadRowError(f"{column}: message {number} ({role}) has no text")
        messages.append({"role": role, "content": content})
    return messages


def single_exchanges(examples: Sequence[dict[str, Any]]) -> bool:
    """Whether every conversation has one answer, at its end: then prompt + completion say the same."""
    return all(
        "messages" in example
        and example["messages"][-1]["role"] == "assistant"
        and sum(message["role"] == "assistant" for message in example["messages"]) == 1
        for example in examples
    )


def as_prompt_completion(example: dict[str, Any]) -> dict[str, Any]:
    """A conversation with one answer at its end, cut before the answer, so that only the answer is learnt."""
    return {"prompt": example["messages"][:-1], "completion": example["messages"][-1:]}


def question_of(example: Mapping[str, Any]) -> str:
    """What an example asks, to tell whether two ask the same; white space and case do not count."""
    if "input_ids" in example:
        first = next((i for i, label in enumerate(example["labels"]) if label != IGNORED_LABEL), None)
        text = " ".join(map(str, example["input_ids"][:first]))
    elif "text" in example:
        text = example["text"]
    elif "messages" in example:
        last = max(i for i, message in enumerate(example["messages"]) if message["role"] == "assistant")
        text = "\n".join(message["content"] for message in example["messages"][:last])
    elif isinstance(example["prompt"], str):
        text = example["prompt"]
    else:
        text = "\n".join(message["content"] for message in example["prompt"])
    return " ".join(text.casefold().split())

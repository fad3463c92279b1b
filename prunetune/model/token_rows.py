"""Rows as token ids and labels, exactly as trl 1.16's SFTTrainer trains on them.

The same rules are tested against a real SFTTrainer in tests/evaluate, so scoring and evaluation outside of training
ask about the same tokens as the loss does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prunetune.core.errors import DataError

IGNORED_LABEL = -100


@dataclass(frozen=True)
class TokenRow:
    """One row: token ids, and labels of the same length (-100: not a target)."""

    input_ids: list[int]
    labels: list[int]

    @property
    def targets(self) -> int:
        """Tokens that have a label and a token before them to be predicted from."""
        return sum(label != IGNORED_LABEL for label in self.labels[1:])

    def cut(self, max_length: int | None) -> TokenRow:
        """The first ``max_length`` tokens."""
        return TokenRow(self.input_ids[:max_length], self.labels[:max_length])


def token_rows(
    tokenizer: Any,
    rows: Iterable[Mapping[str, Any]],
    max_length: int | None,
    *,
    completion_only: bool | None = None,
    assistant_only: bool = False,
) -> list[TokenRow]:
    """Tokenises rows in prompt-completion (plain or conversational), messages or text form; tokens stay as they are.

    Args:
        max_length: longer rows are cut at the end, in tokens; None keeps them whole.
        completion_only: targets are the completion's tokens; None: yes if rows have one, as TRL decides.
        assistant_only: targets are what the chat template marks as the assistant's.

    Returns:
        The rows that have a target left after cutting.

    Raises:
        DataError: there is no row, a row has none of the known columns, or no target is left.
    """
    rows = list(rows)
    if not rows:
        raise DataError("there are no rows to evaluate on; check the data file and its filters")
    whole = encode_rows(tokenizer, rows, completion_only=completion_only, assistant_only=assistant_only)
    cut = [row.cut(max_length) for row in whole]
    found = [row for row in cut if any(label != IGNORED_LABEL for label in row.labels)]
    if not any(row.targets for row in found):
        raise DataError(
            f"none of {len(rows)} rows has a target token within max_length = {max_length}; "
            "the prompts fill it: raise max_length or shorten the prompts"
        )
    return found


def encode_rows(
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    completion_only: bool | None = None,
    assistant_only: bool = False,
) -> list[TokenRow]:
    """Every row as tokens, in order and uncut, also those without a target; arguments as in ``token_rows``.

    Raises:
        DataError: a row has none of the known columns, or no token marked as the assistant's where that is asked for.
    """
    if completion_only is None:
        completion_only = bool(rows) and "prompt" in rows[0] and "completion" in rows[0]
    template = _training_template(tokenizer) if assistant_only else None
    found = []
    for number, row in enumerate(rows, start=1):
        if "input_ids" in row:
            found.append(TokenRow(list(row["input_ids"]), list(row["labels"])))
            continue
        ids, is_completion, is_assistant = _encode(tokenizer, row, number, template, assistant_only)
        used = [bits for bits in (is_completion if completion_only else None, is_assistant) if bits is not None]
        labels = [ids[i] if all(bits[i] for bits in used) else IGNORED_LABEL for i in range(len(ids))]
        found.append(TokenRow(ids, labels))
    return found


def is_conversational(row: Mapping[str, Any]) -> bool:
    """Whether the row's text is lists of {role, content} messages."""
    value = next((row[key] for key in ("prompt", "completion", "messages") if key in row), None)
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "role" in value[0]


def _encode(
    tokenizer: Any, row: Mapping[str, Any], number: int, template: str | None, assistant_only: bool
) -> tuple[list[int], list[int] | None, list[int] | None]:
    """(ids, 1 where the completion is, 1 where the assistant is) of a row; None where not known."""
    chat = _chat_settings(row, template) | {"return_dict": True, "tokenize": True}
    if "prompt" in row and "completion" in row:
        if is_conversational(row):
            prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, **chat)
            whole = tokenizer.apply_chat_template(
                row["prompt"] + row["completion"], return_assistant_tokens_mask=assistant_only, **chat
            )
        else:
            prompt = tokenizer(text=row["prompt"])
            whole = tokenizer(text=row["prompt"] + _closed(row["completion"], tokenizer.eos_token))
        ids = list(whole["input_ids"])
        start = _common_length(prompt["input_ids"], ids)
        return ids, [0] * start + [1] * (len(ids) - start), _assistant_mask(whole, number)
    if "messages" in row:
        whole = tokenizer.apply_chat_template(row["messages"], return_assistant_tokens_mask=assistant_only, **chat)
        return list(whole["input_ids"]), None, _assistant_mask(whole, number)
    if "text" in row:
        return list(tokenizer(text=_closed(row["text"], tokenizer.eos_token))["input_ids"]), None, None
    raise DataError(
        f"row {number} has the columns {', '.join(sorted(row)) or '(none)'}; "
        "it needs prompt and completion, or messages, or text"
    )


def _chat_settings(row: Mapping[str, Any], template: str | None) -> dict[str, Any]:
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {"chat_template": template, "tools": tools, **(row.get("chat_template_kwargs") or {})}


def _closed(text: str, eos_token: str) -> str:
    """Text with the end-of-sequence token behind it, as TRL trains it."""
    return text if text.endswith(eos_token) else text + eos_token


def _common_length(first: list[int], second: list[int]) -> int:
    """Leading tokens in common: tokens may merge across the border between prompt and completion."""
    return next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))


def _assistant_mask(encoded: Mapping[str, Any], number: int) -> list[int] | None:
    if "assistant_masks" not in encoded:
        return None
    mask = list(encoded["assistant_masks"])
    if 1 not in mask:
        raise DataError(
            f"row {number} has no token that the chat template marks as the assistant's; "
            "evaluate without assistant_only, or use a template with {% generation %} marks"
        )
    return mask


def _training_template(tokenizer: Any) -> str | None:
    """A template with generation marks if the tokenizer's own has none (None: its own does)."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    return None if has_generation_markers(tokenizer.chat_template) else get_training_chat_template(tokenizer)

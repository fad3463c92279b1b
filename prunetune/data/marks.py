"""What is known of target tokens without a model: which ones must stay, and which paragraph they stand in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

_PARAGRAPH = re.compile(r"\n[ \t]*\n\s*")


def protected_tokens(tokenizer: Any, target_ids: Sequence[int], final_answer: str | None = None) -> np.ndarray:
    """(T,) bool: end of turn and other special tokens, what the template writes after them, and the final answer.

    A model that never sees the end of a turn does not learn to stop; a worked answer without its result is noise.

    Args:
        tokenizer: a transformers tokenizer.
        target_ids: the row's target tokens.
        final_answer: regular expression; from its last match on, everything is protected (``####`` for GSM8K).
    """
    ids = np.asarray(target_ids, dtype=np.int64)
    special = set(tokenizer.all_special_ids) | {
        number for number, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    marked = np.isin(ids, sorted(special))
    if marked.any():
        # A template's line break behind the last end of turn.
        last = int(np.flatnonzero(marked)[-1])
        marked[last:] |= len(ids) - last <= 3
    if final_answer is not None:
        found = list(re.finditer(final_answer, tokenizer.decode(ids)))
        if found:
            marked[token_at(tokenizer, ids, found[-1].start()) :] = True
    return marked


def paragraphs(tokenizer: Any, target_ids: Sequence[int]) -> np.ndarray:
    """(T,) int: which paragraph each target token stands in, counted from 0; blank lines end a paragraph."""
    ids = np.asarray(target_ids, dtype=np.int64)
    number = np.zeros(len(ids), dtype=np.int32)
    for gap in _PARAGRAPH.finditer(tokenizer.decode(ids)):
        number[token_at(tokenizer, ids, gap.end()) :] += 1
    return number


def token_at(tokenizer: Any, ids: np.ndarray, character: int) -> int:
    """Index of the token that the decoded text's ``character`` falls into.

    By bisection over decoded beginnings: encoding a beginning anew could merge tokens across the cut.
    """
    low, high = 0, len(ids)
    while low < high:
        middle = (low + high) // 2
        if len(tokenizer.decode(ids[: middle + 1])) > character:
            high = middle
        else:
            low = middle + 1
    return low

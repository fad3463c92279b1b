"""What is known of target tokens without a model: which ones must stay, and which paragraph they stand in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

_PARAGRAPH = re.compile(r"\n[ \t]*\n\s*")


class Protection:
    """Which target tokens must stay: end of turn and other special tokens, what the template writes after them, and the
    final answer. A model that never sees the end of a turn does not learn to stop; a worked answer without its result
    is noise.

    Args:
        tokenizer: a transformers tokenizer.
        final_answer: regular expression; from its last match on, everything is protected (``####`` for GSM8K).

    Raises:
        re.error: ``final_answer`` is no regular expression.
    """

    def __init__(self, tokenizer: Any, final_answer: str | None = None):
        self._tokenizer = tokenizer
        self._final = None if final_answer is None else re.compile(final_answer)
        marked = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = np.array(sorted(marked | set(tokenizer.all_special_ids)), dtype=np.int64)

    def __call__(self, target_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """(T,) bool of one row's target tokens."""
        ids = np.asarray(target_ids, dtype=np.int64)
        marked = np.isin(ids, self._special)
        if marked.any():
            # A template's line break behind the last end of turn.
            last = int(np.flatnonzero(marked)[-1])
            marked[last:] |= len(ids) - last <= 3
        if self._final is not None:
            found = list(self._final.finditer(self._tokenizer.decode(ids)))
            if found:
                marked[token_at(self._tokenizer, ids, found[-1].start()) :] = True
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

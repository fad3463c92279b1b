"""Rows for calibration: which ones criteria see, and which ones are kept apart to judge what they decided."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from prunetune.core.console import warn
from prunetune.core.errors import DataError
from prunetune.core.streams import stream
from prunetune.data import prepare, sources
from prunetune.data.prepare import Report
from prunetune.model.token_rows import TokenRow, token_rows

# At most this part of the rows is kept apart.
JUDGED_SHARE = 0.2
LEAST_ROWS = 4096


class CalibrationRows:
    """Rows as tokens, in an order that the seed decides.

    Args:
        source: a file, saved datasets folder or hub id; or rows in prompt-completion, messages or text form.
        tokenizer: the model's.
        max_length: rows are cut to so many tokens.
        tokens: of a draw. judge_tokens: kept apart for judging.
        seed: of the order.

    Raises:
        DataError: nothing usable.
    """

    def __init__(
        self,
        source: str | Sequence[Mapping[str, Any]],
        tokenizer: Any,
        *,
        max_length: int,
        tokens: int,
        judge_tokens: int,
        seed: int,
    ):
        self._seed, self._tokens = seed, tokens
        examples = _examples(source, tokenizer)
        # Of a large file only so many rows are tokenised, chosen by lot; a row has more than a few tokens.
        some = stream(seed, "calibration rows").permutation(len(examples))[: max(LEAST_ROWS, tokens // 8)]
        found = token_rows(tokenizer, [examples[int(i)] for i in np.sort(some)], max_length)
        order = stream(seed, "calibration").permutation(len(found))
        most = int(JUDGED_SHARE * len(found)) or min(1, len(found) - 1)
        self._apart = [found[int(i)] for i in order[::-1][: _enough(found, order[::-1], judge_tokens, most)]]
        self._pool = [found[int(i)] for i in order[: len(found) - len(self._apart)]]
        available = sum(len(row.input_ids) for row in self._pool)
        if available < tokens:
            warn(f"calibration has {available} tokens, fewer than the {tokens} asked for; give more rows")

    @cached_property
    def judged(self) -> list[TokenRow]:
        """Rows to judge decisions on; in no draw, unless there is a single row, which has to serve for both."""
        if self._apart:
            return self._apart
        warn("one row of calibration: cuts are judged on the row that scores have seen; give more rows")
        return self._pool

    def draw(self, number: int = 0) -> list[TokenRow]:
        """One sample of calibration rows; draws differ in their order, and so in their rows if there are enough."""
        order = np.arange(len(self._pool))
        if number:
            order = stream(self._seed, "calibration", number).permutation(len(self._pool))
        return [self._pool[int(i)] for i in order[: _enough(self._pool, order, self._tokens, len(order))]]

    def digest(self) -> str:
        """Hex digest of the first draw, labels included."""
        return _digest(self.draw())

    def digest_of_all(self) -> str:
        """Hex digest of everything that any draw or the judging sees."""
        return _digest([*self._pool, *self._apart])


def _digest(rows: Sequence[TokenRow]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr((row.input_ids, row.labels)).encode())
    return digest.hexdigest()[:16]


def _enough(rows: Sequence[TokenRow], order: Sequence[int] | np.ndarray, tokens: int, most: int) -> int:
    """How many rows in this order make up so many tokens; at most ``most``."""
    lengths = np.array([len(rows[int(i)].input_ids) for i in order], dtype=np.int64)
    return min(most, int(np.searchsorted(lengths.cumsum(), tokens)) + 1, len(lengths))


def _examples(source: str | Sequence[Mapping[str, Any]], tokenizer: Any) -> Sequence[Mapping[str, Any]]:
    if not isinstance(source, str):
        return source
    rows = sources.training_rows(sources.read(source, "--calibration"))
    part, layout = prepare.convert(rows, "auto", bool(tokenizer.chat_template))
    report = Report(notes=[f"{rows.name}: {layout.sentence}"])
    [part] = prepare.one_answer_each([part], report)
    report.show()
    if not part.examples:
        raise DataError(f"--calibration {source} has no usable row")
    return part.examples

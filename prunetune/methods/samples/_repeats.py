"""What methods against duplicates share: who repeats whom is found first, then rows are drawn from the rest."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import numpy as np

from prunetune.methods.ranking import best_first, name_ranks
from prunetune.methods.samples import SampleChoice, SampleMethod
from prunetune.methods.samples._ranked import lots
from prunetune.model.score_table import ScoreTable

Keep = Literal["first", "longest"]


class RepeatFilter(SampleMethod):
    """A method that drops rows that repeat another one; if fewer are asked for than are left, lots decide."""

    online = False
    reason = "duplicate"

    @abstractmethod
    def repeats(self, table: ScoreTable) -> tuple[np.ndarray, np.ndarray]:
        """For every row the number of the row that it repeats, or -1, and how similar the two are, NaN where unknown.

        A row without a finite similarity and without a repeated row may still be kept.
        """

    def border(self) -> float:
        """The similarity from which a row counts as a repeat."""
        return 1.0

    def judged(self, table: ScoreTable) -> np.ndarray:
        """(N,) bool, rows that can be compared with others."""
        return table.targets > 0

    def scores(self, table: ScoreTable) -> np.ndarray:
        """(N,) a lot in [0, 1), less 1 for a row that repeats another; NaN for a row that cannot be compared."""
        repeated, _ = self.repeats(table)
        return np.where(self.judged(table), self._lots(table) - (repeated >= 0), np.nan)

    def choose(self, table: ScoreTable, count: int) -> SampleChoice:
        """Keeps ``count`` rows of those that repeat no other, or all of them if they are fewer."""
        table.require(self.needs, type(self).__name__)
        repeated, similarity = self.repeats(table)
        repeats = repeated >= 0
        left = np.flatnonzero(self.judged(table) & ~repeats)
        order = left[best_first(self._lots(table)[left], name_ranks(table.ids)[left])]
        keep = np.zeros(len(table), dtype=bool)
        keep[order[: max(0, count)]] = True
        reason = np.where(table.targets == 0, "no_target", "bad_score").astype(object)
        reason[left], reason[keep], reason[repeats] = "not_drawn", "unique", self.reason
        other = np.array([table.ids[row] if row >= 0 else "" for row in repeated], dtype=object)
        return SampleChoice(keep, similarity, reason, self.border(), other=other)

    def lottery(self) -> SampleMethod:
        """The draw from the rows that are left, as a method of its own."""
        return _Lottery(self.options, self.seed)

    def _lots(self, table: ScoreTable) -> np.ndarray:
        return self.lottery().scores(table)


class _Lottery(SampleMethod):
    """Rows by lot."""

    def scores(self, table: ScoreTable) -> np.ndarray:
        return lots(table, self.seed, "samples.repeats")


def precedence(table: ScoreTable, keep: Keep) -> np.ndarray:
    """Numbers of the rows with targets, the one that stays of any two that are alike before the other one."""
    rows = np.flatnonzero(table.targets > 0)
    first = table.targets[rows].astype(np.float64) if keep == "longest" else np.zeros(len(rows))
    return rows[best_first(first, name_ranks(table.ids)[rows])]


def texts(table: ScoreTable, of: Sequence[str]) -> list[tuple[str, ...]]:
    """The text columns ``of`` every row, side by side; a column that says the same everywhere is left out."""
    columns = [[str(text) for text in table.rows[name]] for name in of]
    telling = [column for column in columns if len(set(column)) > 1] or columns[:1]
    return list(zip(*telling, strict=True))

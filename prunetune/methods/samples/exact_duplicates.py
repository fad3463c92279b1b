"""Rows that say the same as another one, character for character after folding."""

from __future__ import annotations

import unicodedata
from typing import Literal

import numpy as np
from pydantic import Field

from prunetune.methods.options import MethodOptions
from prunetune.methods.samples import SAMPLES
from prunetune.methods.samples._repeats import Keep, RepeatFilter, precedence
from prunetune.model.score_table import ScoreTable

_COLUMNS = {"both": ("prompt", "answer"), "prompt": ("prompt",), "answer": ("answer",)}


class ExactDuplicatesOptions(MethodOptions):
    """Options of exact_duplicates."""

    of: Literal["both", "prompt", "answer"] = Field("both", description="what must be equal")
    fold: bool = Field(True, description="upper and lower case and runs of spaces make no difference")
    keep: Keep = Field("first", description="which of equal rows stays: first (by id) or longest (most target tokens)")


@SAMPLES.register("exact_duplicates")
class ExactDuplicates(RepeatFilter):
    """Drops rows with the same prompt and answer as another row; if fewer are asked for than are left, by lot."""

    Options = ExactDuplicatesOptions
    needs = frozenset({"prompt", "answer"})
    options: ExactDuplicatesOptions

    def repeats(self, table: ScoreTable) -> tuple[np.ndarray, np.ndarray]:
        repeated, similarity = np.full(len(table), -1), np.full(len(table), np.nan)
        columns = [table.rows[name] for name in _COLUMNS[self.options.of]]
        seen: dict[tuple[str, ...], int] = {}
        for row in precedence(table, self.options.keep).tolist():
            text = tuple(self._folded(str(column[row])) for column in columns)
            earlier = seen.setdefault(text, row)
            if earlier != row:
                repeated[row], similarity[row] = earlier, 1.0
        return repeated, similarity

    def _folded(self, text: str) -> str:
        return " ".join(unicodedata.normalize("NFKC", text).casefold().split()) if self.options.fold else text

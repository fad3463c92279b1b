"""Sample methods: which rows are worth training on. One file is one method; each is a pure function of a table.

The same methods choose from a whole data set (``prunetune data select``) and from the rows of one optimizer step.
Legend: N rows.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from prunetune.core.errors import Problem
from prunetune.core.registry import Registry
from prunetune.methods.options import parse_options, problems_of
from prunetune.methods.ranking import best_first, name_ranks
from prunetune.methods.table_method import TableMethod
from prunetune.model.score_table import ScoreTable


@dataclass(frozen=True)
class SampleChoice:
    """What a method decided about each row, and why.

    Args:
        keep: (N,) bool.
        value: (N,) float64, the number that decided; NaN where there was none.
        reason: (N,) str, a short code such as ``top``, ``below``, ``Q3``, ``bad_score``, ``no_target``.
        threshold: the value at the border between kept and dropped, if there is one border.
        prunable: (N,) bool, kept rows whose tokens may be pruned; None: all of them.
        weight: (N,) float64 loss weights of the kept rows; None: all 1.
        other: (N,) str, the id of the row that this one repeats, or "".
    """

    keep: np.ndarray
    value: np.ndarray
    reason: np.ndarray
    threshold: float | None = None
    prunable: np.ndarray | None = None
    weight: np.ndarray | None = None
    other: np.ndarray | None = None


class SampleMethod(TableMethod):
    """A method that ranks rows, or chooses them in its own way by overriding ``choose``."""

    # In the trainer: whether it chooses once an epoch from the losses last seen in training (InfoBatch), rather than
    # in every step from the statistics of a scoring pass.
    per_epoch: ClassVar[bool] = False

    @abstractmethod
    def scores(self, table: ScoreTable) -> np.ndarray:
        """(N,) float64, higher is kept first; NaN or infinite means that the row cannot be judged."""

    def choose(self, table: ScoreTable, count: int) -> SampleChoice:
        """Keeps ``count`` rows (fewer if there are not so many that can be judged)."""
        table.require(self.needs, type(self).__name__)
        return keep_highest(table, self.scores(table), count)


def keep_highest(table: ScoreTable, scores: np.ndarray, count: int, allowed: np.ndarray | None = None) -> SampleChoice:
    """The ``count`` rows with the highest scores; ties go to the smaller id, so order and batching do not matter.

    Args:
        table: the rows.
        scores: (N,) higher is kept first; rows whose score is not finite are dropped as ``bad_score``.
        count: how many to keep.
        allowed: (N,) bool, rows that may be kept at all; the others are dropped as ``filtered``.

    Returns:
        The choice, with reasons ``top``, ``below``, ``bad_score``, ``no_target``, ``filtered``.
    """
    scores = np.asarray(scores, dtype=np.float64)
    reason = np.full(len(table), "below", dtype=object)
    reason[~np.isfinite(scores)] = "bad_score"
    if allowed is not None:
        reason[~allowed & np.isfinite(scores)] = "filtered"
    reason[table.targets == 0] = "no_target"
    candidates = np.flatnonzero(reason == "below")
    order = candidates[best_first(scores[candidates], name_ranks([table.ids[int(row)] for row in candidates]))]
    keep = np.zeros(len(table), dtype=bool)
    keep[order[: max(0, count)]] = True
    reason[keep] = "top"
    threshold = float(scores[order[min(count, len(order)) - 1]]) if len(order) and count > 0 else None
    return SampleChoice(keep, scores, reason, threshold)


def minmax(values: np.ndarray) -> np.ndarray:
    """(N,) finite values moved to [0, 1]; all zeros if they are (nearly) equal; what is not finite stays."""
    finite = np.isfinite(values)
    if not finite.any():
        return values.astype(np.float64)
    low, high = values[finite].min(), values[finite].max()
    scaled = np.zeros(len(values)) if high - low < 1e-12 else (values - low) / (high - low)
    return np.where(finite, scaled, values)


SAMPLES: Registry[type[SampleMethod]] = Registry("sample method", "prunetune.methods.samples")


def build_samples(method: str, options: Mapping[str, Any], seed: int = 0) -> SampleMethod:
    """The sample method called ``method``; raises ConfigError for unknown names, options and values."""
    kind = SAMPLES.get(method)
    return kind(parse_options("data.samples", method, kind.Options, options), seed)


def check_samples(method: str, options: Mapping[str, Any]) -> list[Problem]:
    """The problems that ``build_samples`` would raise."""
    return problems_of(lambda: build_samples(method, options))

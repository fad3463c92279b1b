"""Embeddings as unit vectors, in the order of the ids so that the order of the rows changes no sum. Legend: N rows,
M rows that can be judged, D dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from prunetune.methods.ranking import name_ranks
from prunetune.model.score_table import ScoreTable

# What is left of a unit vector without the mean is rounding, not a direction, when it is shorter than this.
_SHORTEST = 1e-6

Numbers = np.ndarray | slice


@dataclass(frozen=True)
class UnitRows:
    """Directions of the rows that can be judged, sorted by id.

    Args:
        rows: (M,) int64, their numbers in the table.
        directions: (M, D) float32, of norm 1, or 0 where an embedding is the mean of all.
    """

    rows: np.ndarray
    directions: np.ndarray

    @cached_property
    def half(self) -> np.ndarray:
        """(M,) half of the squared norm."""
        return np.square(self.directions).sum(axis=1) / 2

    def similarity(self, left: Numbers, right: Numbers) -> np.ndarray:
        """(L, R) float32 cosine of the rows numbered ``left`` and ``right`` (of M); two rows at the mean are alike."""
        cosine_LR = self.directions[left] @ self.directions[right].T
        # 1 - |a - b|^2 / 2, which is the cosine for unit vectors and 1 for two zeros.
        return cosine_LR + (1 - self.half[left][:, None] - self.half[right][None, :])


def unit_rows(table: ScoreTable, center: bool) -> UnitRows:
    """The embeddings of the rows that have targets and a finite, nonzero embedding.

    Args:
        table: with the column ``embedding``.
        center: subtract the mean direction. Mean hidden states of a language model all point nearly the same way, so
            that without it the cosine of any two is close to 1.
    """
    embedding_ND = np.asarray(table.rows["embedding"], dtype=np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        size_N = np.linalg.norm(embedding_ND, axis=1)
    rows = np.flatnonzero((table.targets > 0) & np.isfinite(size_N) & (size_N > 0))
    rows = rows[np.argsort(name_ranks(table.ids)[rows])]
    if not len(rows):
        return UnitRows(rows, np.zeros((0, embedding_ND.shape[1]), dtype=np.float32))
    x_MD = embedding_ND[rows] / size_N[rows, None]
    if not center:
        return UnitRows(rows, x_MD.astype(np.float32))
    # Of directions, not of vectors: one enormous embedding must not decide what the mean is.
    x_MD = x_MD - x_MD.mean(axis=0)
    size_M = np.linalg.norm(x_MD, axis=1)
    apart_M = size_M > _SHORTEST
    x_MD = np.where(apart_M[:, None], x_MD / np.where(apart_M, size_M, 1.0)[:, None], 0.0)
    return UnitRows(rows, x_MD.astype(np.float32))

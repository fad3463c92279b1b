"""Rows that cover all the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field

from prunetune.methods.options import MethodOptions
from prunetune.methods.samples import SAMPLES, SampleChoice, SampleMethod
from prunetune.methods.samples._embeddings import UnitRows, unit_rows
from prunetune.model.score_table import ScoreTable

# Candidates whose gain is made anew at once: a matrix product of so many columns, and so much memory per row. Mostly
# one or two suffice; while they do not, twice as many are taken each time.
_FIRST_BATCH, _LARGEST_BATCH = 2, 64


class DiversityOptions(MethodOptions):
    """Options of diversity."""

    objective: Literal["k_center", "facility_location"] = Field(
        "facility_location", description="cover the farthest row (k_center), or all rows on average"
    )
    center: bool = Field(True, description="subtract the mean direction first, as all hidden states point one way")


@dataclass(frozen=True)
class _Walk:
    """A greedy order of M rows: who was taken, in order, what each one brought, and (M,) what the others would."""

    taken: np.ndarray
    brought: np.ndarray
    left: np.ndarray


@SAMPLES.register("diversity")
class DiversitySamples(SampleMethod):
    """Rows that cover the others, greedily by embedding: k-center or facility location.

    ``k_center`` (arXiv 1708.00489) takes the row that is farthest from all taken so far, beginning next to the mean;
    the outliers come first. ``facility_location`` takes the row that raises the sum over all rows of 1 + cosine to the
    nearest taken row most (within 1 - 1/e of the best possible sum); it serves crowds first. Time is O(N k D) for
    k_center and up to O(N^2 D) for facility_location, memory O(N (D + 64)).

    The reasons are ``chosen`` of kept rows and ``covered`` of others; the value is the distance or the gain.
    """

    Options = DiversityOptions
    paper = "arXiv 1708.00489"
    needs = frozenset({"embedding"})
    online = False
    options: DiversityOptions

    def scores(self, table: ScoreTable) -> np.ndarray:
        """(N,) how many judged rows the greedy order takes after this one: the whole order is walked."""
        units = unit_rows(table, self.options.center)
        scores = np.full(len(table), np.nan)
        order = self._walk(units, len(units.rows)).taken
        scores[units.rows[order]] = np.arange(len(order))[::-1]
        return scores

    def choose(self, table: ScoreTable, count: int) -> SampleChoice:
        table.require(self.needs, type(self).__name__)
        units = unit_rows(table, self.options.center)
        walk = self._walk(units, min(max(0, count), len(units.rows)))
        keep, value = np.zeros(len(table), dtype=bool), np.full(len(table), np.nan)
        reason = np.where(table.targets == 0, "no_target", "bad_score").astype(object)
        value[units.rows], reason[units.rows] = walk.left, "covered"
        chosen = units.rows[walk.taken]
        keep[chosen], value[chosen], reason[chosen] = True, walk.brought, "chosen"
        return SampleChoice(keep, value, reason, float(walk.brought[-1]) if len(chosen) else None)

    def _walk(self, units: UnitRows, count: int) -> _Walk:
        return (_farthest if self.options.objective == "k_center" else _facility)(units, count)


def _farthest(units: UnitRows, count: int) -> _Walk:
    """Greedy k-center; the value is the cosine distance to the nearest row taken."""
    # The first row is as far as can be from nothing.
    distance_M = np.full(len(units.rows), 2.0)
    free_M = np.ones(len(units.rows), dtype=bool)
    taken: list[int] = []
    brought: list[float] = []
    while len(taken) < count:
        urgency_M = distance_M if taken else units.directions @ units.directions.sum(axis=0)
        row = int(np.where(free_M, urgency_M, -np.inf).argmax())
        taken.append(row)
        brought.append(float(distance_M[row]))
        free_M[row] = False
        distance_M = np.minimum(distance_M, np.maximum(0.0, 1 - _to_all(units, row)))
    return _Walk(np.array(taken, dtype=np.int64), np.array(brought), distance_M)


def _facility(units: UnitRows, count: int) -> _Walk:
    """Lazy greedy facility location; the value is the mean gain per row, for rows not taken an upper bound of it.

    A gain can only fall while rows are taken, so that one made earlier bounds it: only rows whose bound is above the
    best fresh gain need to be looked at again.
    """
    size = len(units.rows)
    cover_M = np.zeros(size)
    # With nothing covered the gain is a sum over all rows of 1 + similarity: no need for all pairs.
    total = units.directions.sum(axis=0)
    bound_M = (units.directions @ total + size * (2 - units.half) - units.half.sum()).astype(np.float64)
    made_M = np.zeros(size, dtype=np.int64)
    free_M = np.ones(size, dtype=bool)
    taken: list[int] = []
    brought: list[float] = []
    batch = _FIRST_BATCH
    while len(taken) < count:
        ceiling_M = np.where(free_M, bound_M, -np.inf)
        row = int(ceiling_M.argmax())
        if made_M[row] == len(taken):
            taken.append(row)
            brought.append(float(bound_M[row]))
            free_M[row] = False
            cover_M = np.maximum(cover_M, 1.0 + _to_all(units, row))
            batch = _FIRST_BATCH
            continue
        stale = np.flatnonzero(free_M & (made_M < len(taken)))
        if len(stale) > batch:
            stale = stale[np.argpartition(-ceiling_M[stale], batch)[:batch]]
        batch = min(2 * batch, _LARGEST_BATCH)
        gain_MB = np.maximum(0.0, 1.0 + units.similarity(slice(None), stale) - cover_M[:, None])
        bound_M[stale] = gain_MB.sum(axis=0)
        made_M[stale] = len(taken)
    return _Walk(np.array(taken, dtype=np.int64), np.array(brought) / max(1, size), bound_M / max(1, size))


def _to_all(units: UnitRows, row: int) -> np.ndarray:
    """(M,) similarity of all rows to one."""
    return units.similarity(slice(None), slice(row, row + 1))[:, 0]

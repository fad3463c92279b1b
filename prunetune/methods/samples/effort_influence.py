"""DEALRec's joined score with coverage of the whole range of scores."""

from __future__ import annotations

import math

import numpy as np
from pydantic import Field

from prunetune.methods.options import MethodOptions
from prunetune.methods.ranking import significant
from prunetune.methods.samples import SAMPLES, SampleChoice, SampleMethod, minmax
from prunetune.methods.samples._ranked import ascending, lots
from prunetune.model.score_table import ScoreTable


class EffortInfluenceOptions(MethodOptions):
    """Options of effort_influence."""

    effort_weight: float = Field(1.0, ge=0, description="of the effort beside the influence, both from 0 to 1")
    drop_hardest: float = Field(
        0.1, ge=0, lt=1, description="share with the largest scores that is left out, as far as enough others are there"
    )
    bins: int = Field(50, ge=1, description="of equal width between the smallest and the largest score left")


@SAMPLES.register("effort_influence")
class EffortInfluenceSamples(SampleMethod):
    """Rows by lot from equal-width bins of influence plus effort, the smallest bin first (DEALRec).

    Of arXiv 2401.17197. Effort is the norm of the row's gradient, influence its similarity to the validation rows'
    gradient where it was scored (the paper's influence function of a recommender has no counterpart here); without it
    effort stands alone. The share of a bin that is too small goes to the larger ones, so that the count is exact.

    The reasons are ``drawn`` of kept rows, ``not_drawn`` and ``hardest`` of others.
    """

    Options = EffortInfluenceOptions
    paper = "arXiv 2401.17197"
    needs = frozenset({"grad_norm"})
    online = False
    options: EffortInfluenceOptions

    def scores(self, table: ScoreTable) -> np.ndarray:
        effort = table.rows["grad_norm"].astype(np.float64)
        influence = table.rows.get("influence", np.zeros(len(table))).astype(np.float64)
        judged = (table.targets > 0) & np.isfinite(effort) & np.isfinite(influence)
        effort, influence = np.where(judged, effort, np.nan), np.where(judged, influence, np.nan)
        return minmax(influence) + self.options.effort_weight * minmax(effort)

    def choose(self, table: ScoreTable, count: int) -> SampleChoice:
        table.require(self.needs, type(self).__name__)
        scores, count = self.scores(table), max(0, count)
        order = ascending(table, scores)
        hardest = min(math.floor(round(self.options.drop_hardest * len(order), 9)), max(0, len(order) - count))
        left, dropped = order[: len(order) - hardest], order[len(order) - hardest :]
        reason = np.where(table.targets == 0, "no_target", "bad_score").astype(object)
        reason[left], reason[dropped] = "not_drawn", "hardest"
        keep = np.zeros(len(table), dtype=bool)
        if len(left):
            keep[self._drawn(table, scores, left, count)] = True
        reason[keep] = "drawn"
        return SampleChoice(keep, scores, reason)

    def _drawn(self, table: ScoreTable, scores: np.ndarray, rows: np.ndarray, count: int) -> list[int]:
        """``count`` of ``rows`` (all, if they are fewer), as evenly over the bins as their sizes allow."""
        places = significant(minmax(scores[rows])) * self.options.bins
        bins = np.minimum(places.astype(np.int64), self.options.bins - 1)
        lot = lots(table, self.seed, "samples.effort_influence")[rows]
        members = [rows[bins == number][np.argsort(lot[bins == number])] for number in np.unique(bins)]
        members.sort(key=len)
        drawn: list[int] = []
        for done, member in enumerate(members):
            drawn += member[: (count - len(drawn)) // (len(members) - done)].tolist()
        return drawn

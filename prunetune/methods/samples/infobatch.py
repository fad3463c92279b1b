"""InfoBatch: once an epoch, leave out by lot some of the rows whose loss is below the mean, and weigh up the rest."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from prunetune.core.streams import stream
from prunetune.methods.options import MethodOptions
from prunetune.methods.ranking import name_ranks, significant
from prunetune.methods.samples import SAMPLES, SampleChoice, SampleMethod
from prunetune.model.score_table import ScoreTable


class InfoBatchOptions(MethodOptions):
    """Options of InfoBatch."""

    prune: float = Field(0.5, gt=0, le=0.9, description="share dropped of the rows whose loss is below the mean")
    weighted: bool = Field(True, description="weigh the kept ones of these rows up, so that they stand for all of them")


@SAMPLES.register("infobatch")
class InfoBatch(SampleMethod):
    """Drop by lot a share of the rows with a loss below the mean, weigh up those of them that stay (InfoBatch).

    How many rows stay follows from the losses: ``choose`` does not look at the count. In the trainer the losses are
    those of the training forward itself, and it chooses once an epoch.

    Two things differ from the paper. At least one of the rows below the mean stays, and their weight is their number
    over the number that stays, rather than 1 / (1 - prune): the same up to rounding, and then the expected sum of
    weighted losses is the sum of all losses exactly.
    """

    Options: ClassVar[type[MethodOptions]] = InfoBatchOptions
    paper = "arXiv 2303.04947"
    needs = frozenset({"nll"})
    per_epoch = True

    options: InfoBatchOptions

    def scores(self, table: ScoreTable) -> np.ndarray:
        """(N,) mean loss of each row; it decides only on which side of the mean a row is."""
        return table.mean(table.tokens["nll"])

    def choose(self, table: ScoreTable, count: int) -> SampleChoice:
        """Keeps every row that is not below the mean, and floor((1 - prune) * number) of the others, at least one."""
        table.require(self.needs, type(self).__name__)
        loss_N = self.scores(table)
        usable = np.isfinite(loss_N) & (table.targets > 0)
        reason = np.full(len(table), "above", dtype=object)
        reason[~np.isfinite(loss_N)] = "bad_score"
        reason[table.targets == 0] = "no_target"
        if not usable.any():
            return SampleChoice(np.zeros(len(table), dtype=bool), loss_N, reason)
        # A row whose loss is the mean but for rounding is not below it. Added in one order, whatever the rows' is.
        mean = float(np.sort(loss_N[usable]).mean())
        below = np.flatnonzero(usable & (significant(loss_N) < significant(np.array([mean]))[0]))
        below = below[np.argsort(name_ranks(table.ids)[below])]
        stay = max(1, int((1 - self.options.prune) * len(below) + 1e-9)) if len(below) else 0
        drawn = below[stream(self.seed, "samples.infobatch").permutation(len(below))]
        keep, weight = usable.copy(), np.ones(len(table))
        keep[drawn[stay:]] = False
        reason[drawn[:stay]], reason[drawn[stay:]] = "drawn", "below_mean"
        if self.options.weighted and stay:
            weight[drawn[:stay]] = len(below) / stay
        return SampleChoice(keep, loss_N, reason, mean, weight=weight)

"""Q-Tuning's choice of samples; its choice of tokens is a token method."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from prunetune.methods.options import MethodOptions
from prunetune.methods.ranking import best_first, name_ranks, percentiles, significant
from prunetune.methods.samples import SAMPLES, SampleChoice, SampleMethod, minmax
from prunetune.methods.samples._quadrants import Quadrants, find_quadrants
from prunetune.methods.samples._ranked import perplexity
from prunetune.model.score_table import ScoreTable


class QTuningOptions(MethodOptions):
    """Options of q_tuning."""

    mode: Literal["exact", "published"] = Field(
        "exact", description="published: the last cut that was tried, and no trimming when it holds too many rows"
    )
    normalise: Literal["minmax", "rank"] = Field(
        "minmax", description="of both axes before they are compared; one outlier spoils minmax, not rank"
    )
    tolerance: float = Field(0.01, gt=0, lt=1, description="of the share that the quadrants should hold")
    steps: int = Field(10, ge=1, description="most bisections")


@SAMPLES.register("q_tuning")
class QTuningSamples(SampleMethod):
    """Confident mistakes and uncertain successes, by quadrants of perplexity and entropy (Q-Tuning).

    Of arXiv 2509.23873. Kept are Q2 (high perplexity, low entropy: a misconception worth correcting, whose tokens may
    be pruned) and Q4 (low perplexity, high entropy: kept whole); dropped are Q1 (both high: noise) and Q3 (both low:
    known). The lines are found by bisection and seldom enclose enough rows, because the two rise together; what is
    missing is topped up by the largest difference of the two after normalisation, counted as Q2 or Q4 by its sign.
    Unlike the authors' code, ``exact`` keeps the best cut and trims by the same difference, entropy is that of target
    tokens only, and a mean loss above 20 nats counts as 20.

    The reasons are ``Q2``, ``Q4`` and ``topup`` of kept rows, ``Q1``, ``Q3``, ``middle`` and ``trimmed`` of others.
    """

    Options = QTuningOptions
    paper = "arXiv 2509.23873"
    needs = frozenset({"nll", "entropy"})
    options: QTuningOptions

    def scores(self, table: ScoreTable) -> np.ndarray:
        """(N,) size of normalised perplexity minus normalised entropy: what tops up and trims."""
        return np.abs(self.leaning(table))

    def leaning(self, table: ScoreTable) -> np.ndarray:
        """(N,) normalised perplexity minus normalised entropy: above 0 like Q2, below 0 like Q4; NaN if unjudged."""
        normalise = minmax if self.options.normalise == "minmax" else percentiles
        return normalise(self.axes(table)[0]) - normalise(self.axes(table)[1])

    def axes(self, table: ScoreTable) -> tuple[np.ndarray, np.ndarray]:
        """Perplexity and mean entropy in nats, (N,) float64 each; NaN in both for a row that cannot be judged."""
        nll, entropy = table.mean(table.tokens["nll"]), table.mean(table.tokens["entropy"])
        judged = np.isfinite(nll) & np.isfinite(entropy)
        # Rounded before they are compared with quantiles: the noise of another batch shape must not decide.
        return (
            np.where(judged, significant(perplexity(nll)), np.nan),
            np.where(judged, significant(entropy), np.nan),
        )

    def quadrants(self, table: ScoreTable, count: int) -> Quadrants:
        """The cut of the rows that can be judged (at least one), in their order, for ``count`` kept rows."""
        error, uncertainty = self.axes(table)
        judged = np.isfinite(error)
        options = self.options
        return find_quadrants(
            error[judged],
            uncertainty[judged],
            min(1.0, max(0, count) / int(judged.sum())),
            tolerance=options.tolerance,
            steps=options.steps,
            best=options.mode == "exact",
        )

    def choose(self, table: ScoreTable, count: int) -> SampleChoice:
        table.require(self.needs, type(self).__name__)
        leaning = self.leaning(table)
        rows = np.flatnonzero(np.isfinite(leaning))
        reason = np.where(table.targets == 0, "no_target", "bad_score").astype(object)
        prunable, keep = np.zeros(len(table), dtype=bool), np.zeros(len(table), dtype=bool)
        if len(rows):
            reason[rows] = self.quadrants(table, count).names
            wanted = (reason == "Q2") | (reason == "Q4")
            order = rows[best_first(np.abs(leaning[rows]), name_ranks(table.ids)[rows])]
            # Rows of the wanted quadrants first, each part by how far it leans.
            order = np.concatenate([order[wanted[order]], order[~wanted[order]]])
            taken = max(0, count)
            if self.options.mode == "published" and count > 0:
                taken = max(count, int(wanted.sum()))
            keep[order[:taken]] = True
            reason[keep & ~wanted] = "topup"
            reason[~keep & wanted] = "trimmed"
            prunable = keep & np.where(wanted, reason == "Q2", leaning >= 0)
        return SampleChoice(keep, leaning, reason, prunable=prunable)

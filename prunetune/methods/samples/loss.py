"""Rows by their loss."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from prunetune.methods.samples import SAMPLES
from prunetune.methods.samples._ranked import LimitOptions, Prefer, RankedSamples
from prunetune.model.score_table import ScoreTable


class LossOptions(LimitOptions):
    """Options of loss."""

    order: Literal["highest", "lowest"] = Field("highest", description="which losses are kept first")


@SAMPLES.register("loss")
class LossSamples(RankedSamples):
    """Rows that the model has learnt least: mean loss of the target tokens.

    The highest first, as in arXiv 1511.06343, or the lowest by option.
    """

    Options = LossOptions
    paper = "arXiv 1511.06343"
    needs = frozenset({"nll"})
    options: LossOptions

    def values(self, table: ScoreTable) -> np.ndarray:
        return table.mean(table.tokens["nll"])

    def prefer(self) -> Prefer:
        return "high" if self.options.order == "highest" else "low"

    def limits(self) -> tuple[float, float]:
        return self.options.lower, self.options.upper

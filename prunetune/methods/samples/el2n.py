"""EL2N: rows by the error of the predicted distribution."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from prunetune.methods.options import MethodOptions
from prunetune.methods.samples import SAMPLES
from prunetune.methods.samples._ranked import Prefer, RankedSamples
from prunetune.model.score_table import ScoreTable


class El2nOptions(MethodOptions):
    """Options of el2n."""

    drop_top: float = Field(0.0, ge=0, lt=1, description="share with the largest scores that is left out as noise")


@SAMPLES.register("el2n")
class El2nSamples(RankedSamples):
    """Rows with the largest error vector |p - onehot(y)|, averaged over the target tokens (EL2N).

    The paper (arXiv 2107.07075) scores one label per example, early in training and averaged over several runs; here it
    is the mean over an answer's tokens under one model.
    """

    Options = El2nOptions
    paper = "arXiv 2107.07075"
    needs = frozenset({"el2n"})
    options: El2nOptions

    def values(self, table: ScoreTable) -> np.ndarray:
        return table.mean(table.tokens["el2n"])

    def prefer(self) -> Prefer:
        return "high"

    def limits(self) -> tuple[float, float]:
        return 0.0, 1.0 - self.options.drop_top

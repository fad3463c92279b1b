"""GraNd of the output layer: rows by the size of their gradient."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from prunetune.methods.options import MethodOptions
from prunetune.methods.samples import SAMPLES
from prunetune.methods.samples._ranked import Prefer, RankedSamples
from prunetune.model.score_table import ScoreTable


class GradientOptions(MethodOptions):
    """Options of last_layer_gradient."""

    drop_top: float = Field(0.0, ge=0, lt=1, description="share with the largest norms that is left out as noise")


@SAMPLES.register("last_layer_gradient")
class LastLayerGradientSamples(RankedSamples):
    """Rows with the largest gradient of the output layer (GraNd of the last layer).

    Of arXiv 2107.07075. The norm is that of the row's mean loss, so that a long answer is not favoured for being long.
    """

    Options = GradientOptions
    paper = "arXiv 2107.07075"
    needs = frozenset({"grad_norm"})
    options: GradientOptions

    def values(self, table: ScoreTable) -> np.ndarray:
        return table.rows["grad_norm"].astype(np.float64)

    def prefer(self) -> Prefer:
        return "high"

    def limits(self) -> tuple[float, float]:
        return 0.0, 1.0 - self.options.drop_top

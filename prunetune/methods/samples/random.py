"""The control that every other method must beat."""

from __future__ import annotations

import numpy as np

from prunetune.methods.samples import SAMPLES, SampleMethod
from prunetune.methods.samples._ranked import lots
from prunetune.model.score_table import ScoreTable


@SAMPLES.register("random")
class RandomSamples(SampleMethod):
    """Rows by lot: the control that every other method must beat at equal steps.

    A row's lot depends on the seed and its id alone, so with more rows asked for, the rows of before stay.
    """

    def scores(self, table: ScoreTable) -> np.ndarray:
        return lots(table, self.seed, "samples.random")

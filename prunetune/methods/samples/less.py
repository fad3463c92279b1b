"""LESS: rows whose gradient points where the validation rows' does."""

from __future__ import annotations

import numpy as np

from prunetune.methods.samples import SAMPLES, SampleMethod
from prunetune.model.score_table import ScoreTable


@SAMPLES.register("less")
class LessSamples(SampleMethod):
    """Rows whose projected LoRA gradient is most similar to that of a small validation set (LESS).

    The similarity (arXiv 2402.04333) is made while scoring; here only the largest are kept.
    """

    paper = "arXiv 2402.04333"
    needs = frozenset({"influence"})
    online = False

    def scores(self, table: ScoreTable) -> np.ndarray:
        return table.rows["influence"].astype(np.float64)

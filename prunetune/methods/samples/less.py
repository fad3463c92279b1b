"""LESS: rows that move the model where the validation rows' gradients point."""

from __future__ import annotations

import numpy as np

from prunetune.methods.samples import SAMPLES, SampleMethod
from prunetune.model.score_table import ScoreTable


@SAMPLES.register("less")
class LessSamples(SampleMethod):
    """Rows whose LoRA gradient, or Adam's step with it, is most similar to the gradients of a small validation set.

    The similarity (arXiv 2402.04333) is made while scoring, with Adam's moments if that was done with a checkpoint of
    a run; here only the largest are kept.
    """

    paper = "arXiv 2402.04333"
    needs = frozenset({"influence"})
    online = False

    def scores(self, table: ScoreTable) -> np.ndarray:
        return table.rows["influence"].astype(np.float64)

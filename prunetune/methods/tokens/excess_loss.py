"""Excess loss: what the model still has to learn that a reference model shows can be learnt."""

from __future__ import annotations

import numpy as np

from prunetune.methods.tokens import TOKENS, TokenMethod
from prunetune.model.score_table import ScoreTable


@TOKENS.register("excess_loss")
class ExcessLoss(TokenMethod):
    """The loss of the model that is trained minus a reference model's; the highest excess stays (Rho-1).

    nll_t - reference_nll_t, where the reference was tuned on a small good set and nll is the current model's. What is
    easy for both and what neither can learn falls out.
    """

    paper = "arXiv 2404.07965"
    needs = frozenset({"nll", "reference_nll"})

    def scores(self, table: ScoreTable) -> np.ndarray:
        with np.errstate(invalid="ignore"):  # infinite losses of both cannot be judged
            return table.tokens["nll"].astype(np.float64) - table.tokens["reference_nll"].astype(np.float64)

"""A draw by lot: the baseline that every other token method has to beat."""

from __future__ import annotations

import numpy as np

from prunetune.core.streams import stream
from prunetune.methods.tokens import TOKENS, TokenMethod
from prunetune.model.score_table import ScoreTable


@TOKENS.register("random")
class Random(TokenMethod):
    """Tokens drawn by lot; a row's draw depends on the seed and on its id alone."""

    def scores(self, table: ScoreTable) -> np.ndarray:
        draws = [stream(self.seed, "token method random", name).random(n) for name, n in zip(table.ids, table.targets)]
        return np.concatenate([np.zeros(0), *draws])

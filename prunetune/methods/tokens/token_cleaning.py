"""Token cleaning: tokens that tuning on a trusted part of the data made likelier."""

from __future__ import annotations

import numpy as np

from prunetune.methods.tokens import TOKENS, TokenMethod
from prunetune.model.score_table import ScoreTable


@TOKENS.register("token_cleaning")
class TokenCleaning(TokenMethod):
    """The base model's loss minus that of the base tuned on a part of the data; the largest drop stays.

    L_base - L_ref of two fixed models. The scores must be made with ``--model`` the untuned base (its loss is the
    column nll) and ``--reference`` the tuned one (reference_nll). The other way round keeps what tuning made worse.
    Because nll must be the base's and not that of the model in training, it does not work online.
    """

    paper = "arXiv 2502.01968"
    needs = frozenset({"nll", "reference_nll"})
    online = False

    def scores(self, table: ScoreTable) -> np.ndarray:
        base_T, tuned_T = table.tokens["nll"], table.tokens["reference_nll"]
        with np.errstate(invalid="ignore"):  # infinite losses of both cannot be judged
            return base_T.astype(np.float64) - tuned_T.astype(np.float64)

"""Whole paragraphs of long reasoning leave, those first whose first token surprises the model least."""

from __future__ import annotations

import numpy as np

from prunetune.methods.tokens import TOKENS, TokenMethod
from prunetune.model.score_table import ScoreTable


@TOKENS.register("paragraph_surprisal")
class ParagraphSurprisal(TokenMethod):
    """Paragraphs whose first token is least surprising leave the text; the last one never does (ASAP stage 2).

    A paragraph's surprisal is the loss of its first token after everything before it in the uncut text. Paragraphs
    leave in ascending order until the budget of tokens is met; those that stay keep their order. They are told apart
    by their number, so one that occurs twice is judged twice.
    """

    paper = "arXiv 2508.05988"
    needs = frozenset({"nll", "paragraph"})
    online = False
    removes = True

    def scores(self, table: ScoreTable) -> np.ndarray:
        nll_T = table.tokens["nll"].astype(np.float64)
        _, first, group_T = np.unique(
            np.stack([table.row_of_token, self.groups(table)]), axis=1, return_index=True, return_inverse=True
        )
        return nll_T[first][group_T.reshape(-1)]

    def groups(self, table: ScoreTable) -> np.ndarray:
        return table.tokens["paragraph"].astype(np.int64)

"""Neighbour-aware perplexity: tokens that are surprising and stand among surprising ones leave."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from prunetune.methods.options import MethodOptions
from prunetune.methods.tokens import TOKENS, TokenMethod
from prunetune.model.score_table import ScoreTable

# exp(20) is half a billion: beyond it differences mean nothing, and sums must stay finite.
MOST_NLL = 20.0


class NeighbourPerplexityOptions(MethodOptions):
    """Options of neighbour_perplexity."""

    neighbour_weight: float = Field(0.5, ge=0, le=1, description="share of the neighbours (lambda of the paper)")
    combine: Literal["sum", "average"] = Field(
        "sum",
        description="of both neighbours: sum (as published; a missing one is 0) or average (the token stands for it)",
    )


@TOKENS.register("neighbour_perplexity")
class NeighbourPerplexity(TokenMethod):
    """Token perplexity smoothed over both neighbours; the highest values leave (Q-Tuning).

    s_t = (1 - w) PPL_t + w (PPL_{t-1} + PPL_{t+1}) with PPL_t = exp(nll_t). Neighbours are targets of the same row at
    the positions beside it; the one that the first and the last token of an answer lack counts 0. Losses are cut at
    20 nats before the exponential, which the paper does not do.
    """

    Options = NeighbourPerplexityOptions
    paper = "arXiv 2509.23873"
    needs = frozenset({"nll", "position"})

    def __init__(self, options: NeighbourPerplexityOptions, seed: int = 0):
        super().__init__(options, seed)
        self.options: NeighbourPerplexityOptions = options

    def scores(self, table: ScoreTable) -> np.ndarray:
        ppl_T = np.exp(np.minimum(table.tokens["nll"].astype(np.float64), MOST_NLL))
        # Two turns of one conversation are not neighbours, nor are two rows.
        touches_T = (np.diff(table.tokens["position"]) == 1) & (np.diff(table.row_of_token) == 0)
        average = self.options.combine == "average"
        before_T, after_T = (ppl_T.copy(), ppl_T.copy()) if average else (np.zeros(len(ppl_T)), np.zeros(len(ppl_T)))
        before_T[1:][touches_T] = ppl_T[:-1][touches_T]
        after_T[:-1][touches_T] = ppl_T[1:][touches_T]
        around_T = (before_T + after_T) * (0.5 if average else 1.0)
        weight = self.options.neighbour_weight
        return -((1 - weight) * ppl_T + weight * around_T)

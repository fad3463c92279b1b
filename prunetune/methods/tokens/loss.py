"""Tokens by their loss: the easiest, the middle ones, or the hardest."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from prunetune.methods.options import MethodOptions
from prunetune.methods.ranking import percentiles
from prunetune.methods.tokens import TOKENS, TokenMethod
from prunetune.model.score_table import ScoreTable


class LossOptions(MethodOptions):
    """Options of loss."""

    band: Literal["low", "mid", "high"] = Field("low", description="which losses stay: low, mid or high percentiles")
    percentiles_of: Literal["sample", "all"] = Field(
        "sample", description="the tokens among which the percentiles of band mid are taken: each sample's, or all"
    )


@TOKENS.register("loss")
class Loss(TokenMethod):
    """Tokens whose loss is in a band of percentiles: the lowest, the middle, or the highest losses stay."""

    Options = LossOptions
    needs = frozenset({"nll"})

    def __init__(self, options: LossOptions, seed: int = 0):
        super().__init__(options, seed)
        self.options: LossOptions = options

    def scores(self, table: ScoreTable) -> np.ndarray:
        nll_T = table.tokens["nll"].astype(np.float64)
        if self.options.band != "mid":
            return nll_T if self.options.band == "high" else -nll_T
        if self.options.percentiles_of == "all":
            return -np.abs(percentiles(nll_T) - 0.5)
        parts = np.split(nll_T, table.offsets[1:-1]) if len(table) else []
        return -np.abs(np.concatenate([np.zeros(0), *map(percentiles, parts)]) - 0.5)

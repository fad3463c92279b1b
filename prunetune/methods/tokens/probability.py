"""Tokens by the probability that the model gives them."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from prunetune.methods.options import MethodOptions
from prunetune.methods.tokens import TOKENS, TokenMethod
from prunetune.model.score_table import ScoreTable


class ProbabilityOptions(MethodOptions):
    """Options of probability."""

    keep: Literal["high", "low"] = Field("high", description="which probabilities stay: high (as published) or low")


@TOKENS.register("probability")
class Probability(TokenMethod):
    """Tokens by their probability; unlikely ones leave, as in ProFit, or with keep low the likely ones."""

    Options = ProbabilityOptions
    paper = "arXiv 2601.09195"
    needs = frozenset({"nll"})

    def __init__(self, options: ProbabilityOptions, seed: int = 0):
        super().__init__(options, seed)
        self.options: ProbabilityOptions = options

    def scores(self, table: ScoreTable) -> np.ndarray:
        probability_T = np.exp(-table.tokens["nll"].astype(np.float64))
        return probability_T if self.options.keep == "high" else -probability_T

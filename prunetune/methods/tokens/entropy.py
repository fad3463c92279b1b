"""Tokens by the entropy of what the model predicted in their place."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from prunetune.methods.options import MethodOptions
from prunetune.methods.tokens import TOKENS, TokenMethod
from prunetune.model.score_table import ScoreTable


class EntropyOptions(MethodOptions):
    """Options of entropy."""

    keep: Literal["high", "low"] = Field("high", description="which entropies stay: high (undecided places) or low")


@TOKENS.register("entropy")
class Entropy(TokenMethod):
    """Tokens by the entropy of the prediction; places where the model was undecided stay, or with keep low leave."""

    Options = EntropyOptions
    needs = frozenset({"entropy"})

    def __init__(self, options: EntropyOptions, seed: int = 0):
        super().__init__(options, seed)
        self.options: EntropyOptions = options

    def scores(self, table: ScoreTable) -> np.ndarray:
        entropy_T = table.tokens["entropy"].astype(np.float64)
        return entropy_T if self.options.keep == "high" else -entropy_T

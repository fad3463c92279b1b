"""Rows by the perplexity of their answer."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from prunetune.methods.samples import SAMPLES
from prunetune.methods.samples._ranked import LimitOptions, Prefer, RankedSamples, perplexity
from prunetune.model.score_table import ScoreTable

_PREFER: dict[str, Prefer] = {"low": "low", "mid": "middle", "high": "high"}


class PerplexityOptions(LimitOptions):
    """Options of perplexity."""

    band: Literal["low", "mid", "high"] = Field(
        "mid", description="which perplexities are kept first; mid: nearest to the middle between lower and upper"
    )


@SAMPLES.register("perplexity")
class PerplexitySamples(RankedSamples):
    """Rows from the middle of the perplexity ranking, or from one end.

    As in arXiv 2309.04564 for pretraining text. The perplexity is exp(mean negative log-likelihood of the target tokens
    given all before them).
    """

    Options = PerplexityOptions
    paper = "arXiv 2309.04564"
    needs = frozenset({"nll"})
    options: PerplexityOptions

    def values(self, table: ScoreTable) -> np.ndarray:
        return table.mean(table.tokens["nll"])

    def prefer(self) -> Prefer:
        return _PREFER[self.options.band]

    def limits(self) -> tuple[float, float]:
        return self.options.lower, self.options.upper

    def shown(self, values: np.ndarray) -> np.ndarray:
        return perplexity(values)

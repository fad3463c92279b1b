"""Rows by their length."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from prunetune.methods.samples import SAMPLES
from prunetune.methods.samples._ranked import LimitOptions, Prefer, RankedSamples
from prunetune.model.score_table import ScoreTable

_PREFER: dict[str, Prefer] = {"longest": "high", "shortest": "low", "band": "middle"}


class LengthOptions(LimitOptions):
    """Options of length."""

    order: Literal["longest", "shortest", "band"] = Field(
        "longest", description="which rows are kept first; band: nearest to the middle between lower and upper"
    )


@SAMPLES.register("length")
class LengthSamples(RankedSamples):
    """Rows with the most target tokens: a strong and cheap baseline.

    The longest thousand rows of arXiv 2402.04833; the shortest, or a band of lengths, by option.
    """

    Options = LengthOptions
    paper = "arXiv 2402.04833"
    options: LengthOptions

    def values(self, table: ScoreTable) -> np.ndarray:
        return table.targets.astype(np.float64)

    def prefer(self) -> Prefer:
        return _PREFER[self.options.order]

    def limits(self) -> tuple[float, float]:
        return self.options.lower, self.options.upper

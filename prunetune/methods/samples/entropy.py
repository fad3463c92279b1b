"""Rows by how uncertain the model is."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from prunetune.methods.samples import SAMPLES
from prunetune.methods.samples._ranked import LimitOptions, Prefer, RankedSamples
from prunetune.model.score_table import ScoreTable


class EntropyOptions(LimitOptions):
    """Options of entropy."""

    order: Literal["highest", "lowest"] = Field("highest", description="which entropies are kept first")


@SAMPLES.register("entropy")
class EntropySamples(RankedSamples):
    """Rows whose answer the model is least sure of: mean entropy of its predictions.

    In nats over the whole vocabulary, averaged over the target tokens (as a criterion: arXiv 1906.11829).
    """

    Options = EntropyOptions
    paper = "arXiv 1906.11829"
    needs = frozenset({"entropy"})
    options: EntropyOptions

    def values(self, table: ScoreTable) -> np.ndarray:
        return table.mean(table.tokens["entropy"])

    def prefer(self) -> Prefer:
        return "high" if self.options.order == "highest" else "low"

    def limits(self) -> tuple[float, float]:
        return self.options.lower, self.options.upper

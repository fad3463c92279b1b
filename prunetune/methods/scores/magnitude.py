"""Sizes of the weights that a unit owns; no data."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from prunetune.methods.options import MethodOptions
from prunetune.methods.scores import SCORES, LayerFacts, LayerScore, ScoreContext, consumer, owned, per_unit


class MagnitudeOptions(MethodOptions):
    """Options of magnitude."""

    power: int = Field(2, ge=1, le=2, description="sum |w| (1) or w^2 (2)")
    of: Literal["unit", "consumer"] = Field(
        "unit", description="all tensors of the unit, or only the consumer's columns"
    )


@SCORES.register("magnitude")
class Magnitude(LayerScore):
    """Sum of |w|^p over everything that a unit owns; no data. A baseline: useless in one shot at high ratios."""

    Options = MagnitudeOptions
    paper = "arXiv 2301.12900"

    def __init__(self, context: ScoreContext, options: MagnitudeOptions):
        super().__init__(context, options)
        self.options: MagnitudeOptions = options

    def units(self, facts: LayerFacts, kind: str) -> Tensor:
        arch = self.context.arch
        if self.options.of == "consumer":
            weight = facts.weights[consumer(arch, kind)]
            return per_unit(arch, kind, weight.abs().pow(self.options.power).sum(0))
        return owned(arch, kind, lambda role: facts.weights[role].abs().pow(self.options.power))

"""Random dropping with rescaling: every entry has the same chance to stay."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator
from torch import Tensor

from prunetune.methods.deltas import DELTAS, DeltaContext, DeltaMethod, DropOptions, random_words
from prunetune.model.deltas import Delta, Mapped, threshold


class DareOptions(DropOptions):
    """Options of dare."""

    rescale: float | Literal["inverse_keep", "l1", "none"] = Field(
        "inverse_keep",
        description="what survivors are divided by: inverse_keep: 1 - drop; a number: that; l1: the share of the "
        "delta's absolute sum that survived; none: 1",
    )

    @field_validator("rescale")
    @classmethod
    def _positive(cls, value: float | str) -> float | str:
        if isinstance(value, float) and not 0 < value <= 1:
            raise ValueError("survivors are divided by it, so it must be above 0 and at most 1")
        return value


@DELTAS.register("dare")
class Dare(DeltaMethod):
    """Every entry is dropped with probability ``drop``; survivors are divided by 1 - drop, so that the mean stays."""

    Options = DareOptions
    paper = "arXiv 2311.03099"

    def __init__(self, options: DareOptions):
        super().__init__(options)
        self.options: DareOptions = options

    def apply(self, delta: Delta, context: DeltaContext) -> Delta:
        dropped = masked(delta, context, self.options.drop)
        rescale, keep = self.options.rescale, 1 - self.options.drop
        if rescale == "l1":
            whole, left = (sum(float(block.abs().sum()) for _, block in part.blocks()) for part in (delta, dropped))
            return divided(dropped, left / whole if whole and left else 1.0)
        divisor = {"inverse_keep": keep, "none": 1.0}.get(rescale, rescale) if isinstance(rescale, str) else rescale
        return divided(dropped, float(divisor))


def masked(delta: Delta, context: DeltaContext, drop: float) -> Delta:
    """The delta with entries dropped by lot, survivors unscaled; the delta itself if nothing is dropped."""
    if drop == 0:
        return delta
    limit = threshold(1 - drop)

    def change(block: Tensor, start: int, stop: int) -> Tensor:
        return block * (random_words(delta.place, context, "dare", start, stop) < limit)

    return Mapped(delta, change)


def divided(delta: Delta, divisor: float) -> Delta:
    """The delta over a number; a divisor of 0 (everything was dropped) or 1 changes nothing."""
    return delta if divisor in (0.0, 1.0) else Mapped(delta, lambda block, start, stop: block / divisor)

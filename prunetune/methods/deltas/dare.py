"""Random dropping with rescaling: every entry has the same chance to stay."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator
from torch import Tensor

from prunetune.methods.deltas import DELTAS, DeltaContext, DeltaMethod, DropOptions
from prunetune.model.deltas import Delta, LowRank, Mapped, Place, stays_of


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
    random = drawn = True

    def __init__(self, options: DareOptions):
        super().__init__(options)
        self.options: DareOptions = options

    def apply(self, delta: Delta, context: DeltaContext) -> Delta:
        return divided(self.kept(delta, context), self.divisor(delta, context))

    def kept(self, delta: Delta, context: DeltaContext) -> Delta:
        return masked(delta, context, self.options.drop)

    def divisor(self, delta: Delta, context: DeltaContext) -> float:
        if self.options.rescale != "l1":
            return self._fixed_divisor()
        parts = (delta, self.kept(delta, context))
        whole, left = (sum(float(block.abs().sum()) for _, block in part.blocks()) for part in parts)
        return left / whole if whole and left else 1.0

    def on_factors(self, delta: LowRank, context: DeltaContext) -> LowRank | None:
        if self.options.rescale == "l1":
            return None
        return masked_factors(delta, context, self.options.drop, self._fixed_divisor())

    def _fixed_divisor(self) -> float:
        rescale = self.options.rescale
        return float({"inverse_keep": 1 - self.options.drop, "none": 1.0}.get(str(rescale), rescale))


def masked(delta: Delta, context: DeltaContext, drop: float) -> Delta:
    """The delta with entries dropped by lot, survivors unscaled; the delta itself if nothing is dropped."""
    if drop == 0:
        return delta

    def change(block: Tensor, start: int, stop: int) -> Tensor:
        return block * stays_of(delta.place, context.seed, context.model, "dare", start, stop, 1 - drop)

    return Mapped(delta, change)


def divided(delta: Delta, divisor: float) -> Delta:
    """The delta over a number; a divisor of 0 (everything was dropped) or 1 changes nothing."""
    return delta if divisor in (0.0, 1.0) else Mapped(delta, lambda block, start, stop: block / divisor)


def masked_factors(delta: LowRank, context: DeltaContext, drop: float, divisor: float) -> LowRank:
    """The delta with entries of A alone dropped by lot, survivors divided: still an adapter, of the same rank.

    Masking B, or both, is never done: outputs then average over the rank instead of the inputs, and errors grow.
    """
    if drop == 0:
        return delta
    place = Place(f"{delta.place.name} A", (len(delta.a), delta.place.shape[1]), None, delta.place.columns)
    stays = stays_of(place, context.seed, context.model, "dare A", 0, len(delta.a), 1 - drop)
    return LowRank(delta.place, delta.a * stays / (divisor or 1.0), delta.b, delta.scale)

"""Whole input columns of a delta are dropped by lot: what is left is a smaller dense matrix."""

from __future__ import annotations

import torch
from pydantic import Field, field_validator

from prunetune.core.streams import lattice
from prunetune.methods.deltas import DELTAS, DeltaContext, DeltaMethod, DropOptions
from prunetune.methods.deltas.dare import divided
from prunetune.model.deltas import Delta, LowRank, Mapped, threshold


class StructuralOptions(DropOptions):
    """Options of structural."""

    q: float | None = Field(None, description="what survivors are divided by; default: 1 - drop")

    @field_validator("q")
    @classmethod
    def _positive(cls, value: float | None) -> float | None:
        if value is not None and not 0 < value <= 1:
            raise ValueError("survivors are divided by it, so it must be above 0 and at most 1")
        return value


@DELTAS.register("structural")
class Structural(DeltaMethod):
    """Input columns are dropped by lot; survivors are divided by q. A LoRA delta stays one: columns of A leave."""

    Options = StructuralOptions
    paper = "arXiv 2410.09344"
    random = True

    def __init__(self, options: StructuralOptions):
        super().__init__(options)
        self.options: StructuralOptions = options

    def apply(self, delta: Delta, context: DeltaContext) -> Delta:
        drop, place = self.options.drop, delta.place
        if drop == 0:
            return delta
        # The draw is of the dense columns: one row of words, whatever rows and columns are left here.
        names = ("structural", context.model, place.name)
        words = lattice(context.seed, *names, rows=slice(0, 1), columns=place.shape[1])[0]
        stays = words.astype("int64") < threshold(1 - drop)
        kept = stays if place.columns is None else stays[place.columns.numpy()]
        mask = torch.from_numpy(kept).float()
        divisor = self.options.q or 1 - drop
        if isinstance(delta, LowRank):
            return LowRank(place, delta.a * mask / (divisor or 1.0), delta.b, delta.scale)
        return divided(Mapped(delta, lambda block, start, stop: block * mask), divisor)

    def on_factors(self, delta: LowRank, context: DeltaContext) -> LowRank | None:
        pruned = self.apply(delta, context)
        return pruned if isinstance(pruned, LowRank) else None

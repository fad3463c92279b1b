"""Everything that was learnt is kept."""

from __future__ import annotations

from prunetune.methods.deltas import DELTAS, DeltaContext, DeltaMethod
from prunetune.model.deltas import Delta, LowRank


@DELTAS.register("identity")
class Identity(DeltaMethod):
    """The delta as it is."""

    def apply(self, delta: Delta, context: DeltaContext) -> Delta:
        return delta

    def on_factors(self, delta: LowRank, context: DeltaContext) -> LowRank:
        return delta

"""All ranks stay."""

from __future__ import annotations

from collections.abc import Sequence

from prunetune.methods.ranks import RANKS, RankMethod, SeenAdapter
from prunetune.model.ranks import RankChange


@RANKS.register("keep")
class KeepRanks(RankMethod):
    """Every adapter keeps the rank that it was made with."""

    needs = cost = "nothing"
    observes = False

    def ranks(self, adapters: Sequence[SeenAdapter]) -> dict[str, RankChange]:
        return {}

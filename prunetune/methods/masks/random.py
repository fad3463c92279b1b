"""The control that every other mask must beat: units chosen by lot, everything else equal."""

from __future__ import annotations

import torch
from torch import Tensor

from prunetune.core.streams import stream
from prunetune.methods.masks import MASKS, MaskContext, unit_params
from prunetune.methods.masks._scheduled import ScheduledMask, ScheduleOptions


@MASKS.register("random")
class RandomMask(ScheduledMask):
    """Units chosen by lot, on the same schedule: the control that every other mask must beat."""

    needs = "nothing"
    ranks_hidden = True

    def __init__(self, context: MaskContext, options: ScheduleOptions):
        super().__init__(context, options)
        costs = unit_params(context.planner)
        self._scores = {
            # Around the unit's parameters, so that no kind is favoured for being counted in larger pieces.
            site.name: torch.from_numpy(
                costs[site.kind] * (0.5 + stream(context.seed, "mask.random", site.name).random(site.size))
            ).float()
            for site in self.sites
        }

    def scores(self) -> dict[str, Tensor]:
        return dict(self._scores)

"""MaskPrune: masks and one common width of all layers, learnt as a minimax problem."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from prunetune.methods.masks import MASKS, MaskContext
from prunetune.methods.masks._free import FreeMask, FreeOptions, unit_gradients
from prunetune.model.gates import GateStatistics
from prunetune.model.units import LAYERS_SITE


class MaskpruneOptions(FreeOptions):
    """Options of the maskprune mask."""

    learning_rate: float = Field(0.05, gt=0, description="a mask whose gradient is average moves so far in a step")
    pressure: float = Field(2.0, gt=0, description="of the proximal step at first")
    ascent: float = Field(
        0.1, ge=0, description="how fast a site's pressure grows while masks beyond its width are open"
    )
    ramp_share: float = Field(0.8, gt=0, le=1, description="the budget is reached after this share of the search")


@MASKS.register("maskprune")
class MaskpruneMask(FreeMask):
    """MaskPrune: masks m and one width s for all layers; min over m and s, max over multipliers, by proximal steps.

    min_{m,s} max_{y>=0} loss(m) + sum_l y_l T(m_l, s), where T adds up the squares of all but the s largest masks of a
    site and is 0 once at most s are open (arXiv 2502.14008, whose equations had to be reconstructed from its summary).
    Per step: masks move down the loss's gradient; the planner takes the legal shape inside the budget with the least
    sum of y T, which is the minimum over s exactly and needs no multiplier for the budget; masks beyond the width
    shrink by 1 / (1 + 2 * rate * y), the proximal step of y T; and each y rises by T.

    Differences: T counts a unit's parameters, so that kinds compare; masks within the width approach 1 by the same
    factor, because at the freeze they are 1 and are not multiplied into the weights.
    """

    Options = MaskpruneOptions
    paper = "arXiv 2502.14008"
    cost = "a reduction over each gated input, a planner's decision a step"

    def __init__(self, context: MaskContext, options: MaskpruneOptions):
        super().__init__(context, options)
        self.options = options
        self._pressure = {site.name: torch.tensor(options.pressure) for site in self.sites}

    def learn(self, step: int, statistics: GateStatistics) -> dict[str, float]:
        rate = self.options.learning_rate
        for name, grad in unit_gradients(statistics, self._costs).items():
            self._free[name] = (self._free[name] - rate * grad).clamp(0.0, 1.0)
        way = self.progress(step, self.options.ramp_share)
        kept = self.context.planner.plan(self.scores(), way=way, aligned=way == 1.0).kept
        beyond = 0.0
        for site in self.sites:
            if site.name not in kept and site.layer >= 0 and site.layer not in kept.get(LAYERS_SITE, (site.layer,)):
                continue  # its layer leaves as a whole
            mask, inside = self._free[site.name], torch.zeros(site.size, dtype=torch.bool)
            inside[list(kept.get(site.name, range(site.size)))] = True
            shrink = 1.0 / (1.0 + 2.0 * rate * self._pressure[site.name])
            excess = torch.where(inside, 0.0, mask.square()).mean()
            self._free[site.name] = torch.where(inside, 1.0 - (1.0 - mask) * shrink, mask * shrink)
            self._pressure[site.name] = self._pressure[site.name] + self.options.ascent * excess
            beyond += float(excess) / len(self.sites)
        return {"mask_beyond_width": beyond}

    def scores(self) -> dict[str, Tensor]:
        # Closed masks are told apart by nothing but their index, unless a trace is left of what the gradient said.
        return {
            name: self._costs[name] * self._pressure[name] * mask.square().clamp(min=1e-12)
            for name, mask in self._free.items()
        }

    def state_dict(self) -> dict[str, Tensor]:
        return {**super().state_dict(), **{f"pressure.{name}": y.clone() for name, y in self._pressure.items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self._pressure = {name: state[f"pressure.{name}"].clone() for name in self._pressure}

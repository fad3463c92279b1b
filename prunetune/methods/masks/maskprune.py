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

# What a mask is at the end of the search that was beyond its site's width in the second half of it.
CLOSED = 0.01


class MaskpruneOptions(FreeOptions):
    """Options of the maskprune mask."""

    learning_rate: float = Field(
        0.005, gt=0, description="the furthest that a gradient moves a mask; less in a long search"
    )
    pressure: float = Field(
        0.0, ge=0, description="of the proximal step at first; 0: closes masks to 1% in half of the search"
    )
    ascent: float = Field(
        1.0, ge=0, description="how fast a site's pressure grows, of what it is at first, while masks beyond are open"
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

    Differences: T counts a unit's parameters, so that kinds compare; the model runs with units within the width wholly
    open and the gradient passes straight through, because masks are not multiplied into the weights at the freeze.
    """

    Options = MaskpruneOptions
    paper = "arXiv 2502.14008"
    cost = "a reduction over each gated input, a planner's decision a step"

    def __init__(self, context: MaskContext, options: MaskpruneOptions):
        super().__init__(context, options)
        self.options = options
        self._rate = min(options.learning_rate, self._longest)
        steps = max(1.0, context.phases.search / 2)
        self._first = options.pressure or (CLOSED ** (-1 / steps) - 1) / (2 * self._rate)
        self._pressure = {site.name: torch.tensor(self._first) for site in self.sites}
        self._inside = {site.name: torch.ones(site.size, dtype=torch.bool) for site in self.sites}

    def gates(self, step: int) -> dict[str, Tensor]:
        return {name: torch.where(self._inside[name], 1.0, gate) for name, gate in super().gates(step).items()}

    def learn(self, step: int, statistics: GateStatistics) -> dict[str, float]:
        rate = self._rate
        for name, grad in unit_gradients(statistics, self._costs).items():
            self._free[name] = (self._free[name] - rate * grad).clamp(0.0, 1.0 + self._spread)
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
            self._free[site.name] = torch.where(inside, mask, mask * shrink)
            self._inside[site.name] = inside
            self._pressure[site.name] = self._pressure[site.name] + self.options.ascent * self._first * excess
            beyond += float(excess) / len(self.sites)
        return {"mask_beyond_width": beyond}

    def scores(self) -> dict[str, Tensor]:
        # Closed masks are told apart by nothing but their index, unless a trace is left of what the gradient said.
        return {
            name: self._costs[name] * self._pressure[name] * mask.square().clamp(min=1e-12)
            for name, mask in self._free.items()
        }

    def state_dict(self) -> dict[str, Tensor]:
        pressure = {f"pressure.{name}": y.clone() for name, y in self._pressure.items()}
        return {**super().state_dict(), **pressure, **{f"inside.{name}": u.clone() for name, u in self._inside.items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self._pressure = {name: state[f"pressure.{name}"].clone() for name in self._pressure}
        self._inside = {name: state[f"inside.{name}"].clone() for name in self._inside}

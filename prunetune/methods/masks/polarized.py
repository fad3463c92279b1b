"""Polarisation: a regulariser that drives gates away from their mean, toward 0 and 1."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor

from prunetune.methods.masks import MASKS, MaskContext, budget_fraction, kept_fraction
from prunetune.methods.masks._free import FreeMask, FreeOptions, unit_gradients
from prunetune.model.gates import GateStatistics

# A gate's number may lie so far outside [0, 1]: what happened to it lately then still tells closed gates apart.
MARGIN = 1.0
BISECTIONS = 40


class PolarizedOptions(FreeOptions):
    """Options of the polarized mask."""

    learning_rate: float = Field(
        0.05, gt=0, description="the furthest that a gradient moves a gate; less if that would undo the start"
    )
    strength: float = Field(1.0, ge=0, description="of the push away from the pivot, times learning_rate")
    ramp_share: float = Field(0.8, gt=0, le=1, description="the budget is reached after this share of the search")


@MASKS.register("polarized")
class PolarizedMask(FreeMask):
    """Polarisation: loss + lambda (t sum |g| - sum |g - pivot|) over free gates, t and pivot solved for the budget.

    The second term pushes every gate away from the pivot, so that they end near 0 or 1 and closing the lower ones
    changes little (Zhuang et al., NeurIPS 2020). t, which pulls all gates down alike, is the price of the budget: after
    each step it is taken such that the gates let through exactly what the ramp allows. The pivot, published as a
    constant times the mean gate, is taken where as much lies above it as the ramp allows: were it the mean, too many
    gates would be pushed up, and all of these held half open by the price. Published for the scales of batch norms
    in image models, which a threshold cuts where their histogram is empty; here the gates are their own, gradients
    count per parameter in units of their root mean square, and the cut is made by rank.
    """

    Options = PolarizedOptions
    paper = "NeurIPS 2020 (Zhuang et al.)"

    def __init__(self, context: MaskContext, options: PolarizedOptions):
        super().__init__(context, options)
        self.options = options
        self._final = budget_fraction(context.planner)

    def penalty(self, step: int) -> Tensor:
        free, pivot = torch.cat(list(self._free.values())), self._pivot(self._target(step))
        return -self.options.strength * (free - pivot).abs().sum()

    def _target(self, step: int) -> float:
        """The fraction of the decoder that the gates may let through after this step."""
        return 1.0 - (1.0 - self._final) * self.progress(step, self.options.ramp_share)

    def learn(self, step: int, statistics: GateStatistics) -> dict[str, float]:
        target = self._target(step)
        pivot = self._pivot(target)
        rate = min(self.options.learning_rate, self._longest)
        for name, grad in unit_gradients(statistics, self._costs).items():
            push = self.options.strength * self.options.learning_rate * torch.sign(self._free[name] - pivot)
            self._free[name] = self._free[name] - rate * grad + push
        price = self._hold(target)
        gates = torch.cat([free.clamp(0.0, 1.0) for free in self._free.values()])
        return {"mask_price": price, "mask_half_open": float(((gates > 0.05) & (gates < 0.95)).float().mean())}

    def _pivot(self, target: float) -> float:
        """The number above which units lie with ``target`` of the decoder's parameters."""
        edge = self._least(target, lambda free, number: (free > number).double())
        free = torch.cat(list(self._free.values())).double()
        above, below = free[free > edge], free[free <= edge]
        nearest = [float(part) for part in (*above.sort().values[:1], *below.sort().values[-1:])]
        return sum(nearest) / len(nearest)

    def _hold(self, target: float) -> float:
        """Takes one number from all gates so that they let ``target`` of the decoder through; returns it."""
        price = self._least(target, lambda free, number: (free - number).clamp(0.0, 1.0))
        self._free = {name: (t - price).clamp(-MARGIN, 1.0 + MARGIN) for name, t in self._free.items()}
        return price

    def _least(self, target: float, gates: Callable[[Tensor, float], Tensor]) -> float:
        """The least number with which the gates made from it let no more than ``target`` of the decoder through."""
        free = {name: t.double() for name, t in self._free.items()}
        low, high = min(float(t.min()) for t in free.values()) - 1.0, max(float(t.max()) for t in free.values())
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            made = {name: gates(t, middle) for name, t in free.items()}
            over = float(kept_fraction(self.context.planner, made)) > target * (1 + 1e-9)
            low, high = (middle, high) if over else (low, middle)
        return high

    def scores(self) -> dict[str, Tensor]:
        return {name: self._costs[name] * (free + MARGIN) / (1 + 2 * MARGIN) for name, free in self._free.items()}

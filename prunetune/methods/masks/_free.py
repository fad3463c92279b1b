"""Masks whose gates are free numbers of their own: what the ones that train them by plain steps share."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from prunetune.methods.masks import Mask, MaskContext, finite, unit_params
from prunetune.methods.masks._start import Beginning, steady_rate
from prunetune.methods.options import MethodOptions
from prunetune.model.gates import GateStatistics


class FreeOptions(MethodOptions):
    """How free numbers start."""

    start: Literal["saliency", "equal"] = Field(
        "saliency", description="first numbers: a little apart, from the warm-up's gradients, or all equal as published"
    )
    spread: float = Field(0.1, gt=0, lt=1, description="how far below 1 (or above) the least (or most) salient start")


class FreeMask(Mask):
    """Base of the masks with one free number a unit, about 1 at first, gates being what of it lies in [0, 1].

    Numbers that start equal are first told apart by the noise of a few gradients, and a short search never makes up for
    it. ``start: saliency`` sets them ``spread`` apart by the warm-up's second moment of the gate gradients (see the
    mask ``saliency``): learning still moves any of them anywhere.
    """

    Options = FreeOptions
    needs = "gate gradients per token"
    cost = "a reduction over each gated input"
    record_squares = True

    def __init__(self, context: MaskContext, options: FreeOptions):
        super().__init__(context, options)
        self._spread, self._beginning = options.spread, Beginning(context, options.start == "saliency")
        # The longest step that a unit's gradient may cause.
        self._longest = math.inf if self._beginning.over else steady_rate(options.spread, context.phases.search)
        # Published runs of these methods are thousands of steps long.
        self.least_search = 300 if self._beginning.over else 0
        self._free = {site.name: torch.ones(site.size) for site in self.sites}
        costs = unit_params(context.planner)
        self._costs = {site.name: costs[site.kind] for site in self.sites}

    def gates(self, step: int) -> dict[str, Tensor]:
        if step < self.context.phases.warmup_end:
            return {name: torch.ones_like(free) for name, free in self._free.items()}
        return {name: free.clamp(0.0, 1.0) for name, free in self._free.items()}

    def after_backward(self, step: int, statistics: GateStatistics) -> dict[str, float]:
        if not finite(statistics):
            return {}
        above = self._beginning.observe(step, statistics)
        if above is not None:
            self._free = {name: 1.0 + self._spread * over.clamp(-1.0, 1.0) for name, over in above.items()}
        return self.learn(step, statistics) if step >= self.context.phases.warmup_end else {}

    @abstractmethod
    def learn(self, step: int, statistics: GateStatistics) -> dict[str, float]:
        """A step of the search, on finite statistics; returns metrics to log."""

    def progress(self, step: int, ramp_share: float) -> float:
        """How far the search has come after this step, from 0 to 1 at ``ramp_share`` of it."""
        searched = step + 1 - self.context.phases.warmup_end
        return min(1.0, searched / max(1.0, ramp_share * self.context.phases.search))

    def state_dict(self) -> dict[str, Tensor]:
        return {**self._beginning.state_dict(), **{f"free.{name}": free.clone() for name, free in self._free.items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._beginning.load_state_dict(state)
        self._free = {name: state[f"free.{name}"].clone() for name in self._free}


def unit_gradients(statistics: GateStatistics, costs: Mapping[str, float]) -> dict[str, Tensor]:
    """Gate gradients per parameter, divided by their root mean square over all units and held to [-1, 1].

    A step size then means the same for every model and loss, and kinds are told apart by what their parameters are
    worth. The units that matter most have gradients of some 50 times the mean square, of either sign from batch to
    batch: unlimited, one batch closes them.
    """
    grads = {name: grad.cpu() / costs[name] for name, grad in statistics.grad.items()}
    values = torch.cat(list(grads.values()))
    size = values.square().mean().sqrt().clamp(min=1e-30)
    return {name: (grad / size).clamp(-1.0, 1.0) for name, grad in grads.items()}

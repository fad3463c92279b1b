"""APT: squared gate gradients plus a term for outlying weights; gates move a little every step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from prunetune.methods.masks import MASKS, MaskContext, weighed
from prunetune.methods.masks._scheduled import ScheduledMask, TriedScheduleOptions
from prunetune.model.adapters import AdapterView
from prunetune.model.gates import GateStatistics

# Prune events of the published LLaMA runs.
EVENTS = 16


class AptOptions(TriedScheduleOptions):
    """Options of the apt mask."""

    refresh: int = Field(0, ge=0, description="decide anew every so many steps; 0: up to 16 times on the way")
    decay: float = Field(0.85, ge=0, lt=1, description="of the running mean of saliences")
    kurtosis: bool = Field(True, description="add the root of the excess kurtosis of a unit's output weights")


@MASKS.register("apt")
class AptMask(ScheduledMask):
    """APT: (gate x its gradient)^2 plus the root of the weights' excess kurtosis, averaged; gates move step by step.

    A unit whose weights have outliers is kept although its average effect is small. Saliences of closed units decay;
    units are sorted anew at every event, so they may come back (arXiv 2401.12200, the form for mask gradients).

    Differences: the salience is divided by its site's mean before the kurtosis is added, because their units of measure
    have nothing to do with each other. Kurtosis is that of the consumer's weights W + s B A over what a unit writes,
    without the mean activation: of a channel it is the same number, of a KV group its dimensions count alike. Gates
    close over a share of the search (published: 0.01 a step). Adaptive ranks are ``lora.ranks: apt`` and following the
    open model is ``distill``, both with any mask.
    """

    Options = AptOptions
    paper = "arXiv 2401.12200"
    needs = "gate gradients, base weights of o and down (dequantised if quantised)"
    cost = "a pass over o and down at every decision; shape=tried: once, 5 forward passes over 1024 targets"
    reads_adapters = True

    def __init__(self, context: MaskContext, options: AptOptions):
        super().__init__(context, options)
        self._apt = options
        self.refresh = options.refresh or max(1, math.ceil(self.ramp_steps / EVENTS))
        self._mean = {site.name: torch.zeros(site.size) for site in self.sites}
        self._outliers = {site.name: torch.zeros(site.size) for site in self.sites}

    def observe(self, step: int, statistics: GateStatistics) -> None:
        decay = self._apt.decay
        for name, mean in self._mean.items():
            salience = (self._gates[name] * statistics.grad[name].cpu()).square()
            self._mean[name] = decay * mean + (1 - decay) * salience
        searched = step + 1 - self.context.phases.warmup_end
        if self._apt.kurtosis and searched >= 0 and self.decides(searched):
            assert self.context.adapters is not None
            self._outliers = {
                name: found.clamp(min=0).sqrt() for name, found in kurtosis(self.context.adapters).items()
            }

    def scores(self) -> dict[str, Tensor]:
        shares, masses = {}, {}
        for name, mean in self._mean.items():
            masses[name] = mean.sum()
            shares[name] = mean / mean.mean().clamp(min=1e-30) + self._outliers[name]
        return weighed(shares, masses)

    def state_dict(self) -> dict[str, Tensor]:
        state = {**super().state_dict(), **{f"outliers.{name}": found for name, found in self._outliers.items()}}
        return {**state, **{f"mean.{name}": mean for name, mean in self._mean.items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self._outliers = {name: state[f"outliers.{name}"].clone() for name in self._outliers}
        self._mean = {name: state[f"mean.{name}"].clone() for name in self._mean}


@torch.no_grad()
def kurtosis(adapters: AdapterView) -> dict[str, Tensor]:
    """site -> (U,) excess kurtosis of the weights with which each unit's activations are read by o or down."""
    powers: dict[str, Tensor] = {}
    for linear in adapters.linears:
        if linear.role not in ("o", "down"):
            continue
        weight_OI = linear.weight().double()
        for owner in linear.owners:
            sums = torch.stack([owner.sums(weight_OI**power) for power in range(5)]).cpu()
            powers[owner.site] = powers[owner.site] + sums if owner.site in powers else sums
    found = {}
    for site, sums in powers.items():
        one, two, three, four = sums[1:] / sums[0]
        variance = (two - one**2).clamp(min=1e-30)
        fourth = four - 4 * one * three + 6 * one**2 * two - 3 * one**4
        found[site] = (fourth / variance**2 - 3).float()
    return found

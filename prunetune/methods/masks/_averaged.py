"""Masks that rank units by a running mean of what they read off the adapters after each step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from prunetune.methods.masks import MaskContext, weighed
from prunetune.methods.masks._scheduled import LastingMask, ScheduleOptions
from prunetune.model.gates import GateStatistics


class AveragedMask(LastingMask):
    """Base of these masks.

    Args:
        decay: of the running means over optimizer steps.
    """

    needs = "adapters' gradients, base weights (dequantised if quantised)"
    reads_adapters = True

    def __init__(self, context: MaskContext, options: ScheduleOptions, decay: float):
        super().__init__(context, options)
        self._decay = decay
        self._mean = {site.name: torch.zeros(site.size) for site in self.sites}
        self._mass = {site.name: torch.zeros(()) for site in self.sites}

    @abstractmethod
    def measure(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """This step's (site -> (U,) normalised scores, site -> () mass that the site weighs against others)."""

    def observe(self, step: int, statistics: GateStatistics) -> None:
        fresh, mass = self.measure()
        # A single entry that is not finite spoils all that it was normalised with: such a step says nothing.
        if not all(bool(torch.isfinite(found).all()) for found in fresh.values()):
            return
        for name in self._mean:
            self._mean[name] = self._decay * self._mean[name] + (1 - self._decay) * fresh[name]
            self._mass[name] = self._decay * self._mass[name] + (1 - self._decay) * mass[name]

    def importance(self) -> dict[str, Tensor]:
        return weighed(self._mean, self._mass)

    def state_dict(self) -> dict[str, Tensor]:
        state = {**super().state_dict(), **{f"mass.{name}": mass for name, mass in self._mass.items()}}
        return {**state, **{f"mean.{name}": mean for name, mean in self._mean.items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self._mass = {name: state[f"mass.{name}"].clone() for name in self._mass}
        self._mean = {name: state[f"mean.{name}"].clone() for name in self._mean}

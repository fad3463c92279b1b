"""Running second moment of the gate gradients: the loss that closing a gate would cost, to second order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from prunetune.methods.masks import MASKS, MaskContext
from prunetune.methods.masks._scheduled import ScheduledMask, ScheduleOptions
from prunetune.model.gates import GateStatistics


class SaliencyOptions(ScheduleOptions):
    """Options of the saliency mask."""

    decay: float = Field(0.95, ge=0, lt=1, description="of the running mean over optimizer steps")
    moment: Literal["token", "step"] = Field(
        "token", description="square the gradient per token (Fisher information) or of the whole step"
    )


@MASKS.register("saliency")
class SaliencyMask(ScheduledMask):
    """Running second moment of the gate gradients; closed units may reopen until the freeze.

    With g the gate and l_t the loss of token t, removing a unit changes the loss by about half of
    sum_t (dl_t/dg)^2 (Theis et al., arXiv 1801.05787: the diagonal Fisher information stands in for the Hessian).
    All kinds of units are measured in that one unit.
    """

    Options = SaliencyOptions
    paper = "arXiv 1801.05787"
    record_squares = True

    def __init__(self, context: MaskContext, options: SaliencyOptions):
        super().__init__(context, options)
        self.options: SaliencyOptions = options
        self._mean = {site.name: torch.zeros(site.size) for site in self.sites}
        self._weight = torch.zeros((), dtype=torch.float64)

    def observe(self, step: int, statistics: GateStatistics) -> None:
        decay = self.options.decay
        for name, mean in self._mean.items():
            square = statistics.square[name] if self.options.moment == "token" else statistics.grad[name].square()
            self._mean[name] = decay * mean + (1 - decay) * square.cpu()
        self._weight = decay * self._weight + (1 - decay)

    def scores(self) -> dict[str, Tensor]:
        # Divided by the weight so far, so that early means are not pulled toward zero.
        weight = float(self._weight) or 1.0
        return {name: mean / weight for name, mean in self._mean.items()}

    def state_dict(self) -> dict[str, Tensor]:
        means = {f"mean.{name}": mean for name, mean in self._mean.items()}
        return {**super().state_dict(), **means, "weight": self._weight}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self._mean = {name: state[f"mean.{name}"].clone() for name in self._mean}
        self._weight = state["weight"].clone()

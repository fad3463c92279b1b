"""Running second moment of the gate gradients: the loss that closing a gate would cost, to second order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from prunetune.methods.masks import MASKS, MaskContext
from prunetune.methods.masks._scheduled import ScheduledMask, TriedScheduleOptions
from prunetune.model.gates import GateStatistics
from prunetune.model.units import LAYERS_SITE, Site, site_name

# A unit behind gates that let less than this through says nothing about itself; its score stands still.
HEARD = 0.1


class SaliencyOptions(TriedScheduleOptions):
    """Options of the saliency mask."""

    decay: float = Field(0.95, ge=0, lt=1, description="of the running mean over optimizer steps")
    moment: Literal["token", "step"] = Field(
        "token", description="square what each position adds to the gradient, or the whole step's gradient"
    )


@MASKS.register("saliency")
class SaliencyMask(ScheduledMask):
    """Running second moment of the gate gradients; closed units may reopen until the freeze.

    With g the gate and l_t the loss of token t, removing a unit changes the loss by about half of
    sum_t (dl_t/dg)^2 (Theis et al., arXiv 1801.05787: the diagonal Fisher information stands in for the Hessian).
    One backward pass gives no gradients of single tokens' losses, so what is squared is what each position adds to
    the gradient of the step's loss: the effect of the gate there on that position's token and all after it.
    All kinds of units are measured in that one unit. The gate of a hidden dimension acts wherever something is added to
    the residual stream; these places are taken as independent.
    """

    Options = SaliencyOptions
    paper = "arXiv 1801.05787"
    needs = "gate gradients per token"
    cost = "a reduction over each gated input; shape=tried: once, 5 forward passes over 1024 targets"
    record_squares = True
    ranks_hidden = True

    def __init__(self, context: MaskContext, options: SaliencyOptions):
        super().__init__(context, options)
        self.options: SaliencyOptions = options
        self._mean = {site.name: torch.zeros(site.size) for site in self.sites}
        self._weight = {site.name: torch.zeros(site.size, dtype=torch.float64) for site in self.sites}

    def observe(self, step: int, statistics: GateStatistics) -> None:
        decay = self.options.decay
        for site in self.sites:
            name, outer = site.name, self._outer(site)
            square = statistics.square[name] if self.options.moment == "token" else statistics.grad[name].square()
            heard = outer >= HEARD
            fresh = square.cpu() / outer.clamp(min=HEARD).square()
            self._mean[name] = torch.where(heard, decay * self._mean[name] + (1 - decay) * fresh, self._mean[name])
            weight = self._weight[name]
            self._weight[name] = torch.where(heard, decay * weight + (1 - decay), weight)

    def _outer(self, site: Site) -> Tensor:
        """(U,): gates that the unit's signal passes after its own: its layer's and, for a query head, its group's.

        They scale the unit's gradient. Without undoing that, units of a layer that fades out would seem worthless,
        narrowing the layer would seem free, and the planner would bring it back for that reason alone.
        """
        outer = torch.ones(site.size)
        if site.layer >= 0 and LAYERS_SITE in self._gates:
            outer = outer * self._gates[LAYERS_SITE][site.layer]
        groups = self._gates.get(site_name(site.layer, "kv_groups"))
        if site.kind == "query_heads" and groups is not None:
            outer = outer * groups.repeat_interleave(site.size // groups.numel())
        return outer

    def scores(self) -> dict[str, Tensor]:
        # Divided by the weight so far, so that early means are not pulled toward zero.
        return {
            name: (mean / torch.where(self._weight[name] > 0, self._weight[name], 1.0)).float()
            for name, mean in self._mean.items()
        }

    def state_dict(self) -> dict[str, Tensor]:
        means = {f"mean.{name}": mean for name, mean in self._mean.items()}
        return {**super().state_dict(), **means, **{f"weight.{name}": w for name, w in self._weight.items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self._mean = {name: state[f"mean.{name}"].clone() for name in self._mean}
        self._weight = {name: state[f"weight.{name}"].clone() for name in self._weight}

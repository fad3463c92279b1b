"""LoRAPrune: weights times their gradient, the gradient estimated from the adapters' alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from pydantic import Field
from torch import Tensor

from prunetune.methods.masks import MASKS, MaskContext
from prunetune.methods.masks._averaged import AveragedMask
from prunetune.methods.masks._scheduled import ScheduleOptions
from prunetune.model.adapters import AdaptedLinear


class LoraGradientOptions(ScheduleOptions):
    """Options of the lora_gradient mask; the paper's defaults."""

    fade_share: float = Field(0.0, ge=0, le=1, description="share of the search a gate takes to close; 0: at once")
    ramp_share: float = Field(0.9, gt=0, le=1, description="the budget is reached after this share of the search")
    refresh: int = Field(10, ge=1, description="cut every so many steps, and ten times in a shorter search")
    decay: float = Field(0.9, ge=0, lt=1, description="of the running mean over optimizer steps")


@MASKS.register("lora_gradient")
class LoraGradientMask(AveragedMask):
    """LoRAPrune: |weight x gradient| with the gradient estimated from the adapters; closed units stay closed.

    With gA, gB the gradients of the factors after clipping, dW = gB A + B gA - gB gA stands in for the weight's
    gradient, and a unit's importance in a module is the sum of |dW * (W + s B A)| over what it owns there. Importances
    are divided by their norm within each module, added up over the modules of a block and averaged over steps, and
    every ``refresh`` steps the lowest units of every layer leave (arXiv 2305.18403).

    Differences: units are KV groups with all their query heads (the released code pairs the wrong heads when groups
    are shared); the last cut falls on the budget itself; all layers keep one width, the first and last too; how much
    of attention and how much of the MLP leaves in the end is the planner's choice at the first cut, where a site
    weighs what its importances add up to before they are normalised: a loss, which all kinds of units share.
    """

    Options = LoraGradientOptions
    paper = "arXiv 2305.18403"
    cost = "a pass over every weight in float32"

    def __init__(self, context: MaskContext, options: LoraGradientOptions):
        super().__init__(context, options, options.decay)
        self.refresh = min(options.refresh, max(1, context.phases.search // 10))

    def measure(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        assert self.context.adapters is not None
        by_module = importance_by_module(self.context.adapters.linears)
        mass = {site.name: torch.zeros(()) for site in self.sites}
        for (site, _), sums_U in by_module.items():
            mass[site] = mass[site] + sums_U.sum()
        return normalised(by_module), mass


@torch.no_grad()
def importance_by_module(linears: Iterable[AdaptedLinear]) -> dict[tuple[str, str], Tensor]:
    """(site, module) -> (U,) float32 sums of |dW * (W + s B A)| over what each unit owns there.

    Args:
        linears: with gradients; those without an adapter are left out. One matrix exists at a time.
    """
    found: dict[tuple[str, str], Tensor] = {}
    for linear in linears:
        if not linear.adapted:
            continue
        product_OI = linear.weight_gradient().mul_(linear.weight()).abs_()
        for owner in linear.owners:
            # For whole layers a module is the same linear of all of them.
            key = (owner.site, linear.role)
            sums_U = owner.sums(product_OI).cpu()
            found[key] = found[key] + sums_U if key in found else sums_U
    return found


def normalised(by_module: Mapping[tuple[str, str], Tensor]) -> dict[str, Tensor]:
    """site -> (U,): importances of norm 1 in each module, modules added."""
    added: dict[str, Tensor] = {}
    for (site, _), sums_U in by_module.items():
        normed_U = sums_U / (torch.linalg.vector_norm(sums_U) + 1e-8)
        added[site] = added[site] + normed_U if site in added else normed_U
    return added

"""Fading to zero in batches: each period the least salient units that are left fade out for good (HESSO, LHSPG)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from pydantic import Field
from torch import Tensor

from prunetune.methods.masks import MASKS, MaskContext
from prunetune.methods.masks._averaged import AveragedMask
from prunetune.methods.masks._scheduled import ScheduleOptions
from prunetune.methods.options import MethodOptions
from prunetune.model.adapters import AdaptedLinear


class GradualZeroOptions(MethodOptions):
    """Options of the gradual_zero mask."""

    periods: int = Field(10, ge=1, description="batches of units that fade out one after the other")
    ramp_share: float = Field(0.8, gt=0, le=1, description="the last batch has gone after this share of the search")
    decay: float = Field(0.9, ge=0, lt=1, description="of the running mean of saliences over optimizer steps")


@MASKS.register("gradual_zero")
class GradualZeroMask(AveragedMask):
    """LHSPG and HESSO: in each of some periods the least salient units fade linearly to zero, and stay there.

    Salience is the sum of five scores, each divided by its norm over all units of a kind: a unit's weight norm, that
    norm over the root of its size, how well the weights agree with the descent direction, and the first- and
    second-order change of the loss without the unit (arXiv 2312.09411, 2310.18356). Weights are W + s B A, gradients
    are estimated from the adapters' (see lora_gradient).

    Differences: the fading factor is the unit's gate, not a change of W and B. So frozen weights are never written,
    quantised bases work too, and what survives learns on beside the fading in the same way. Saliences are averaged
    over steps. How far each kind narrows is the planner's choice at the first period.
    """

    Options = GradualZeroOptions
    paper = "arXiv 2312.09411, 2310.18356"
    cost = "two passes over every weight in float32"

    def __init__(self, context: MaskContext, options: GradualZeroOptions):
        super().__init__(context, ScheduleOptions(ramp_share=options.ramp_share), options.decay)
        self._periods = options.periods
        self.fade_steps = max(1.0, self.ramp_steps / options.periods)  # a period

    def decides(self, searched: int) -> bool:
        return self._period(searched) > self._period(searched - 1)

    def _period(self, searched: int) -> int:
        return math.floor(searched / self.fade_steps)

    def way(self, step: int) -> float:
        """Equal batches: what has faded when the period that begins after this step is over."""
        warmup = self.context.phases.warmup_end
        searched = step + 1 - warmup
        if searched < 0:
            return 0.0
        # Without a warm-up the first period is the one in which the first batch is found.
        late = 0 if warmup else 1
        batches = max(1, min(self._periods, int(self.ramp_steps)) - late)
        return min(1.0, max(0, self._period(searched) + 1 - late) / batches)

    def measure(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        assert self.context.adapters is not None
        sums = group_sums(self.context.adapters.linears)
        kinds: dict[str, list[str]] = {}
        for site in self.sites:
            kinds.setdefault(site.kind, []).append(site.name)
        fresh = {
            name: score for names in kinds.values() for name, score in saliences({n: sums[n] for n in names}).items()
        }
        return fresh, {name: sums[name][4].sum() for name in fresh}


@torch.no_grad()
def group_sums(linears: Iterable[AdaptedLinear]) -> dict[str, Tensor]:
    """site -> (5, U): sums over what each unit owns of x^2, g^2, x g, 1 and |x g|; x weights, g estimated gradients."""
    found: dict[str, Tensor] = {}
    for linear in linears:
        if not linear.adapted:
            continue
        x_OI, g_OI = linear.weight(), linear.weight_gradient()
        for owner in linear.owners:
            parts = (x_OI.square(), g_OI.square(), x_OI * g_OI, torch.ones_like(x_OI), (x_OI * g_OI).abs())
            sums = torch.stack([owner.sums(part) for part in parts]).cpu()
            found[owner.site] = found[owner.site] + sums if owner.site in found else sums
    return found


def saliences(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """site -> (U,) in [0, 1]: the mean of five scores, each of norm 1 over all the sites given.

    Args:
        sums: site -> (5, U) of ``group_sums``.
    """
    squares, grads, inner, count, _ = torch.cat([part.double() for part in sums.values()], dim=1)
    norm = squares.sqrt()
    agreement = (1 - inner / (norm * grads.sqrt()).clamp(min=1e-30)) / 2  # 1: a step down lengthens the weights
    scores = torch.stack([norm, norm / count.clamp(min=1).sqrt(), agreement, inner.abs(), inner.square() / 2])
    mean = (scores / torch.linalg.vector_norm(scores, dim=1, keepdim=True).clamp(min=1e-30)).mean(0).float()
    return dict(zip(sums, mean.split([part.shape[1] for part in sums.values()])))

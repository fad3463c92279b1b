"""Where learnt gates may start: from what the warm-up says about units, instead of all equal."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from prunetune.methods.masks import MaskContext
from prunetune.model.budget import plan_shape
from prunetune.model.gates import GateStatistics
from prunetune.model.planner import Planner
from prunetune.model.units import HIDDEN

# How much of what tells numbers apart at the start noise may undo in a search.
NOISE = 0.25


def steady_rate(spread: float, steps: int) -> float:
    """The largest step of a bounded gradient that leaves numbers ``spread`` apart in order, if it says nothing.

    The gradients of the units that matter most are the largest, of either sign from batch to batch, so these numbers
    walk furthest at random, sqrt(steps) steps far: with longer steps a search closes what is needed most.
    """
    return NOISE * spread / math.sqrt(max(1, steps))


class Beginning:
    """Sums the warm-up's squared gate gradients and says how far each unit is above its site's boundary.

    Args:
        context: the mask's. wanted: false begins with nothing, as a run without warm-up does.
    """

    def __init__(self, context: MaskContext, wanted: bool):
        self._planner, self._last = context.planner, context.phases.warmup_end
        self._seen = {site.name: torch.zeros(site.size) for site in context.planner.sites}
        self.over = torch.tensor(not wanted or context.phases.warmup == 0)

    def observe(self, step: int, statistics: GateStatistics) -> dict[str, Tensor] | None:
        """Takes a step's finite statistics; at the end of the warm-up, once, site -> (U,) log over the boundary."""
        if self.over:
            return None
        self._seen = {name: seen + statistics.square[name].cpu() for name, seen in self._seen.items()}
        if step + 1 < self._last:
            return None
        self.over.fill_(True)
        return above_boundary(self._planner, self._seen)

    def state_dict(self) -> dict[str, Tensor]:
        return {"begun": self.over.clone(), **{f"seen.{name}": seen.clone() for name, seen in self._seen.items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.over.copy_(state["begun"])
        self._seen = {name: state[f"seen.{name}"].clone() for name in self._seen}


def above_boundary(planner: Planner, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """site -> (U,) float32: log of each score over that between the units that would stay and those that would go."""
    arch = planner.arch
    shape = plan_shape(arch, planner.plan(scores))
    widths = {
        "mlp_channels": shape.mlp_channels,
        "kv_groups": shape.kv_groups,
        "query_heads": shape.queries_per_group * arch.kv_groups,
        "layers": shape.layers,
        HIDDEN: shape.width(arch),
    }
    return {site.name: _log_over(scores[site.name].double(), widths[site.kind]).float() for site in planner.sites}


def _log_over(scores_U: Tensor, width: int) -> Tensor:
    """(U,) log of each score over that between the best ``width`` and the others; 0 where nothing is known."""
    mean = float(scores_U.mean())
    if mean == 0.0:
        return torch.zeros_like(scores_U)
    log_U = scores_U.clamp(min=1e-6 * mean).log()
    ranked = log_U.sort(descending=True).values
    # Where all stay, the boundary is below the last: at half its score.
    below = ranked[width] if width < len(ranked) else ranked[-1] - 2 * math.log(2)
    return log_U - (ranked[width - 1] + below) / 2

"""Light-PEFT: scalar masks with an L1 penalty, and one early cut as soon as they have settled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from prunetune.methods.masks import MASKS, MaskContext
from prunetune.methods.masks._free import FreeMask, FreeOptions
from prunetune.model.gates import GateStatistics
from prunetune.model.plan import Plan

# Looks in a search. A single step hardly moves a unit to the other side, so looks at every one would settle at once.
CHECKS = 20


class LightPeftOptions(FreeOptions):
    """Options of the light_peft mask."""

    learning_rate: float = Field(0.01, gt=0, description="of the scalar masks (Adam)")
    l1: float = Field(1e-4, ge=0, description="weight of the sum of masks in the loss")
    distance: float = Field(0.1, gt=0, le=1, description="share of units whose fate may change between settled checks")
    checks: int = Field(5, ge=1, description="settled checks in a row after which the cut is decided")
    latest: float = Field(0.6, gt=0, le=1, description="settled or not, it is decided after this share of the search")
    fade_share: float = Field(0.2, gt=0, le=1, description="share of the search in which the units to go fade out")


@MASKS.register("light_peft")
class LightPeftMask(FreeMask):
    """Light-PEFT: scalar masks learn for a short while with L1, then what is to go is decided at once.

    Masks c start at 1, multiply their units and are trained with loss + l1 * sum |c| (arXiv 2406.03792). The released
    code stops after a fixed number of steps; here the plan that the masks imply is looked at after every step, and the
    cut is decided when fewer than ``distance`` of all units changed sides ``checks`` times in a row, in the manner of
    early-bird tickets (arXiv 2101.00063). From then on the masks are set aside, the units to go fade out, and the rest
    of the search is recovery with gates; the model is sliced at the freeze as always.

    Differences: ranks by c clipped at 0, not by signed values that cut a negative mask first. Deleting whole adapters
    and single ranks is ``lora.ranks: light_peft``, which goes with any mask.
    """

    Options = LightPeftOptions
    paper = "arXiv 2406.03792, 2101.00063"

    def __init__(self, context: MaskContext, options: LightPeftOptions):
        super().__init__(context, options)
        self.options = options
        self._moments = {site.name: torch.zeros(2, site.size) for site in self.sites}
        self._stays = {site.name: torch.ones(site.size) for site in self.sites}
        self._gates = {site.name: torch.ones(site.size) for site in self.sites}
        # Adam's steps, settled checks in a row, and whether the cut is decided.
        self._counts = torch.zeros(3, dtype=torch.int64)

    def gates(self, step: int) -> dict[str, Tensor]:
        return dict(self._gates) if self._counts[2] else super().gates(step)

    def penalty(self, step: int) -> Tensor:
        return self.options.l1 * torch.cat(list(self._free.values())).abs().sum()

    def learn(self, step: int, statistics: GateStatistics) -> dict[str, float]:
        changed = 0.0
        if not self._counts[2]:
            self._learn(statistics)
            searched = step + 1 - self.context.phases.warmup_end
            latest = self.progress(step, self.options.latest) == 1.0
            if latest or searched % max(1, self.context.phases.search // CHECKS) == 0:
                changed = self._look()
            if latest or self._counts[1] >= self.options.checks:
                self._counts[2] = 1
                self._gates = {name: free.clamp(0.0, 1.0) for name, free in self._free.items()}
        if self._counts[2]:
            most = 1.0 / max(1.0, self.options.fade_share * self.context.phases.search)
            for name, gate in self._gates.items():
                self._gates[name] = gate + (self._stays[name] - gate).clamp(-most, most)
        return {"units_retargeted": changed}

    def _learn(self, statistics: GateStatistics) -> None:
        """One step of Adam on loss + l1 * sum |c|."""
        self._counts[0] += 1
        steps = int(self._counts[0])
        for name, free in self._free.items():
            grad = statistics.grad[name].cpu() + self.options.l1 * torch.sign(free)
            first, second = self._moments[name]
            first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad.square()
            self._moments[name] = torch.stack([first, second])
            size = (second / (1 - 0.999**steps)).sqrt() + 1e-12
            self._free[name] = free - self.options.learning_rate * first / (1 - 0.9**steps) / size

    def _look(self) -> float:
        """Compares the plan that the masks imply now with the last; returns the share of units that changed sides."""
        plan, planner = self.context.planner.plan(self.scores()), self.context.planner
        changed = total = 0.0
        for site in self.sites:
            stays = torch.zeros(site.size)
            stays[list(plan.kept_units(planner.arch, site.layer, site.kind))] = 1.0
            changed += float((stays != self._stays[site.name]).sum())
            total += site.size
            self._stays[site.name] = stays
        self._counts[1] = self._counts[1] + 1 if changed / total < self.options.distance else 0
        return changed / total

    def scores(self) -> dict[str, Tensor]:
        return {name: self._costs[name] * free.clamp(min=0.0) for name, free in self._free.items()}

    def plan(self, origin: Mapping[str, Any]) -> Plan:
        return self.context.planner.plan(self.scores(), origin={**origin, "settled": bool(self._counts[2])})

    def state_dict(self) -> dict[str, Tensor]:
        state = {**super().state_dict(), "counts": self._counts.clone()}
        for name, moments in self._moments.items():
            state |= {f"moments.{name}": moments, f"stays.{name}": self._stays[name], f"gate.{name}": self._gates[name]}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self._counts = state["counts"].clone()
        self._moments = {name: state[f"moments.{name}"].clone() for name in self._moments}
        self._stays = {name: state[f"stays.{name}"].clone() for name in self._stays}
        self._gates = {name: state[f"gate.{name}"].clone() for name in self._gates}

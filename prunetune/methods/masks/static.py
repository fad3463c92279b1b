"""Following a plan that exists already: another run's, a one-shot criterion's, one made by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from prunetune.core.errors import BudgetError
from prunetune.methods.masks import MASKS, MaskContext, unit_params
from prunetune.methods.masks._scheduled import ScheduledMask, ScheduleOptions
from prunetune.model.budget import Budget, plan_shape
from prunetune.model.plan import Plan


class StaticOptions(ScheduleOptions):
    """Options of the static mask."""

    plan: Path = Field(description="the plan.json to follow")


@MASKS.register("static")
class StaticMask(ScheduledMask):
    """Follows a given plan: its gates fade together over the search phase."""

    Options = StaticOptions

    def __init__(self, context: MaskContext, options: StaticOptions):
        super().__init__(context, options)
        planner = context.planner
        self._plan = Plan.load(options.plan)
        self._plan.check(planner.arch)
        shape = plan_shape(planner.arch, self._plan)
        cost = planner.budget.cost(planner.arch, shape)
        if cost > planner.budget.limit:
            needs = Budget(planner.budget.metric, cost, planner.budget.dtype).show()
            raise BudgetError(
                f"mask.plan {options.plan} keeps {needs}, more than the target of {planner.budget.show()}; "
                "set the target to what the plan keeps, or follow another plan"
            )

    def aim_plan(self, way: float) -> Mapping[str, tuple[int, ...]]:
        return self._plan.kept if way > 0 else {}

    def scores(self) -> dict[str, Tensor]:
        costs, found = unit_params(self.context.planner), {}
        for site in self.sites:
            score = torch.zeros(site.size)
            score[list(self._plan.kept.get(site.name, range(site.size)))] = costs[site.kind]
            found[site.name] = score
        return found

    def plan(self, origin: Mapping[str, Any]) -> Plan:
        return Plan(self._plan.kept, self._plan.architecture, {**self._plan.origin, **origin})

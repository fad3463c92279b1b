"""Following a plan that exists already: another run's, a one-shot criterion's, one made by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from prunetune.core.errors import BudgetError, PlanMismatchError
from prunetune.methods.masks import MASKS, MaskContext, unit_params
from prunetune.methods.masks._scheduled import ScheduledMask, ScheduleOptions
from prunetune.methods.options import MethodOptions
from prunetune.model.budget import Budget, plan_shape
from prunetune.model.legality import heads_legal
from prunetune.model.plan import Plan
from prunetune.model.planner import Planner
from prunetune.model.units import kind_size, parse_site


class StaticOptions(MethodOptions):
    """Options of the static mask."""

    plan: Path = Field(description="the plan.json to follow")
    fade_share: float = Field(0.2, gt=0, le=1, description="the gates close in this share of the search")


@MASKS.register("static")
class StaticMask(ScheduledMask):
    """Follows a given plan: its gates fade together over the search phase."""

    Options = StaticOptions
    needs = "a plan.json"
    ranks_hidden = True

    def __init__(self, context: MaskContext, options: StaticOptions):
        super().__init__(context, ScheduleOptions(fade_share=options.fade_share))
        planner = context.planner
        self._plan = Plan.load(options.plan)
        self._plan.check(planner.arch)
        _require_followable(options.plan, self._plan, planner)

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


def _require_followable(path: Path, plan: Plan, planner: Planner) -> None:
    arch = planner.arch
    removed = {parse_site(name)[1] for name in plan.kept if len(plan.kept[name]) < kind_size(arch, parse_site(name)[1])}
    beyond = sorted(removed - set(planner.target.units))
    if beyond:
        raise PlanMismatchError(
            f"mask.plan {path} removes {', '.join(beyond)}, which target.units ({', '.join(planner.target.units)}) "
            "does not allow; add them to target.units, or follow another plan"
        )
    shape = plan_shape(arch, plan)
    if not heads_legal(arch, shape.query_heads, shape.hidden):
        raise BudgetError(
            f"mask.plan {path} keeps {shape.query_heads} query heads, which a {arch.model_type} config refuses because "
            f"they do not divide hidden_size {shape.width(arch)}; follow another plan"
        )
    cost = planner.budget.cost(arch, shape)
    if cost > planner.budget.limit:
        needs = Budget(planner.budget.metric, cost, planner.budget.dtype).show()
        raise BudgetError(
            f"mask.plan {path} keeps {needs}, more than the target of {planner.budget.show()}; "
            "set the target to what the plan keeps, or follow another plan"
        )

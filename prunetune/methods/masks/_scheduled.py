"""Masks whose gates follow a schedule: a cubic ramp of the budget, a soft fade toward the current plan."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import astuple
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from prunetune.core.errors import DataError
from prunetune.methods.masks import Mask, MaskContext, finite
from prunetune.methods.options import MethodOptions
from prunetune.model.budget import Shape, full_shape, plan_shape
from prunetune.model.gates import GateStatistics
from prunetune.model.plan import Plan


class ScheduleOptions(MethodOptions):
    """How fast gates close."""

    fade_share: float = Field(0.2, gt=0, le=1, description="a gate needs this share of the search to close or open")
    ramp_share: float = Field(0.8, gt=0, le=1, description="the budget is reached after this share of the search")
    refresh: int = Field(1, ge=1, description="decide anew every so many steps")


class TriedScheduleOptions(ScheduleOptions):
    """How fast gates close, and how far.

    Scores of units add up, what many removed units cost together does not, so sums of scores say little about how much
    attention is worth how many MLP channels. When the warm-up is over, some legal shapes are tried on training rows.
    What is to leave beside MLP channels then leaves at once, and MLP channels follow the ramp of the budget. For masks
    whose scores are good by then: of a model that is cut at random no shape says anything.
    """

    shape: Literal["tried", "scored"] = Field(
        "tried",
        description="which legal widths: tried on training rows when the warm-up ends, or by the score that leaves",
    )


class ScheduledMask(Mask):
    """Base of the masks that rank units by a score of their own.

    The budget on the way follows 1 - (1 - p)^3 (Zhu & Gupta, arXiv 1710.01878): fast early, slow late. Each step
    moves every gate by a fixed amount toward the current plan (0 or 1), so a closed unit may reopen until the
    freeze if its score recovers.
    """

    Options: ClassVar[type[MethodOptions]] = ScheduleOptions

    def __init__(self, context: MaskContext, options: ScheduleOptions):
        super().__init__(context, options)
        search = context.phases.search
        self.refresh = options.refresh
        self.ramp_steps = max(1.0, options.ramp_share * search)  # until the budget is reached
        self.fade_steps = max(1.0, options.fade_share * search)  # until a gate has closed
        self._gates = {site.name: torch.ones(site.size) for site in self.sites}
        self._target = {site.name: torch.ones(site.size) for site in self.sites}
        self._tried = _tried(options)
        self._final: Shape | None = None  # the shape to end with, once that is settled

    @abstractmethod
    def scores(self) -> dict[str, Tensor]: ...

    def trial(self, step: int) -> list[Plan]:
        # Without a warm-up nothing is known about units yet.
        if not self._tried or step == 0 or step != self.context.phases.warmup_end:
            return []
        return self.context.planner.alternatives(self.scores())

    @classmethod
    def tries_shapes(cls, options: Mapping[str, Any]) -> bool:
        return _tried(cls.Options.model_validate(options))

    def settle(self, shape: Shape) -> None:
        self._final = shape

    def way(self, step: int) -> float:
        """How far from dense (0) to the budget (1) the gates should be heading at this step."""
        start = self.context.phases.warmup_end
        if step < start:
            return 0.0
        progress = min(1.0, (step + 1 - start) / self.ramp_steps)
        return 1.0 - (1.0 - progress) ** 3

    def gates(self, step: int) -> dict[str, Tensor]:
        return dict(self._gates)

    def after_backward(self, step: int, statistics: GateStatistics) -> dict[str, float]:
        if not finite(statistics):
            return {}
        self.observe(step, statistics)
        searched = step + 1 - self.context.phases.warmup_end
        if searched < 0:
            return {}
        changed = 0.0
        if self.decides(searched):
            changed = self._aim(self.way(step))
        self._move()
        return {"units_retargeted": changed}

    def decides(self, searched: int) -> bool:
        """Whether the plan is looked at anew after this many search steps."""
        # However rarely it decides, it does so when the ramp ends: the gates must get to the budget.
        return searched % self.refresh == 0 or searched == math.ceil(self.ramp_steps)

    def observe(self, step: int, statistics: GateStatistics) -> None:
        """Takes the step's finite statistics into the scores; masks that need none leave this out."""

    def _aim(self, way: float) -> float:
        """Points the gates at the plan for this part of the way; returns the share of units that changed."""
        kept = self.aim_plan(way)
        changed = total = 0.0
        for site in self.sites:
            target = torch.ones(site.size)
            if site.name in kept:
                target.zero_()
                target[torch.from_numpy(np.asarray(kept[site.name]))] = 1.0
            elif site.layer >= 0 and "layers" in kept and site.layer not in kept["layers"]:
                # The layer's own gate closes it; its inner gates keep collecting scores, open.
                target = self._target[site.name]
            changed += float((target != self._target[site.name]).sum())
            total += site.size
            self._target[site.name] = target
        return changed / total

    def aim_plan(self, way: float) -> Mapping[str, tuple[int, ...]]:
        """site -> units that stay at this part of the way."""
        return self.context.planner.plan(self.scores(), way=way, aligned=way == 1.0, shape=self._final).kept

    def plan(self, origin: Mapping[str, Any]) -> Plan:
        return self.context.planner.plan(self.scores(), shape=self._final, origin=origin)

    def _move(self) -> None:
        step = 1.0 / self.fade_steps
        for name, gate in self._gates.items():
            distance = self._target[name] - gate
            self._gates[name] = gate + distance.clamp(-step, step)

    def state_dict(self) -> dict[str, Tensor]:
        state = {f"gate.{name}": gate for name, gate in self._gates.items()}
        final = torch.tensor(astuple(self._final) if self._final else (), dtype=torch.int64)
        return {**state, **{f"target.{name}": target for name, target in self._target.items()}, "final": final}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._gates = {name: state[f"gate.{name}"].clone() for name in self._gates}
        self._target = {name: state[f"target.{name}"].clone() for name in self._target}
        self._final = Shape(*state["final"].tolist()) if state["final"].numel() else None
        if self._final not in (None, *self.context.planner.candidates):
            raise DataError(
                f"the checkpoint has settled on {self._final}, which is no shape of this target "
                f"({self.context.planner.budget.show()}); resume with the target that it was made with, or start anew"
            )


def _tried(options: MethodOptions) -> bool:
    return isinstance(options, TriedScheduleOptions) and options.shape == "tried"


class LastingMask(ScheduledMask):
    """Base of the masks whose closed units stay closed.

    The final shape is chosen at the first decision and every width falls steadily to its own: were the shape chosen
    anew, a group that leaves would make room for channels that had left before.
    """

    @abstractmethod
    def importance(self) -> dict[str, Tensor]:
        """site -> (U,) scores as if all units were open."""

    def scores(self) -> dict[str, Tensor]:
        # What a closed unit's gradients say is not about the unit any more.
        return {name: score * self._target[name] for name, score in self.importance().items()}

    def aim_plan(self, way: float) -> Mapping[str, tuple[int, ...]]:
        planner = self.context.planner
        if self._final is None:
            self._final = plan_shape(planner.arch, planner.plan(self.scores()))
        pairs = zip(astuple(full_shape(planner.arch)), astuple(self._final))
        widths = (now - math.floor(way * (now - last)) for now, last in pairs)
        return planner.plan(self.scores(), shape=Shape(*widths)).kept

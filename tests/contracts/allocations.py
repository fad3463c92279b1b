"""Small problems for allocations, and a judge that needs no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prunetune.config.schema import TargetConfig
from prunetune.methods.allocation import AllocationProblem
from prunetune.methods.allocation._problem import problem_of
from prunetune.model.planner import Planner
from tests.support import tiny_arch


class SumJudge:
    """Divergence is the sum of the importances of the units that left; layers in the middle change their input least.

    Args:
        importance: site -> (U,), at least 0.
    """

    def __init__(self, importance: Mapping[str, np.ndarray], layers: int):
        self.importance, self.layers, self.calls = importance, layers, 0

    def divergence(self, kept: Mapping[str, Sequence[int]], share: float = 1.0, *, symmetric: bool = False) -> float:
        self.calls += 1
        gone = {name: np.delete(self.importance[name], list(indices)) for name, indices in kept.items()}
        return float(sum(values.sum() for values in gone.values()))

    def block_change(self, kept: Mapping[str, Sequence[int]]) -> np.ndarray:
        return np.abs(np.arange(self.layers) - self.layers / 2) + 0.1


def tiny_problem(
    units: Sequence[str] = ("mlp_channels", "kv_groups"),
    kept: float = 0.6,
    seed: int = 0,
    scores: Mapping[str, np.ndarray] | None = None,
    layers: int = 4,
    align: int = 8,
    **changes: Any,
) -> AllocationProblem:
    """A problem on a tiny llama; ``changes`` are further arguments of ``problem_of``."""
    arch = tiny_arch(num_hidden_layers=layers)
    planner = Planner(arch, TargetConfig(kept=kept, units=tuple(units), align=align))
    draw = np.random.default_rng(seed)
    given = dict(scores) if scores is not None else {s.name: draw.gamma(1.0, 1.0, s.size) for s in planner.sites}
    judge = SumJudge(given, layers)
    return problem_of(planner, given, **{"measure": "loss", "judge": judge, **changes})

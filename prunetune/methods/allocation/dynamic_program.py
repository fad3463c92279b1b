"""The cheapest sum of per-site losses, found exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field
from rich.progress import track

from prunetune.core.console import console
from prunetune.methods.allocation import ALLOCATIONS, Allocation, AllocationProblem, Counts, Place, Vector, fill
from prunetune.methods.options import MethodOptions

# Budgets are counted in steps of the costs' largest common divisor, or coarser, so that there are at most so many.
_MOST_STATES = 20_000


class DynamicProgramOptions(MethodOptions):
    """Options of dynamic_program."""

    distortion: Literal["output", "score"] = Field(
        "output", description="measure what narrowing one site does to the output, or add up the scores that leave"
    )
    grid: int = Field(6, ge=2, description="widths per site that are measured")
    share: float = Field(0.25, gt=0, le=1, description="of the rows kept for judging that a width is measured on")


@ALLOCATIONS.register("dynamic_program")
class DynamicProgram(Allocation):
    """The widths with the least sum of per-site distortions inside the budget, by dynamic programming.

    Distortions of sites that are narrowed together nearly add up (to first order, for independent errors). Each site is
    narrowed alone to every width of a grid, and the KL divergence from the dense model is measured.
    """

    Options = DynamicProgramOptions
    paper = "arXiv 2308.10438"
    needs = "scores, the model's output (distortion: output)"
    cost = "loads the whole model; sites * (grid - 1) forward passes of a share of the rows kept for judging"

    def __init__(self, options: DynamicProgramOptions):
        super().__init__(options)
        self.options: DynamicProgramOptions = options
        self.needs_model = options.distortion == "output"

    def counts(self, problem: AllocationProblem) -> Counts:
        grids = [self._grid(place) for place in problem.places]
        if self.needs_model:
            places = track(list(zip(problem.places, grids)), "narrowing sites", console=console(), transient=True)
            curves = [self._measured(problem, place, grid) for place, grid in places]
        else:
            curves = [problem.lost(place)[list(grid)] for place, grid in zip(problem.places, grids)]
        prices = [[place.cost * n for n in grid] for place, grid in zip(problem.places, grids)]
        chosen = cheapest(prices, curves, problem.budget)
        counts = {place.name: grid[i] for place, grid, i in zip(problem.places, grids, chosen)}
        return fill(problem, counts, {place.name: float(counts[place.name]) for place in problem.places})

    def _grid(self, place: Place) -> tuple[int, ...]:
        """Widths in even steps, the smallest and the full one among them."""
        if not self.needs_model or len(place.choices) <= self.options.grid:
            return place.choices
        spots = np.linspace(0, len(place.choices) - 1, self.options.grid).round().astype(int)
        return tuple(place.choices[spot] for spot in spots)

    def _measured(self, problem: AllocationProblem, place: Place, grid: Sequence[int]) -> Vector:
        assert problem.judge is not None
        share = self.options.share
        narrow = (problem.judge.divergence({place.name: problem.best(place, n)}, share) for n in grid[:-1])
        return np.array([*narrow, 0.0])  # the last one is the full width


def cheapest(prices: Sequence[Sequence[int]], losses: Sequence[Vector], budget: int) -> list[int]:
    """One index a list, so that the losses add up to the least while the prices stay within the budget.

    What is dearer than a list's smallest price is counted in units of the largest common divisor; if that makes too
    many states, in coarser units, rounded up, so that the budget holds. Among equal sums the higher index of the last
    list is taken, then of those before it.

    Raises:
        ValueError: even the smallest prices are beyond the budget.
    """
    least = [min(row) for row in prices]
    room = budget - sum(least)
    if room < 0:
        raise ValueError("the smallest choices together are beyond the budget")
    extra = [[price - low for price in row] for row, low in zip(prices, least)]
    unit = max(math.gcd(*(price for row in extra for price in row)), -(-room // _MOST_STATES), 1)
    states = room // unit
    best = np.zeros(states + 1)
    chosen: list[np.ndarray] = []
    for row, loss in zip(extra, losses):
        found = np.full(states + 1, np.inf)
        index_S = np.zeros(states + 1, dtype=np.int32)
        for index, price in enumerate(row):
            step = -(-price // unit)
            if step > states:
                continue
            here = np.full(states + 1, np.inf)
            here[step:] = best[: states + 1 - step] + float(loss[index])
            better = here <= found
            found[better], index_S[better] = here[better], index
        best = found
        chosen.append(index_S)
    state, picks = states, list[int]()
    for row, index_S in zip(reversed(extra), reversed(chosen)):
        picks.append(int(index_S[state]))
        state -= -(-row[picks[-1]] // unit)
    return picks[::-1]

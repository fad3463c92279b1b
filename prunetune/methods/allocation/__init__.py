"""Allocations: how a budget is spread over sites, given the scores of their units. One file is one method.

An allocation may give every layer its own width. Stock model classes have one width for all layers, so what is cut is
the nearest uniform shape (``uniform_widths``): of an allocation's decision the balance between attention, MLP and depth
survives, not which layer is wider.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from prunetune.core.errors import Problem
from prunetune.core.registry import Registry
from prunetune.methods.judging import Judge, Measure
from prunetune.methods.options import MethodOptions, parse_options, problems_of

Vector = NDArray[np.float64]
Counts = dict[str, int]
ATTENTION = ("kv_groups", "query_heads")


@dataclass(frozen=True)
class Place:
    """One site as an allocation sees it.

    Args:
        name, kind, size: of the site. cost: what one unit takes of the budget.
        choices: the legal numbers of units that stay, ascending; the last is ``size``.
        groups: consecutive runs of units of which each keeps the same number (query heads in their KV groups).
    """

    name: str
    kind: str
    size: int
    cost: int
    choices: tuple[int, ...]
    groups: int = 1


@dataclass(frozen=True)
class AllocationProblem:
    """What has to be decided.

    Args:
        places: the sites.
        scores: site -> (U,) float64, higher = keep.
        budget: what the units that stay may cost together.
        uniform: the legal uniform shapes inside the budget: site -> count, the same for all sites of a kind.
        measure: how scores of different sites compare.
        balance: fraction removed from MLPs over that removed from attention, if the score fixes it.
        seed: of the run.
        judge: the model; None if the method said that it needs none.
    """

    places: tuple[Place, ...]
    scores: Mapping[str, Vector]
    budget: int
    uniform: tuple[Counts, ...]
    measure: Measure = "loss"
    balance: float | None = None
    seed: int = 0
    judge: Judge | None = None

    @property
    def fraction(self) -> float:
        """Part of what the places cost in all that the budget lets stay."""
        return min(1.0, self.budget / sum(place.cost * place.size for place in self.places))

    def cost(self, counts: Mapping[str, int]) -> int:
        """What these counts cost together."""
        return sum(place.cost * counts[place.name] for place in self.places)

    def kept(self, counts: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """The best units of every site that loses some."""
        return {
            place.name: self.best(place, counts[place.name]) for place in self.places if counts[place.name] < place.size
        }

    def best(self, place: Place, count: int) -> tuple[int, ...]:
        """Indices of a site's best ``count`` units, sorted; among equals the lower index stays."""
        scores_GU = self.scores[place.name].reshape(place.groups, -1)
        order_GU = np.argsort(-scores_GU, axis=1, kind="stable")[:, : count // place.groups]
        first_G = np.arange(place.groups)[:, None] * scores_GU.shape[1]
        return tuple(int(index) for index in np.sort((order_GU + first_G).ravel()))

    def ranks(self, place: Place) -> Vector:
        """(U,) scores made comparable over sites: per parameter, over the site's mean, or as they are."""
        scores = self.scores[place.name]
        if self.measure == "loss":
            return scores / place.cost
        if self.measure == "standard":
            return scores
        return scores / max(float(scores.mean()), np.finfo(np.float64).tiny)

    def lost(self, place: Place, scores: Vector | None = None) -> Vector:
        """(U + 1,) what keeping the best n units loses of a site's ranks, weighed by parameters, for n = 0..U."""
        values = -np.sort(-(self.ranks(place) if scores is None else scores), kind="stable") * place.cost
        return np.concatenate([np.cumsum(values[::-1])[::-1], [0.0]])


class Allocation(ABC):
    """A way to spread a budget.

    Args:
        options: the method's own options.
    """

    Options: ClassVar[type[MethodOptions]] = MethodOptions
    paper: ClassVar[str] = ""
    # Whether it runs the whole model (``problem.judge``), and what that costs.
    needs_model: bool = False
    needs: ClassVar[str] = "scores"
    cost: ClassVar[str] = "nothing"

    def __init__(self, options: MethodOptions):
        self.options = options

    @abstractmethod
    def counts(self, problem: AllocationProblem) -> Counts:
        """site -> units that stay: one of the site's choices each, within the budget together."""

    def remarks(self) -> list[str]:
        """Sentences about the last decision, for the person."""
        return []


ALLOCATIONS: Registry[type[Allocation]] = Registry("allocation", "prunetune.methods.allocation")


def build_allocation(method: str, options: Mapping[str, Any]) -> Allocation:
    """The allocation called ``method``; raises ConfigError for unknown names, options and values."""
    kind = ALLOCATIONS.get(method)
    return kind(parse_options("allocation", method, kind.Options, options))


def check_allocation(method: str, options: Mapping[str, Any]) -> list[Problem]:
    """The problems that ``build_allocation`` would raise."""
    return problems_of(lambda: build_allocation(method, options))


def uniform_widths(problem: AllocationProblem, counts: Mapping[str, int]) -> int:
    """Index in ``problem.uniform`` of the shape whose balance between kinds is nearest to the counts'.

    The distance is the parameters that would have to move between kinds; of equally near shapes the larger one.
    """

    def distance(shape: Mapping[str, int]) -> tuple[int, int]:
        moved: dict[str, int] = {}
        for place in problem.places:
            change = place.cost * (shape[place.name] - counts[place.name])
            moved[place.kind] = moved.get(place.kind, 0) + change
        return sum(map(abs, moved.values())), -problem.cost(shape)

    return min(range(len(problem.uniform)), key=lambda index: distance(problem.uniform[index]))


def fill(problem: AllocationProblem, counts: Counts, wanted: Mapping[str, float]) -> Counts:
    """Gives what is left of the budget away, step by step, to the site furthest below what it should have.

    Args:
        counts: legal choices within the budget.
        wanted: site -> units that it should have.
    """
    counts = dict(counts)
    while True:
        left = problem.budget - problem.cost(counts)
        open_ = [
            (counts[place.name] - wanted[place.name]) * place.cost
            if (step := _next(place, counts[place.name])) and step * place.cost <= left
            else np.inf
            for place in problem.places
        ]
        best = int(np.argmin(open_))
        if open_[best] == np.inf:
            return counts
        counts[problem.places[best].name] += _next(problem.places[best], counts[problem.places[best].name])


def _next(place: Place, count: int) -> int:
    """Units up to the next larger choice; 0 if there is none."""
    place_in = place.choices.index(count) + 1
    return place.choices[place_in] - count if place_in < len(place.choices) else 0


def rounded(problem: AllocationProblem, wanted: Mapping[str, float]) -> Counts:
    """The legal counts just below what is wanted, and then what is left of the budget given away."""
    counts = {
        place.name: max((n for n in place.choices if n <= wanted[place.name] + 1e-9), default=place.choices[0])
        for place in problem.places
    }
    # A site cannot have less than its first choice, which may take more than was meant for it.
    while problem.cost(counts) > problem.budget:
        over = [
            (counts[p.name] - wanted[p.name]) * p.cost if counts[p.name] > p.choices[0] else -np.inf
            for p in problem.places
        ]
        place = problem.places[int(np.argmax(over))]
        counts[place.name] = place.choices[place.choices.index(counts[place.name]) - 1]
    return fill(problem, counts, wanted)


def spread(problem: AllocationProblem, weights: Sequence[float], least: float = 0.0) -> Counts:
    """Kept fractions in proportion to weights, held between ``least`` and 1, so that the budget is met.

    Args:
        weights: one a place, at least 0.
        least: no site keeps a smaller fraction.
    """
    sizes = np.array([place.size for place in problem.places], dtype=np.float64)
    costs = np.array([place.cost for place in problem.places], dtype=np.float64)
    weights_P = np.asarray(weights, dtype=np.float64)
    low, high = 0.0, 1.0 / max(float(weights_P[weights_P > 0].min(initial=1.0)), 1e-12)
    for _ in range(100):
        level = (low + high) / 2
        fractions = np.clip(level * weights_P, least, 1.0)
        low, high = (level, high) if float((fractions * sizes * costs).sum()) <= problem.budget else (low, level)
    fractions = np.clip(low * weights_P, least, 1.0)
    return rounded(problem, {place.name: f * place.size for place, f in zip(problem.places, fractions)})

"""One threshold for all units."""

from __future__ import annotations

import heapq

from prunetune.methods.allocation import (
    ALLOCATIONS,
    Allocation,
    AllocationProblem,
    Counts,
    fill,
)
from prunetune.methods.allocation.uniform import wanted_by_kind


@ALLOCATIONS.register("global_threshold")
class GlobalThreshold(Allocation):
    """One ranking of all units: losses per parameter, standardised scores as they are, others over their site's mean.

    Weighing by cost is what FLAP does with a head's 4/3 head_dim channels (arXiv 2312.11983), generalised to grouped
    queries. Where the score fixes the balance between attention and MLP, each side has a ranking of its own
    (arXiv 2509.14230). Every site keeps at least its smallest legal width.
    """

    paper = "arXiv 2312.11983"

    def counts(self, problem: AllocationProblem) -> Counts:
        counts = {place.name: place.choices[0] for place in problem.places}
        budgets = self._budgets(problem)
        for kinds, budget in budgets:
            self._take(problem, kinds, budget, counts)
        wanted = {place.name: float(place.size) for place in problem.places}
        return fill(problem, counts, wanted)

    def _budgets(self, problem: AllocationProblem) -> list[tuple[set[str], float]]:
        """(kinds that are ranked together, what they may cost)."""
        kinds = sorted({place.kind for place in problem.places})
        if problem.balance is None or len(kinds) == 1:
            return [(set(kinds), problem.budget)]
        fraction = wanted_by_kind(problem)
        sides = [[place for place in problem.places if place.kind == kind] for kind in kinds]
        wanted = [fraction[kind] * sum(p.cost * p.size for p in side) for kind, side in zip(kinds, sides)]
        # Where the balance wants less of a side than its smallest widths take, the other has to do without that.
        least = [sum(p.cost * p.choices[0] for p in side) for side in sides]
        return [
            ({kind}, min(max(own, low), problem.budget - (sum(least) - low)))
            for kind, own, low in zip(kinds, wanted, least)
        ]

    @staticmethod
    def _take(problem: AllocationProblem, kinds: set[str], budget: float, counts: Counts) -> None:
        """Takes steps in the order of their mean rank while they fit."""
        places = [place for place in problem.places if place.kind in kinds]
        ranked = {place.name: sorted(problem.ranks(place), reverse=True) for place in places}
        left = budget - sum(place.cost * counts[place.name] for place in places)
        heap: list[tuple[float, int]] = []

        def push(index: int) -> None:
            place = places[index]
            have = counts[place.name]
            following = next((n for n in place.choices if n > have), None)
            if following is not None:
                step = ranked[place.name][have:following]
                heapq.heappush(heap, (-sum(step) / len(step), index))

        for index in range(len(places)):
            push(index)
        while heap:
            _, index = heapq.heappop(heap)
            place = places[index]
            following = next(n for n in place.choices if n > counts[place.name])
            price = place.cost * (following - counts[place.name])
            if price <= left:
                left -= price
                counts[place.name] = following
                push(index)

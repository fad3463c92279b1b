"""The same fraction everywhere."""

from __future__ import annotations

from collections.abc import Mapping

from prunetune.methods.allocation import ALLOCATIONS, ATTENTION, Allocation, AllocationProblem, Counts


@ALLOCATIONS.register("uniform")
class Uniform(Allocation):
    """The same fraction of every site (or the score's own balance between attention and MLP), as near as is legal.

    KV groups and query heads are few, so they are rounded up and MLP channels pay: of three groups half is two. Rounded
    to the nearest, a model of three groups kept one at 50% and had twice the perplexity after training.
    """

    def counts(self, problem: AllocationProblem) -> Counts:
        wanted = wanted_by_kind(problem)

        def rank(shape: Mapping[str, int]) -> tuple[float, float, int]:
            more = [(p, shape[p.name] - wanted[p.kind] * p.size) for p in problem.places]
            short = sum(p.cost * max(0.0, -units) for p, units in more if p.kind in ATTENTION)
            away = sum(p.cost * abs(units) for p, units in more)
            return short, away, -problem.cost(shape)

        nearest = min(range(len(problem.uniform)), key=lambda index: rank(problem.uniform[index]))
        return dict(problem.uniform[nearest])


def wanted_by_kind(problem: AllocationProblem) -> dict[str, float]:
    """kind -> fraction that stays, so that the budget is met.

    With a balance b, MLPs lose b times the fraction that attention loses (arXiv 2509.14230).
    """
    kinds = {place.kind for place in problem.places}
    sizes = {kind: sum(p.cost * p.size for p in problem.places if p.kind == kind) for kind in kinds}
    total = sum(sizes.values())
    removed = 1.0 - problem.budget / total
    attention = sum(sizes[kind] for kind in kinds if kind in ATTENTION)
    if problem.balance is None or attention in (0, total):
        return dict.fromkeys(kinds, 1.0 - max(0.0, removed))
    # Neither side can lose more than all it has; what one cannot give, the other does.
    mlp = min(1.0, removed * total / (total - attention + attention / problem.balance))
    rest = min(1.0, (removed * total - mlp * (total - attention)) / attention)
    return {kind: 1.0 - max(0.0, rest if kind in ATTENTION else mlp) for kind in kinds}

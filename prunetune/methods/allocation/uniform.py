"""The same fraction everywhere."""

from __future__ import annotations

from collections.abc import Mapping

from prunetune.methods.allocation import ALLOCATIONS, ATTENTION, Allocation, AllocationProblem, Counts

# What a parameter counts for that attention has less than its share, against one that anything has more or MLPs less.
LACKING = 4


@ALLOCATIONS.register("uniform")
class Uniform(Allocation):
    """The same fraction of every site (or the score's own balance between attention and MLP), as near as is legal.

    Parameters that attention lacks count for four, so its few groups are rather rounded up and MLP channels pay: of
    three groups half is two. Rounded to the nearest, such a model kept one and had twice the perplexity after training.
    """

    def counts(self, problem: AllocationProblem) -> Counts:
        wanted = wanted_by_kind(problem)

        def rank(shape: Mapping[str, int]) -> tuple[float, int]:
            more = [(p, shape[p.name] - wanted[p.kind] * p.size) for p in problem.places]
            away = sum(p.cost * abs(units) * (LACKING if p.kind in ATTENTION and units < 0 else 1) for p, units in more)
            return away, -problem.cost(shape)

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

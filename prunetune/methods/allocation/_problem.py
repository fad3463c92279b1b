"""From a planner and scores to the problem that allocations solve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from prunetune.methods.allocation import AllocationProblem, Counts, Place
from prunetune.methods.judging import Judge, Measure
from prunetune.model.budget import Shape, full_shape
from prunetune.model.legality import heads_legal
from prunetune.model.planner import Planner

_FIELDS = {
    "mlp_channels": "mlp_channels",
    "kv_groups": "kv_groups",
    "query_heads": "queries_per_group",
    "layers": "layers",
}


def problem_of(
    planner: Planner,
    scores: Mapping[str, Any],
    measure: Measure,
    *,
    balance: float | None = None,
    seed: int = 0,
    judge: Judge | None = None,
) -> AllocationProblem:
    """The problem for a planner's sites; ``uniform`` is in the order of ``planner.candidates``.

    Unit kinds whose costs multiply (layers with others, query heads with their groups) are not for allocations: a
    site's cost would depend on the others'.
    """
    arch, full = planner.arch, full_shape(planner.arch)
    whole = planner.budget.cost(arch, full)
    costs = {}
    for kind in {site.kind for site in planner.sites}:
        field = _FIELDS[kind]
        narrower = replace(full, **{field: getattr(full, field) - 1})
        # One step of queries_per_group is a head in every group; layers stand alone, the others once a layer.
        units = {"query_heads": arch.layers * arch.kv_groups, "layers": 1}.get(kind, arch.layers)
        costs[kind] = (whole - planner.budget.cost(arch, narrower)) // units
    places = tuple(
        Place(
            site.name,
            site.kind,
            site.size,
            costs[site.kind],
            _choices(planner, site.kind, site.size),
            _groups(planner, site.kind),
        )
        for site in planner.sites
    )
    fixed = whole - sum(place.cost * place.size for place in places)
    return AllocationProblem(
        places,
        {place.name: np.asarray(scores[place.name], dtype=np.float64) for place in places},
        planner.budget.limit - fixed,
        tuple(_counts(places, shape) for shape in planner.candidates),
        measure,
        balance,
        seed,
        judge,
    )


def _choices(planner: Planner, kind: str, size: int) -> tuple[int, ...]:
    arch = planner.arch
    if kind == "mlp_channels":
        align = planner.target.align
        return (*range(align, size, align), size)
    if kind == "kv_groups":
        return tuple(n for n in range(1, size + 1) if heads_legal(arch, n * arch.queries_per_group))
    if kind == "query_heads":
        groups = arch.kv_groups
        return tuple(n for n in range(groups, size + 1, groups) if heads_legal(arch, n))
    return tuple(range(1, size + 1))


def _groups(planner: Planner, kind: str) -> int:
    return planner.arch.kv_groups if kind == "query_heads" else 1


def _counts(places: tuple[Place, ...], shape: Shape) -> Counts:
    return {place.name: getattr(shape, place.kind) for place in places}

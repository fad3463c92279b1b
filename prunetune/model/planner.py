"""Scores + budget + alignment -> plan: the one place where it is decided which units stay.

Widths are uniform over layers, because such models load everywhere. Among all legal shapes inside the budget
the planner takes the one that loses the least score; scores of different kinds must share one unit of measure
(the loss that removing the unit costs). Shapes: L layers, K KV groups, G query heads a group, F MLP channels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunetune.config.schema import TargetConfig
from prunetune.core.errors import BudgetError
from prunetune.model.architecture import Architecture
from prunetune.model.budget import Budget, Shape, describe_kept, full_shape, kept_fractions
from prunetune.model.legality import heads_legal
from prunetune.model.plan import Plan
from prunetune.model.units import HIDDEN, LAYERS_SITE, Site, site_name, sites

Vector = NDArray[np.float64]


class Planner:
    """Finds plans for one model and one target.

    Args:
        arch: the dense model.
        target: the user's budget, allowed unit kinds and alignment.
        dtype: dtype of the export, for budgets in bytes.
        budget: the target's meaning, if it is not that for ``arch``.

    Raises:
        BudgetError: no legal shape meets the budget.
    """

    def __init__(self, arch: Architecture, target: TargetConfig, dtype: str = "bfloat16", budget: Budget | None = None):
        self.arch = arch
        self.target = target
        self.budget = budget or Budget.from_target(arch, target, dtype)
        self.sites: tuple[Site, ...] = sites(arch, target.units)
        self.candidates = self.shape_candidates(self.budget, target.align)
        if not self.candidates:
            raise BudgetError(self._impossible())

    def shape_candidates(self, budget: Budget, align: int) -> list[Shape]:
        """For every legal choice of the other widths the widest MLP that meets the budget."""
        widened = (self._widest_mlp(budget, align, shape) for shape in self._shapes())
        return [shape for shape in widened if shape is not None]

    def _shapes(self) -> Iterator[Shape]:
        """Every legal (layers, KV groups, queries per group, hidden width), MLPs as wide as they were."""
        full, units = full_shape(self.arch), self.target.units
        for layers in _counts(full.layers, "layers" in units):
            for groups in _counts(full.kv_groups, "kv_groups" in units):
                for queries in _counts(full.queries_per_group, "query_heads" in units):
                    for hidden in self._hidden_widths():
                        if heads_legal(self.arch, groups * queries, hidden):
                            yield Shape(layers, groups, queries, full.mlp_channels, hidden)

    def _hidden_widths(self) -> Iterable[int]:
        # Always aligned, on the way too: it is one number for the whole model, and every shape asks for all of them.
        align = self.target.align
        return (0, *range(align, self.arch.hidden_size, align)) if HIDDEN in self.target.units else (0,)

    def _widest_mlp(self, budget: Budget, align: int, shape: Shape) -> Shape | None:
        if budget.cost(self.arch, shape) <= budget.limit:
            return shape
        if "mlp_channels" not in self.target.units:
            return None
        one = budget.cost(self.arch, replace(shape, mlp_channels=1))
        step = budget.cost(self.arch, replace(shape, mlp_channels=2)) - one
        channels = (1 + (budget.limit - one) // step) // align * align
        return replace(shape, mlp_channels=channels) if channels > 0 else None

    def plan(
        self,
        scores: Mapping[str, Any],
        *,
        way: float = 1.0,
        aligned: bool = True,
        shape: Shape | None = None,
        origin: Mapping[str, Any] | None = None,
    ) -> Plan:
        """The plan that loses the least score.

        Args:
            scores: site -> (U,) finite scores, higher = keep.
            way: how far from the dense model (0) to the budget (1).
            aligned: false lets MLP widths be any number, for decisions on the way.
            shape: one of ``candidates``, if that is decided already; only which units stay is left. On the way its
                MLP is as wide as the budget allows so far.
            origin: recorded in the plan.

        Returns:
            A plan whose shape costs at most the budget.

        Raises:
            BudgetError: no shape meets the budget part of the way (cannot happen at way=1).
        """
        table = _Scores(self.arch, scores)
        if shape is not None:
            if way < 1.0:
                widest = replace(shape, mlp_channels=self.arch.mlp_channels)
                shape = self._widest_mlp(self.budget.at(self.arch, way), 1, widest) or shape
            return self._cut(table, shape, origin or {})
        if aligned and way == 1.0:
            candidates = self.candidates
        else:
            align = self.target.align if aligned else 1
            candidates = self.shape_candidates(self.budget.at(self.arch, way), align)
        if not candidates:
            raise BudgetError(self._impossible())
        return self._cut(table, self._ranked(table, candidates)[0], origin or {})

    def alternatives(self, scores: Mapping[str, Any], most: int = 4) -> list[Plan]:
        """The best plan of each of up to ``most`` legal shapes inside the budget that are no part of each other.

        First comes the best scored shape of each width of attention, then whatever else loses the least score: with
        layers or the hidden width there are hundreds of shapes, and neighbours differ little.
        """
        table = _Scores(self.arch, scores)
        ranked = self._ranked(table, self.candidates)
        firsts: dict[tuple[int, int], Shape] = {}
        for shape in ranked:
            firsts.setdefault((shape.kv_groups, shape.queries_per_group), shape)
        order = dict.fromkeys([*firsts.values(), *ranked])
        # A part of another shape could only do better than that by chance.
        wide = (shape for shape in order if not any(shape.within(other, self.arch) for other in order))
        return [self._cut(table, shape, {}) for shape in itertools.islice(wide, most)]

    def _ranked(self, table: _Scores, candidates: Iterable[Shape]) -> list[Shape]:
        # Ties (all scores equal, say) go to the larger model, then to the deeper one.
        return sorted(
            candidates, key=lambda shape: (table.lost(shape), -self.budget.cost(self.arch, shape), -shape.layers)
        )

    def _cut(self, table: _Scores, shape: Shape, origin: Mapping[str, Any]) -> Plan:
        full, kept = full_shape(self.arch), dict[str, tuple[int, ...]]()
        layers = table.best_layers(shape)
        if shape.layers < full.layers:
            kept[LAYERS_SITE] = layers
        for layer in layers:
            if shape.kv_groups < full.kv_groups:
                kept[site_name(layer, "kv_groups")] = table.best_groups(layer, shape)
            if shape.queries_per_group < full.queries_per_group:
                kept[site_name(layer, "query_heads")] = table.best_heads(layer, shape)
            if shape.mlp_channels < full.mlp_channels:
                kept[site_name(layer, "mlp_channels")] = _top(table.mlp[layer], shape.mlp_channels)
        if shape.hidden:
            kept[HIDDEN] = _top(table.hidden, shape.hidden)
        facts = {"shape": str(shape), "kept": kept_fractions(self.arch, shape), "budget": self.budget.show()}
        plan = Plan(kept, self.arch.fingerprint(), {**facts, **origin})
        plan.check(self.arch)
        return plan

    def describe(self, shape: Shape) -> str:
        """One line: the shape, the budget, both denominators."""
        return f"{shape}: {describe_kept(self.arch, shape)} (budget {self.budget.show()})"

    def _impossible(self) -> str:
        smallest = min(
            (replace(shape, mlp_channels=self._least_mlp()) for shape in self._shapes()),
            key=lambda shape: self.budget.cost(self.arch, shape),
        )
        least = Budget(self.budget.metric, self.budget.cost(self.arch, smallest), self.budget.dtype)
        return (
            f"the budget of {self.budget.show()} cannot be met: with units {', '.join(self.target.units)} and "
            f"target.align {self.target.align} the smallest legal shape is {smallest}, which is {least.show()} "
            f"({describe_kept(self.arch, smallest)}). Set a larger budget, a smaller target.align, or allow more of "
            "mlp_channels, kv_groups, query_heads, layers in target.units."
            f"{self._hidden_advice()}"
        )

    def _hidden_advice(self) -> str:
        heads = self.arch.query_heads
        if HIDDEN not in self.target.units or heads_legal(self.arch, heads, heads + 1):
            return ""
        return (
            f" A {self.arch.model_type} config wants a hidden size that its {heads} query heads divide: with "
            f"target.align {self.target.align} that is every {math.lcm(heads, self.target.align)} dimensions."
        )

    def _least_mlp(self) -> int:
        if "mlp_channels" not in self.target.units:
            return self.arch.mlp_channels
        return min(self.target.align, self.arch.mlp_channels)


def _counts(full: int, may_shrink: bool) -> range:
    return range(1, full + 1) if may_shrink else range(full, full + 1)


def _top(scores: Vector, count: int) -> tuple[int, ...]:
    """Indices of the ``count`` highest scores, sorted; among equals the lower index stays."""
    order = np.argsort(-scores, kind="stable")[:count]
    return tuple(np.sort(order).tolist())


def _kept_sums(scores: Vector) -> Vector:
    """(U+1,): sum of the n highest scores, for n = 0..U."""
    return np.concatenate([[0.0], np.cumsum(-np.sort(-scores, kind="stable"))])


@dataclass
class _Scores:
    """Scores by layer with what each width would lose. Kinds without scores lose nothing."""

    arch: Architecture
    given: Mapping[str, Any]

    def __post_init__(self) -> None:
        arch = self.arch
        self.mlp = self._layered("mlp_channels", arch.mlp_channels)
        self.kv = self._layered("kv_groups", arch.kv_groups)
        self.heads = self._layered("query_heads", arch.query_heads)
        self.layer_scores = self._vector(LAYERS_SITE, arch.layers)
        self.hidden = self._vector(HIDDEN, arch.hidden_size)
        self._hidden_sums = _kept_sums(self.hidden)
        self._mlp_sums = np.stack([_kept_sums(scores) for scores in self.mlp])
        self._attention_lost: dict[tuple[int, int], Vector] = {}

    def _vector(self, site: str, size: int) -> Vector:
        if site not in self.given:
            return np.zeros(size)
        vector = np.asarray(self.given[site], dtype=np.float64)
        if vector.shape != (size,) or not np.isfinite(vector).all():
            raise ValueError(f"scores of {site} must be {size} finite numbers")
        return vector

    def _layered(self, kind: str, size: int) -> list[Vector]:
        return [self._vector(site_name(layer, kind), size) for layer in range(self.arch.layers)]

    def _lost_within(self, layer: int, queries: int) -> Vector:
        """(K,): score of the heads that leave each group, were the group to stay."""
        heads = np.sort(self.heads[layer].reshape(self.arch.kv_groups, -1), axis=1)
        lost: Vector = heads[:, : self.arch.queries_per_group - queries].sum(axis=1)
        return lost

    def best_groups(self, layer: int, shape: Shape) -> tuple[int, ...]:
        """Groups whose removal would cost the most beyond what narrowing them costs anyway."""
        return _top(self.kv[layer] - self._lost_within(layer, shape.queries_per_group), shape.kv_groups)

    def best_heads(self, layer: int, shape: Shape) -> tuple[int, ...]:
        """The best heads of each group that stays; of groups that leave, none."""
        size = self.arch.queries_per_group
        return tuple(
            group * size + head
            for group in self.best_groups(layer, shape)
            for head in _top(self.heads[layer][group * size : (group + 1) * size], shape.queries_per_group)
        )

    def _lost_in_attention(self, shape: Shape) -> Vector:
        """(L,): score of the groups and, within the groups that stay, of the heads that leave."""
        key = (shape.kv_groups, shape.queries_per_group)
        if key not in self._attention_lost:
            lost = np.zeros(self.arch.layers)
            for layer in range(self.arch.layers):
                stays = list(self.best_groups(layer, shape))
                within = self._lost_within(layer, shape.queries_per_group)[stays].sum()
                lost[layer] = self.kv[layer].sum() - self.kv[layer][stays].sum() + within
            self._attention_lost[key] = lost
        return self._attention_lost[key]

    def _lost_by_layer(self, shape: Shape) -> Vector:
        mlp = self._mlp_sums[:, -1] - self._mlp_sums[:, shape.mlp_channels]
        return mlp + self._lost_in_attention(shape)

    def best_layers(self, shape: Shape) -> tuple[int, ...]:
        """Layers whose removal would cost the most beyond what narrowing them costs anyway."""
        return _top(self.layer_scores - self._lost_by_layer(shape), shape.layers)

    def lost(self, shape: Shape) -> float:
        """Score that leaves with this shape."""
        stays = list(self.best_layers(shape))
        narrowed = self._lost_by_layer(shape)[stays].sum()
        thinned = self._hidden_sums[-1] - self._hidden_sums[shape.hidden or -1]
        return float(narrowed + thinned + self.layer_scores.sum() - self.layer_scores[stays].sum())

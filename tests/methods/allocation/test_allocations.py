"""Each allocation against what its formula says, worked out directly."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from prunetune.config.schema import TargetConfig
from prunetune.core.errors import ConfigError
from prunetune.methods.allocation import AllocationProblem, Place, build_allocation, spread, uniform_widths
from prunetune.methods.allocation._problem import problem_of
from prunetune.methods.allocation.dynamic_program import cheapest
from prunetune.methods.allocation.pq_index import pq_index
from prunetune.methods.allocation.uniform import wanted_by_kind
from prunetune.model.budget import full_shape
from prunetune.model.planner import Planner
from tests.contracts.allocations import SumJudge, tiny_problem
from tests.support import tiny_arch


def brute_force(prices, losses, budget):
    """The least sum of losses over every combination."""
    ways = itertools.product(*(range(len(row)) for row in prices))
    inside = (way for way in ways if sum(row[i] for row, i in zip(prices, way)) <= budget)
    return min(sum(float(loss[i]) for loss, i in zip(losses, way)) for way in inside)


@pytest.mark.parametrize("seed", range(8))
def test_dynamic_program_is_the_best_of_all_combinations_on_six_layers(seed: int) -> None:
    draw = np.random.default_rng(seed)
    prices = [sorted(draw.choice(np.arange(1, 40), 4, replace=False).tolist()) for _ in range(6)]
    losses = [np.sort(draw.random(4))[::-1] for _ in range(6)]
    budget = sum(row[int(draw.integers(4))] for row in prices)
    chosen = cheapest(prices, losses, budget)
    assert sum(row[i] for row, i in zip(prices, chosen)) <= budget
    assert math.isclose(
        sum(float(loss[i]) for loss, i in zip(losses, chosen)), brute_force(prices, losses, budget), rel_tol=1e-12
    )


def test_dynamic_program_counts_in_coarser_units_without_breaking_the_budget() -> None:
    draw = np.random.default_rng(0)
    prices = [(np.sort(draw.integers(10**6, 10**8, 5)) | 1).tolist() for _ in range(6)]
    losses = [np.sort(draw.random(5))[::-1] for _ in range(6)]
    budget = sum(row[2] for row in prices)
    chosen = cheapest(prices, losses, budget)
    assert sum(row[i] for row, i in zip(prices, chosen)) <= budget
    best = brute_force(prices, losses, budget)
    assert sum(float(loss[i]) for loss, i in zip(losses, chosen)) <= best + 0.2
    assert cheapest(prices, losses, sum(row[0] for row in prices)) == [0] * 6
    with pytest.raises(ValueError, match="beyond the budget"):
        cheapest(prices, losses, prices[0][0])


def test_dynamic_program_measures_each_site_alone() -> None:
    problem = tiny_problem(layers=6, kept=0.7)
    judge = problem.judge
    assert isinstance(judge, SumJudge)
    counts = build_allocation("dynamic_program", {"grid": 4}).counts(problem)
    assert judge.calls == 6 * (3 + 2), "three narrower widths of each MLP, two of each attention"
    # The judge's divergence is the sum of what leaves, so measuring and adding up scores are one thing.
    fine = build_allocation("dynamic_program", {"grid": 99}).counts(problem)
    scores = build_allocation("dynamic_program", {"distortion": "score"}).counts(problem)
    assert fine == scores
    assert judge.divergence(problem.kept(fine)) <= judge.divergence(problem.kept(counts)) + 1e-9


def test_dynamic_program_is_nowhere_beaten_by_the_threshold() -> None:
    for seed in range(5):
        problem = tiny_problem(layers=6, seed=seed)
        lost = [
            problem.judge.divergence(problem.kept(build_allocation(name, options).counts(problem)))
            for name, options in (("dynamic_program", {"distortion": "score"}), ("global_threshold", {}))
        ]
        assert lost[0] <= lost[1] + 1e-9


def places(sizes, costs, kinds=None):
    return tuple(
        Place(f"layers.{i}.mlp_channels", (kinds or ["mlp_channels"] * len(sizes))[i], n, c, tuple(range(1, n + 1)))
        for i, (n, c) in enumerate(zip(sizes, costs))
    )


def problem_with(scores, costs, budget, **changes) -> AllocationProblem:
    found = places([len(s) for s in scores], costs)
    given = {place.name: np.array(s, dtype=float) for place, s in zip(found, scores)}
    return AllocationProblem(found, given, budget, ({p.name: 1 for p in found},), **changes)


def test_threshold_weighs_losses_by_cost() -> None:
    """The second site's units cost three times as much: 2 for 1 is better than 3 for 3."""
    problem = problem_with([[2, 2, 2], [3, 3, 3]], [1, 3], budget=6)
    assert build_allocation("global_threshold", {}).counts(problem) == {
        "layers.0.mlp_channels": 3,
        "layers.1.mlp_channels": 1,
    }
    standard = problem_with([[2, 2, 2], [3, 3, 3]], [1, 3], budget=8, measure="standard")
    assert build_allocation("global_threshold", {}).counts(standard) == {
        "layers.0.mlp_channels": 2,
        "layers.1.mlp_channels": 2,
    }


def test_threshold_brings_local_scores_to_their_sites_mean() -> None:
    scores = [[1, 2, 3], [100, 200, 300]]
    counts = build_allocation("global_threshold", {}).counts(problem_with(scores, [1, 1], 4, measure="local"))
    assert list(counts.values()) == [2, 2]
    counts = build_allocation("global_threshold", {}).counts(problem_with(scores, [1, 1], 4, measure="loss"))
    assert list(counts.values()) == [1, 3]


def test_threshold_is_the_best_set_of_units_where_all_cost_the_same() -> None:
    draw = np.random.default_rng(3)
    scores = [draw.random(10) for _ in range(5)]
    counts = build_allocation("global_threshold", {}).counts(problem_with(scores, [1] * 5, 23))
    # Every site keeps at least one unit, then the highest of all.
    firsts = sorted(scores[i].max() for i in range(5))
    rest = sorted((v for s in scores for v in np.sort(s)[:-1]), reverse=True)[: 23 - 5]
    kept = sum(np.sort(s)[::-1][:n].sum() for s, n in zip(scores, counts.values()))
    assert math.isclose(kept, sum(firsts) + sum(rest))


def test_softmax_is_uniform_when_hot_and_follows_the_energy() -> None:
    scores = {site: np.full(64, 1.0 + i) for i, site in enumerate(tiny_problem(("mlp_channels",)).scores)}
    hot, cold = (
        build_allocation("softmax", {"temperature": t}).counts(tiny_problem(("mlp_channels",), 0.7, scores=scores))
        for t in (1e6, 0.5)
    )
    assert max(hot.values()) - min(hot.values()) <= 8
    assert list(cold.values()) == sorted(cold.values())
    assert cold["layers.3.mlp_channels"] > cold["layers.0.mlp_channels"]


def test_softmax_fractions_are_in_the_proportion_of_the_formula() -> None:
    """With room everywhere, kept fractions are as exp(energy / T)."""
    problem = problem_with([np.full(1000, e) for e in (0.8, 1.0, 1.2)], [1, 1, 1], budget=1000)
    counts = build_allocation("softmax", {"temperature": 0.7}).counts(problem)
    expected = np.exp(np.array([0.8, 1.0, 1.2]) / 0.7)
    np.testing.assert_allclose(np.array(list(counts.values())) / 1000, expected / expected.sum(), atol=2e-3)


def test_spread_meets_the_budget_within_the_bounds() -> None:
    problem = problem_with([np.ones(100)] * 3, [1, 1, 1], budget=150)
    counts = spread(problem, [1, 1, 0])
    assert counts["layers.2.mlp_channels"] == 1, "never less than the smallest choice"
    assert sum(counts.values()) == 150
    counts = spread(problem, [10, 1, 1], least=0.1)
    assert counts["layers.0.mlp_channels"] == 100
    assert sum(counts.values()) == 150


def test_pq_index_of_equal_and_single_scores() -> None:
    assert pq_index(np.ones(16), 0.5, 1.0) == 0.0
    assert math.isclose(pq_index(np.eye(1, 16).ravel(), 0.5, 1.0), 1 - 1 / 16)
    assert pq_index(np.zeros(4), 0.5, 1.0) == 0.0
    w = np.array([0.1, 0.2, 0.7])
    direct = 1 - 3 ** (1 / 1.0 - 1 / 0.5) * (np.sqrt(w).sum() ** 2) / w.sum()
    assert math.isclose(pq_index(w, 0.5, 1.0), direct, rel_tol=1e-12)


def test_pq_bound_and_its_signal() -> None:
    method = build_allocation("pq_index", {})
    assert method.removable(np.ones(16)) == 0
    assert method.removable(np.eye(1, 16).ravel()) == math.floor(16 * 0.9), "one unit is enough, but 0.9 is the most"
    method.counts(problem_with([np.ones(10), np.ones(10)], [1, 1], 12))
    [said] = method.remarks()
    assert "advises to keep 100.0%" in said
    assert "stop earlier" in said
    method.counts(problem_with([[1.0] + [1e-9] * 9] * 2, [1, 1], 12))
    assert "stop earlier" not in method.remarks()[0]
    with pytest.raises(ConfigError, match="p must be less than q"):
        build_allocation("pq_index", {"p": 1.0, "q": 0.5})


def test_balance_between_attention_and_mlp() -> None:
    """MLPs lose b times the fraction that attention loses, and both together what the budget says."""
    problem = tiny_problem(kept=0.7, balance=3.0)
    wanted = wanted_by_kind(problem)
    mlp, attention = 1 - wanted["mlp_channels"], 1 - wanted["kv_groups"]
    assert math.isclose(mlp, 3.0 * attention, rel_tol=1e-9)
    removed = sum(p.cost * p.size * (1 - wanted[p.kind]) for p in problem.places)
    assert math.isclose(removed, problem.cost({p.name: p.size for p in problem.places}) - problem.budget, rel_tol=1e-9)
    even = wanted_by_kind(tiny_problem(kept=0.7))
    assert math.isclose(even["mlp_channels"], even["kv_groups"])


def test_a_balance_that_one_side_cannot_give_is_given_by_the_other() -> None:
    problem = tiny_problem(kept=0.3, balance=50.0)
    wanted = wanted_by_kind(problem)
    assert wanted["mlp_channels"] == 0.0
    kept = sum(p.cost * p.size * wanted[p.kind] for p in problem.places)
    assert math.isclose(kept, problem.budget, rel_tol=1e-9)


@pytest.mark.parametrize(
    ("kept", "groups", "channels"),
    [(0.8, 3, 1088), (0.67, 2, 1024), (0.6, 2, 832), (0.5, 2, 640), (0.34, 1, 512), (0.3, 1, 384)],
)
def test_equal_shares_rather_round_kv_groups_up_and_channels_pay(kept: float, groups: int, channels: int) -> None:
    """The shapes of SmolLM2-135M: 3 KV groups and 1536 channels in each of 30 layers. 2.4 groups are 3, 2.01 are 2."""
    arch = tiny_arch(
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        num_hidden_layers=30,
    )
    planner = Planner(arch, TargetConfig(kept=kept, units=("mlp_channels", "kv_groups")))
    problem = problem_of(planner, {site.name: np.ones(site.size) for site in planner.sites}, "loss")
    counts = build_allocation("uniform", {}).counts(problem)
    assert {counts[p.name] for p in problem.places if p.kind == "kv_groups"} == {groups}
    assert {counts[p.name] for p in problem.places if p.kind == "mlp_channels"} == {channels}


def test_feedback_spares_the_layers_that_change_their_input() -> None:
    problem = tiny_problem(("mlp_channels",), 0.7)
    counts = list(build_allocation("sensitivity_feedback", {"amplitude": 0.05}).counts(problem).values())
    assert counts[0] > counts[2], "the first layer changes its input most, the third least"
    flat = list(build_allocation("sensitivity_feedback", {"amplitude": 0}).counts(problem).values())
    assert max(flat) - min(flat) <= 8


def test_evolution_keeps_what_each_kind_has_and_never_gets_worse() -> None:
    problem = tiny_problem(layers=6, seed=4)
    start = build_allocation("evolutionary", {"generations": 0}).counts(problem)
    method = build_allocation("evolutionary", {"generations": 8, "offspring": 8})
    # The threshold is best for sums of scores; another importance leaves something to find.
    other = {site: values[::-1].copy() for site, values in problem.scores.items()}
    problem = tiny_problem(layers=6, seed=4, judge=SumJudge(other, 6))
    found = method.counts(problem)
    for kind in ("mlp_channels", "kv_groups"):
        totals = [sum(counts[p.name] for p in problem.places if p.kind == kind) for counts in (start, found)]
        assert totals[0] == totals[1]
    before, after = (problem.judge.divergence(problem.kept(counts)) for counts in (start, found))
    assert after < before
    assert f"{before:.4g} to {after:.4g}" in method.remarks()[0]


def test_best_uniform_takes_the_shape_that_costs_least() -> None:
    problem = tiny_problem(kept=0.6)
    costs = [problem.judge.divergence(problem.kept(shape)) for shape in problem.uniform]
    assert len(costs) > 1
    counts = build_allocation("best_uniform", {}).counts(problem)
    assert problem.judge.divergence(problem.kept(counts)) == min(costs)
    assert problem.uniform[uniform_widths(problem, counts)] == counts


def test_projection_keeps_the_balance_between_kinds() -> None:
    problem = tiny_problem(kept=0.6)
    for index, shape in enumerate(problem.uniform):
        moved = dict(shape)
        names = [p.name for p in problem.places if p.kind == "mlp_channels"]
        if shape[names[0]] > 8:
            moved[names[0]], moved[names[1]] = shape[names[0]] - 8, shape[names[1]] + 8
        assert uniform_widths(problem, moved) == index


def test_costs_and_budget_are_the_planner_s() -> None:
    """Every uniform shape costs in places what it costs as a shape, whatever the metric."""
    arch = tiny_arch("qwen2", tie_word_embeddings=True)
    for target in ({"kept": 0.7}, {"params": 42_000}, {"size": 80_000}):
        for units in (("mlp_channels", "kv_groups"), ("mlp_channels", "query_heads"), ("layers",)):
            planner = Planner(arch, TargetConfig(**target, units=units, align=8))
            scores = {site.name: np.ones(site.size) for site in planner.sites}
            problem = problem_of(planner, scores, "loss")
            whole = {place.name: place.size for place in problem.places}
            for shape, counts in zip(planner.candidates, problem.uniform):
                saved = problem.cost(whole) - problem.cost(counts)
                full, narrow = planner.budget.cost(arch, full_shape(arch)), planner.budget.cost(arch, shape)
                assert saved == full - narrow, (target, units)
                assert (problem.cost(counts) <= problem.budget) == (narrow <= planner.budget.limit)

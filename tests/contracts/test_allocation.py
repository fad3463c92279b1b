"""The contract of every registered allocation, found by discovery."""

from __future__ import annotations

import numpy as np
import pytest

from prunetune.methods.allocation import ALLOCATIONS, Allocation, build_allocation, check_allocation, uniform_widths
from tests.contracts.allocations import tiny_problem

NAMES = ALLOCATIONS.names()
by_name = pytest.mark.parametrize("name", NAMES)
UNITS = [("mlp_channels",), ("mlp_channels", "kv_groups"), ("mlp_channels", "query_heads"), ("layers",)]
by_units = pytest.mark.parametrize("units", UNITS, ids="+".join)
# The least that a pair of kinds can be cut to is where a balance has to give way.
BUDGETS = [(units, kept) for units in UNITS for kept in (0.55, 0.7, 0.9)] + [(UNITS[1], 0.3), (UNITS[2], 0.37)]
FAST = {"evolutionary": {"generations": 3, "offspring": 4}}


def decide(name, problem):
    return build_allocation(name, FAST.get(name, {})).counts(problem)


def test_the_methods_are_found():
    assert {
        "best_uniform",
        "dynamic_program",
        "evolutionary",
        "global_threshold",
        "pq_index",
        "sensitivity_feedback",
        "softmax",
        "uniform",
    } <= set(NAMES)


@by_name
def test_docstring_and_facts(name):
    kind = ALLOCATIONS.get(name)
    assert issubclass(kind, Allocation)
    summary = ALLOCATIONS.summary(name)
    assert summary == kind.__dict__["__doc__"].strip().splitlines()[0]
    assert 20 <= len(summary) <= 120
    assert kind.cost
    assert kind.needs
    assert build_allocation(name, {}).needs_model == ("loads the whole model" in kind.cost)
    assert all(field.description for field in kind.Options.model_fields.values())


@pytest.mark.parametrize(
    ("measure", "balance"), [("loss", None), ("loss", 3.36), ("loss", 0.3), ("local", None), ("standard", None)]
)
@pytest.mark.parametrize(("units", "kept"), BUDGETS)
@by_name
def test_counts_are_legal_and_fill_the_budget(name, units, kept, measure, balance):
    problem = tiny_problem(units, kept, measure=measure, balance=balance)
    counts = decide(name, problem)
    assert counts.keys() == {place.name for place in problem.places}
    assert all(counts[place.name] in place.choices for place in problem.places)
    left = problem.budget - problem.cost(counts)
    assert left >= 0
    steps = [
        place.cost * (min(n for n in place.choices if n > counts[place.name]) - counts[place.name])
        for place in problem.places
        if counts[place.name] < place.size
    ]
    # A uniform shape leaves what one step in every layer would take.
    assert counts in problem.uniform or all(step > left for step in steps), "no further step fits"


@by_units
@by_name
def test_the_uniform_shape_is_a_legal_one_inside_the_budget(name, units):
    problem = tiny_problem(units)
    shape = problem.uniform[uniform_widths(problem, decide(name, problem))]
    assert problem.cost(shape) <= problem.budget
    assert all(len({shape[p.name] for p in problem.places if p.kind == kind}) == 1 for kind in units)


@by_name
def test_nothing_to_remove_keeps_everything(name):
    problem = tiny_problem(kept=1.0)
    assert decide(name, problem) == {place.name: place.size for place in problem.places}


@pytest.mark.parametrize("value", [0.0, 1.0])
@by_name
def test_equal_scores_are_cut_by_index(name, value):
    scores = {site: np.full_like(values, value) for site, values in tiny_problem().scores.items()}
    problem = tiny_problem(scores=scores)
    counts = decide(name, problem)
    assert problem.cost(counts) <= problem.budget
    for site, kept in problem.kept(counts).items():
        assert kept == tuple(range(counts[site])), "lower indices stay"


@by_name
def test_deterministic_and_scores_untouched(name):
    problem = tiny_problem(seed=5)
    before = {site: values.copy() for site, values in problem.scores.items()}
    assert decide(name, problem) == decide(name, problem)
    assert all(np.array_equal(values, before[site]) for site, values in problem.scores.items())


@by_name
def test_scale_of_all_scores_decides_nothing(name):
    counts = [
        decide(name, tiny_problem(scores={s: v * f for s, v in tiny_problem(seed=2).scores.items()}))
        for f in (1.0, 4096.0)
    ]
    assert counts[0] == counts[1]


@by_name
def test_unknown_options_are_refused_with_a_suggestion(name):
    known = next(iter(ALLOCATIONS.get(name).Options.model_fields), None)
    [problem] = check_allocation(name, {f"{known or 'x'}s": 1})
    assert f"allocation.{known or 'x'}s" in str(problem)
    assert (f"did you mean {known!r}" if known else "it has no options") in str(problem)
    assert check_allocation(name, {}) == []


def test_unknown_allocations_are_refused_with_a_suggestion():
    assert "did you mean 'uniform'" in str(check_allocation("unifrom", {})[0])

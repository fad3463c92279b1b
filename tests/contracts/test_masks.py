"""The contract of every registered mask, found by discovery: a new file under methods/masks is tested here at once."""

from __future__ import annotations

import pytest
import torch

from prunetune.config.presets import PhaseSteps
from prunetune.core.errors import ConfigError
from prunetune.methods.masks import MASKS, Mask, build_mask, check_mask
from prunetune.methods.masks._scheduled import ScheduledMask
from prunetune.model.budget import plan_shape
from prunetune.model.gates import GateStatistics
from tests.contracts.masks import ALL_KINDS, PHASES, context, make, run, statistics

NAMES = MASKS.names()
SCHEDULED = [name for name in NAMES if issubclass(MASKS.get(name), ScheduledMask)]
UNIT_SETS = [("mlp_channels",), ("mlp_channels", "kv_groups"), ALL_KINDS]
by_units = pytest.mark.parametrize("units", UNIT_SETS, ids=lambda units: "+".join(units))
by_name = pytest.mark.parametrize("name", NAMES)


def snapshot(mask):
    return {name: tensor.detach().clone() for name, tensor in mask.state_dict().items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def test_the_methods_are_found():
    assert {"saliency", "hard_concrete", "static", "random"} <= set(NAMES)


@by_name
def test_docstring_and_summary(name):
    kind = MASKS.get(name)
    assert issubclass(kind, Mask)
    summary = MASKS.summary(name)
    assert summary == kind.__dict__["__doc__"].strip().splitlines()[0]
    assert summary.endswith((".", ";"))
    assert 20 <= len(summary) <= 120
    assert all(field.description for field in kind.Options.model_fields.values())


@by_units
@by_name
def test_gates_have_the_right_shape_range_and_dtype_at_every_step(name, units, tmp_path):
    mask = make(name, tmp_path, context(units))
    for step, gates in enumerate(run(mask, 0, PHASES.freeze)):
        assert gates.keys() == {site.name for site in mask.sites}
        for site in mask.sites:
            gate = gates[site.name]
            assert gate.shape == (site.size,), (step, site.name)
            assert gate.dtype == torch.float32
            assert not gate.requires_grad
            assert bool(((gate >= 0) & (gate <= 1)).all()), (step, site.name)


@by_name
def test_gates_of_a_step_are_drawn_once(name, tmp_path):
    """Recomputation, accumulation and other processes ask again and must see the same numbers."""
    mask, again = make(name, tmp_path), make(name, tmp_path)
    for step in range(PHASES.freeze):
        gates = {key: gate.clone() for key, gate in mask.gates(step).items()}
        torch.rand(7)
        assert_same(gates, mask.gates(step))
        assert_same(gates, again.gates(step))
        for one in (mask, again):
            one.after_backward(step, statistics(one, step))


@by_name
def test_global_generators_are_left_alone(name, tmp_path):
    before = torch.get_rng_state()
    run(make(name, tmp_path), 0, PHASES.freeze)
    assert torch.equal(torch.get_rng_state(), before)


@by_units
@by_name
def test_all_gates_are_open_in_warm_up(name, units, tmp_path):
    mask = make(name, tmp_path, context(units))
    history = run(mask, 0, PHASES.warmup_end + 1)
    for step in range(PHASES.warmup_end):
        assert all((gate == 1).all() for gate in history[step].values()), step
    fresh = make(name, tmp_path, context(units))
    for step in range(PHASES.warmup_end):
        assert all((gate == 1).all() for gate in fresh.eval_gates(step).values()), step
        fresh.after_backward(step, statistics(fresh, step))


@by_units
@by_name
def test_the_shape_that_did_best_in_the_trial_is_kept(name, units, tmp_path):
    mask = make(name, tmp_path, context(units))
    planner = mask.context.planner
    run(mask, 0, PHASES.warmup_end)
    plans = mask.trial(PHASES.warmup_end)
    shapes = [plan_shape(planner.arch, plan) for plan in plans]
    assert len(set(shapes)) == len(shapes) <= 4
    assert set(shapes) <= set(planner.candidates)
    assert bool(shapes) == ("shape" in MASKS.get(name).Options.model_fields)
    if not shapes:
        return
    assert MASKS.get(name).tries_shapes({})
    assert not MASKS.get(name).tries_shapes({"shape": "scored"})
    assert plans[0].kept == planner.plan(mask.scores()).kept, "first the one that the scores suggest"
    assert not any(mask.trial(step) for step in range(PHASES.freeze) if step != PHASES.warmup_end)
    assert make(name, tmp_path, context(units), shape="scored").trial(PHASES.warmup_end) == []
    for number, wanted in enumerate(shapes):
        again = make(name, tmp_path, context(units))
        run(again, 0, PHASES.warmup_end)
        assert again.trial(PHASES.warmup_end)[number].kept == plans[number].kept
        again.settle(wanted)
        for step in range(PHASES.warmup_end, PHASES.freeze):
            again.gates(step)
            again.after_backward(step, statistics(again, step))
        assert plan_shape(planner.arch, again.plan({})) == wanted
        restored = make(name, tmp_path, context(units))
        restored.load_state_dict(snapshot(again))
        assert restored.plan({}).kept == again.plan({}).kept


@by_name
def test_without_warm_up_the_first_step_is_already_search(name, tmp_path):
    mask = make(name, tmp_path, context(phases=PhaseSteps(0, 6, 8)))
    before = mask.scores()
    history = run(mask, 0, 6)
    if mask.least_search > 6:
        assert all(not torch.equal(mask.scores()[key], score) for key, score in before.items()), "it has begun to learn"
    else:
        assert any((gate < 1).any() for gate in history[-1].values())


@by_units
@by_name
def test_evaluation_gates_are_deterministic(name, units, tmp_path):
    mask = make(name, tmp_path, context(units))
    run(mask, 0, 8)
    first = {key: gate.clone() for key, gate in mask.eval_gates(8).items()}
    assert_same(first, mask.eval_gates(8))
    for site in mask.sites:
        assert first[site.name].shape == (site.size,)
        assert bool(((first[site.name] >= 0) & (first[site.name] <= 1)).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("step", [1, 7])
@pytest.mark.parametrize(
    ("name", "where"),
    [(name, "grad") for name in NAMES] + [(name, "square") for name in NAMES if MASKS.get(name).record_squares],
)
def test_statistics_that_are_not_finite_leave_the_state_alone(name, step, where, bad, tmp_path):
    mask = make(name, tmp_path)
    run(mask, 0, step)
    given = statistics(mask, step)
    getattr(given, where)["layers.1.mlp_channels"][5] = bad
    before = snapshot(mask)
    mask.after_backward(step, given)
    assert_same(snapshot(mask), before)


@by_name
def test_the_state_is_a_snapshot_of_plain_tensors(name, tmp_path):
    mask = make(name, tmp_path)
    run(mask, 0, 6)
    state = mask.state_dict()
    copies = {key: tensor.clone() for key, tensor in state.items()}
    assert all(isinstance(tensor, torch.Tensor) and not tensor.requires_grad for tensor in state.values())
    run(mask, 6, 12)
    assert_same(state, copies)


@pytest.mark.parametrize("stop", [0, 2, 3, 4, 9, 14])
@by_name
def test_a_restored_mask_has_the_same_future_to_the_bit(name, stop, tmp_path):
    whole = make(name, tmp_path)
    run(whole, 0, stop)
    state = snapshot(whole)
    future = run(whole, stop, PHASES.freeze)
    resumed = make(name, tmp_path)
    run(resumed, 0, 2)  # what it had is replaced, not mixed
    resumed.load_state_dict(state)
    for expected, found in zip(future, run(resumed, stop, PHASES.freeze), strict=True):
        assert_same(expected, found)
    assert_same(whole.scores(), resumed.scores())
    assert_same(snapshot(whole), snapshot(resumed))
    assert whole.plan({}).digest() == resumed.plan({}).digest()


@by_units
@by_name
def test_scores_are_finite_and_shaped_at_any_time(name, units, tmp_path):
    mask = make(name, tmp_path, context(units))
    for step in range(PHASES.freeze):
        for site in mask.sites:
            score = mask.scores()[site.name]
            assert score.shape == (site.size,)
            assert not score.requires_grad
            assert torch.isfinite(score).all()
            assert (score >= 0).all(), "the planner takes more of what has a score: negative scores would mislead it"
        mask.after_backward(step, statistics(mask, step, scale=10.0 ** (step - 8)))


@by_units
@by_name
def test_the_plan_is_legal_and_inside_the_budget(name, units, tmp_path):
    of = context(units)
    mask = make(name, tmp_path, of)
    run(mask, 0, PHASES.freeze)
    plan = mask.plan({"step": 15})
    plan.check(of.planner.arch)
    shape = plan_shape(of.planner.arch, plan)
    assert of.planner.budget.cost(of.planner.arch, shape) <= of.planner.budget.limit
    assert shape.mlp_channels % 8 == 0
    assert plan.origin["step"] == 15
    assert plan.digest() == mask.plan({}).digest()


@pytest.mark.parametrize(
    "phases",
    [PHASES, *(PhaseSteps(*steps) for steps in ((0, 1, 2), (1, 2, 3), (1, 4, 9), (8, 40, 80), (5, 12, 13)))],
    ids=str,
)
@by_units
@pytest.mark.parametrize("name", SCHEDULED)
def test_gates_end_at_the_plan_before_the_freeze(name, units, phases, tmp_path):
    """With scores that stand still, the last step before the freeze runs on the model that the freeze will cut out."""
    of = context(units, phases)
    mask = make(name, tmp_path, of)
    for step in range(phases.freeze):
        mask.after_backward(step, statistics(mask, 0))
    gates, plan = mask.gates(phases.freeze), mask.plan({})
    layers = plan.kept_layers(of.planner.arch)
    for site in mask.sites:
        if site.layer >= 0 and site.layer not in layers:
            continue  # closed by its layer's gate
        expected = torch.zeros(site.size)
        expected[list(plan.kept_units(of.planner.arch, site.layer, site.kind))] = 1.0
        assert torch.equal(gates[site.name], expected), site.name


@pytest.mark.parametrize("refresh", [1, 2, 7, 50])
@pytest.mark.parametrize("name", [name for name in SCHEDULED if "refresh" in MASKS.get(name).Options.model_fields])
def test_a_slow_refresh_still_ends_at_the_budget(name, refresh, tmp_path):
    mask = make(name, tmp_path, refresh=refresh)
    for step in range(PHASES.freeze):
        mask.after_backward(step, statistics(mask, 0))
    plan, gates = mask.plan({}), mask.gates(PHASES.freeze)
    for site in mask.sites:
        kept = set(plan.kept.get(site.name, range(site.size)))
        assert set(torch.nonzero(gates[site.name]).flatten().tolist()) == kept, site.name


@pytest.mark.parametrize("name", SCHEDULED)
def test_kept_shrinks_steadily(name, tmp_path):
    mask = make(name, tmp_path)
    open_ = []
    for step in range(PHASES.freeze):
        open_.append(sum(float(gate.sum()) for gate in mask.gates(step).values()))
        mask.after_backward(step, statistics(mask, 0))
    assert open_ == sorted(open_, reverse=True)
    assert len(set(open_)) >= 4, "a soft fade, not one cut"


@by_name
def test_unknown_options_are_refused_with_a_suggestion(name, tmp_path):
    of = context()
    fields = MASKS.get(name).Options.model_fields
    known = next(iter(fields), None)
    with pytest.raises(ConfigError) as caught:
        build_mask(name, {f"{known or 'x'}s": 1}, of)
    text = str(caught.value)
    assert f"mask.{known or 'x'}s" in text
    assert (f"did you mean {known!r}" if known else "it has no options") in text
    assert str(check_mask(name, {f"{known or 'x'}s": 1})[0]) in text


def test_unknown_masks_are_refused_with_a_suggestion():
    with pytest.raises(ConfigError, match="did you mean 'saliency'"):
        build_mask("salliency", {}, context())
    assert "did you mean 'saliency'" in str(check_mask("salliency", {})[0])
    assert check_mask("saliency", {}) == []


@by_name
def test_parameters_and_penalty(name, tmp_path):
    mask = make(name, tmp_path)
    run(mask, 0, 8)
    penalty = mask.penalty(8)
    assert penalty.shape == ()
    assert torch.isfinite(penalty)
    parameters = list(mask.parameters())
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in parameters)
    if penalty.requires_grad:
        grads = torch.autograd.grad(penalty, parameters, allow_unused=True)
        assert any(grad is not None and grad.any() for grad in grads)


@by_name
def test_metrics_are_plain_finite_numbers(name, tmp_path):
    mask = make(name, tmp_path)
    for step in range(PHASES.freeze):
        metrics = mask.after_backward(step, statistics(mask, step))
        assert all(type(value) is float and value == value for value in metrics.values())


@by_name
def test_statistics_handed_over_are_not_changed(name, tmp_path):
    mask = make(name, tmp_path)
    run(mask, 0, 5)
    given = statistics(mask, 5)
    copy = GateStatistics(*({key: value.clone() for key, value in part.items()} for part in (given.grad, given.square)))
    mask.after_backward(5, given)
    assert_same(given.grad, copy.grad)
    assert_same(given.square, copy.square)

"""Saliency: what matters survives, what was closed by mistake comes back."""

from __future__ import annotations

import pytest
import torch

from prunetune.config.presets import PhaseSteps
from prunetune.methods.masks import build_mask
from prunetune.model.gates import GateStatistics
from tests.contracts.masks import ALL_KINDS, PHASES, context

IMPORTANT = {"layers.0.mlp_channels": (3, 40), "layers.1.mlp_channels": (9, 63), "layers.2.kv_groups": (1,)}


def told(mask, large, size=10.0):
    """Equal small gradients everywhere, ``size`` at the given units."""
    grad = {site.name: torch.full((site.size,), 0.1) for site in mask.sites}
    for name, units in large.items():
        grad[name][list(units)] = size
    return GateStatistics(grad, {name: value.square() for name, value in grad.items()})


@pytest.mark.parametrize("moment", ["token", "step"])
def test_units_with_large_gradients_survive(moment):
    mask = build_mask("saliency", {"moment": moment}, context())
    for step in range(PHASES.freeze):
        mask.after_backward(step, told(mask, IMPORTANT))
    plan, gates = mask.plan({}), mask.gates(PHASES.freeze)
    for name, units in IMPORTANT.items():
        assert set(units) <= set(plan.kept[name])
        assert len(plan.kept[name]) < gates[name].numel()
        assert all(gates[name][unit] == 1 for unit in units)


def test_the_two_moments_read_different_statistics():
    masks = {moment: build_mask("saliency", {"moment": moment}, context()) for moment in ("token", "step")}
    for moment, mask in masks.items():
        statistics = told(mask, {})
        statistics.square["layers.0.mlp_channels"][5] = 1e4
        statistics.grad["layers.0.mlp_channels"][6] = 1e2
        mask.after_backward(0, statistics)
        assert int(mask.scores()["layers.0.mlp_channels"].argmax()) == {"token": 5, "step": 6}[moment]


def test_a_closed_unit_reopens_when_its_score_recovers():
    phases = PhaseSteps(2, 60, 80)
    mask = build_mask("saliency", {"decay": 0.8}, context(phases=phases))
    name, unit, seen = "layers.1.mlp_channels", 17, []
    everything_else = {site.name: range(site.size) for site in mask.sites}
    everything_else[name] = [channel for channel in range(64) if channel != unit]
    for step in range(phases.freeze):
        seen.append(float(mask.gates(step)[name][unit]))
        mask.after_backward(step, told(mask, everything_else if step < 30 else {name: (unit,)}))
    assert seen[0] == 1.0
    assert min(seen) == 0.0, "it was closed"
    assert seen[-1] == 1.0, "and came back"
    assert unit in mask.plan({}).kept[name]


def test_the_running_mean_is_not_pulled_toward_zero_early():
    mask = build_mask("saliency", {"decay": 0.95}, context())
    mask.after_backward(0, told(mask, {}, 0.1))
    torch.testing.assert_close(mask.scores()["layers.0.kv_groups"], torch.full((3,), 0.01))
    mask.after_backward(1, told(mask, {"layers.0.kv_groups": (1,)}, 1.0))
    newer = (0.95 * 0.05 * 0.01 + 0.05 * 1.0) / (1 - 0.95**2)
    assert mask.scores()["layers.0.kv_groups"][1] == pytest.approx(newer, rel=1e-5)


def test_heads_of_a_closed_group_keep_their_scores():
    mask = build_mask("saliency", {"decay": 0.5}, context(ALL_KINDS))
    mask.after_backward(0, told(mask, {}))
    state = mask.state_dict()
    state["gate.layers.0.kv_groups"] = torch.tensor([1.0, 0.5, 0.0])
    mask.load_state_dict(state)
    statistics = told(mask, {})
    statistics.square["layers.0.query_heads"] = torch.tensor([1.0, 1.0, 0.25, 0.25, 0.0, 0.0])
    mask.after_backward(1, statistics)
    newer = (0.25 * 0.01 + 0.5 * 1.0) / 0.75
    expected = torch.tensor([newer, newer, newer, newer, 0.01, 0.01])
    torch.testing.assert_close(mask.scores()["layers.0.query_heads"], expected)


def test_units_inside_a_closed_layer_keep_their_scores():
    """A closed layer lets no gradient through; that must not read as units of no importance."""
    phases = PhaseSteps(1, 40, 50)
    of = context(ALL_KINDS, phases=phases, kept="60%")
    mask = build_mask("saliency", {"decay": 0.5}, of)
    for step in range(phases.freeze):
        gates, statistics = mask.gates(step), told(mask, {}, 1.0)
        statistics.square["layers"][:] = torch.tensor([9.0, 0.0, 9.0])
        for site in mask.sites:
            if site.layer >= 0:
                statistics.square[site.name] *= gates["layers"][site.layer] ** 2
        mask.after_backward(step, statistics)
    assert gates["layers"].tolist() == [1.0, 0.0, 1.0]
    scores = mask.scores()
    assert float(scores["layers.1.mlp_channels"].min()) == pytest.approx(0.01, rel=0.05)

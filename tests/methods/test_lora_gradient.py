"""LoRAPrune: importances against a direct computation, hard and lasting cuts, groups that stay together."""

from __future__ import annotations

import torch

from prunetune.config.presets import PhaseSteps
from prunetune.methods.masks import MASKS, build_mask
from prunetune.methods.masks.lora_gradient import importance_by_module, normalised
from prunetune.model.gates import GateStatistics
from tests.contracts.masks import ALL_KINDS, context, set_gradients, statistics, with_adapters

PHASES = PhaseSteps(5, 45, 60)


def make(phases=PHASES, units=("mlp_channels", "kv_groups"), **options):
    return build_mask("lora_gradient", options, with_adapters(context(units, phases)))


def by_hand(mask, layer):
    """Importance of MLP channels and KV groups of a layer (6 query heads of width 8 in 3 groups), matrix by matrix."""
    matrices = {}
    for linear in mask.context.adapters.linears:
        if linear.layer == layer:
            a, b, scale = linear.factors()
            estimate = b.grad @ a + b @ a.grad - b.grad @ a.grad
            base = linear.module.base_layer.weight
            matrices[linear.role] = (estimate * (base + scale * b @ a)).abs().detach()

    def unit(vector):
        return vector / vector.norm()

    channels = unit(matrices["gate"].sum(1)) + unit(matrices["up"].sum(1)) + unit(matrices["down"].sum(0))
    groups = unit(matrices["q"].reshape(3, -1).sum(1)) + unit(matrices["k"].reshape(3, -1).sum(1))
    groups += unit(matrices["v"].reshape(3, -1).sum(1)) + unit(matrices["o"].T.reshape(3, -1).sum(1))
    return channels, groups


def test_importance_equals_a_direct_computation():
    mask = make(units=ALL_KINDS)
    set_gradients(mask, torch.Generator().manual_seed(3), 1e-2)
    found = normalised(importance_by_module(mask.context.adapters.linears))
    for layer in range(3):
        channels, groups = by_hand(mask, layer)
        torch.testing.assert_close(found[f"layers.{layer}.mlp_channels"], channels)
        torch.testing.assert_close(found[f"layers.{layer}.kv_groups"], groups)
    assert found["layers"].shape == (3,)
    assert found["layers"].min() > 0


def test_the_running_mean_starts_at_zero_and_forgets_a_tenth_a_step():
    mask = make()
    seen = []
    for step in range(3):
        mask.after_backward(step, statistics(mask, step))
        seen.append(normalised(importance_by_module(mask.context.adapters.linears))["layers.1.kv_groups"])
    expected = 0.1 * (0.81 * seen[0] + 0.9 * seen[1] + seen[2])
    torch.testing.assert_close(mask.state_dict()["mean.layers.1.kv_groups"], expected)


def test_one_gradient_that_is_not_finite_leaves_all_importances_alone():
    mask = make()
    mask.after_backward(0, statistics(mask, 0))
    before = mask.state_dict()["mean.layers.0.mlp_channels"].clone()
    given = statistics(mask, 1)
    mask.context.adapters.linears[4].factors()[0].grad[0, 0] = float("nan")
    mask.after_backward(1, given)
    assert torch.equal(mask.state_dict()["mean.layers.0.mlp_channels"], before)


def test_gates_are_cut_at_once_by_a_cubic_schedule_and_do_not_come_back():
    mask = make()
    assert mask.refresh == 4, "at least ten cuts in a search of 40 steps"
    before, cuts, kept = None, [], []
    for step in range(PHASES.freeze):
        gates = torch.cat(list(mask.gates(step).values()))
        assert set(gates.unique().tolist()) <= {0.0, 1.0}
        if before is not None:
            assert bool((gates <= before).all()), "what was closed stays closed"
            if not torch.equal(gates, before):
                cuts.append(step)
        before = gates
        kept.append(float(gates.mean()))
        mask.after_backward(step, statistics(mask, step))
    assert len(cuts) >= 7
    first, later = kept[cuts[0] - 1] - kept[cuts[0]], kept[cuts[-1] - 1] - kept[cuts[-1]]
    assert first > 2 * later, "fast early, slow late"
    for kind in ("mlp_channels", "kv_groups"):
        per_layer = {int(gate.sum()) for name, gate in mask.gates(PHASES.freeze).items() if name.endswith(kind)}
        assert len(per_layer) == 1, "the same ratio in every layer"


def test_units_with_large_gradients_survive():
    mask = make(units=("mlp_channels",))
    for step in range(PHASES.freeze):
        given = statistics(mask, step)
        for linear in mask.context.adapters.linears:
            if linear.role == "up" and linear.layer == 1:
                linear.factors()[1].grad[[7, 33]] *= 100
        mask.after_backward(step, given)
    assert {7, 33} <= set(mask.plan({}).kept["layers.1.mlp_channels"])


def test_nothing_is_read_from_gate_gradients():
    mask = make()
    given = statistics(mask, 0)
    other = GateStatistics({name: -5 * value for name, value in given.grad.items()}, {})
    mask.after_backward(0, given)
    first = mask.scores()
    again = make()
    statistics(again, 0)
    again.after_backward(0, other)
    assert all(torch.equal(first[name], value) for name, value in again.scores().items())
    assert MASKS.get("lora_gradient").record_squares is False

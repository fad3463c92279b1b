"""Masks with free numbers (polarized, maskprune, light_peft): their steps against the formulas, by hand."""

from __future__ import annotations

import pytest
import torch

from prunetune.config.presets import PhaseSteps
from prunetune.methods.masks import budget_fraction, build_mask, kept_fraction
from prunetune.methods.masks._free import unit_gradients
from prunetune.model.budget import plan_shape
from prunetune.model.gates import GateStatistics
from tests.contracts.masks import ALL_KINDS, context

PHASES = PhaseSteps(2, 42, 60)
UNITS = ("mlp_channels", "kv_groups")
NAME = "layers.0.mlp_channels"


def make(name, units=UNITS, phases=PHASES, **options):
    return build_mask(name, {"start": "equal", **options}, context(units, phases, kept="60%"))


def drawn(mask, seed, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    grad = {site.name: size * torch.randn(site.size, generator=generator) for site in mask.sites}
    return GateStatistics(grad, {name: value.square() for name, value in grad.items()})


def free(mask):
    return {key.removeprefix("free."): value for key, value in mask.state_dict().items() if key.startswith("free.")}


def test_gradients_count_per_parameter_and_by_their_size_over_all_units():
    found = unit_gradients(
        GateStatistics({"a": torch.tensor([3.0, -4.0]), "b": torch.tensor([12.0])}, {}), {"a": 1, "b": 4}
    )
    expected = torch.tensor([3.0, -4.0, 3.0]) / (34 / 3) ** 0.5
    torch.testing.assert_close(torch.cat(list(found.values())), expected.clamp(-1, 1))
    assert float(expected.abs().max()) > 1 > float(expected.abs().min())


def test_a_polarized_step_is_gradient_push_and_one_price_for_the_budget():
    mask = make("polarized", ("mlp_channels",), strength=0.5, learning_rate=0.1)
    state = mask.state_dict()
    start = torch.linspace(0.2, 1.0, 192).reshape(64, 3).T
    for layer, name in enumerate(free(mask)):
        state[f"free.{name}"] = start[layer].clone()
    mask.load_state_dict(state)
    given = drawn(mask, 0)
    price = mask.after_backward(20, given)["mask_price"]
    grads = torch.stack(list(given.grad.values()))
    target = 1 - (1 - budget_fraction(mask.context.planner)) * 19 / 32
    # Attention, which has no gates here, is open.
    attention, channel = 3 * 2 * 8 * 48 * 3, 3 * 48
    gated = (target * (attention + 64 * channel) - attention) / (64 * channel)
    ranked, above = start.flatten().sort(descending=True).values, int(gated * 192)
    pivot = (ranked[above - 1] + ranked[above]) / 2
    moved = start - 0.1 * ((grads / grads.square().mean().sqrt()).clamp(-1, 1) - 0.5 * torch.sign(start - pivot))
    found = torch.stack(list(free(mask).values()))
    torch.testing.assert_close(found, (moved - price).clamp(-1, 2), rtol=1e-4, atol=1e-5)
    assert float(torch.cat(list(mask.gates(21).values())).mean()) == pytest.approx(gated, abs=1e-4)


@pytest.mark.parametrize("units", [UNITS, ("mlp_channels", "layers"), ALL_KINDS], ids="+".join)
def test_polarized_gates_end_apart_at_the_budget(units):
    """Also where units lie within others, so that what their gates let through multiplies."""
    mask = make("polarized", units, strength=3.0)
    for step in range(PHASES.freeze):
        found = mask.after_backward(step, drawn(mask, step))
    assert found["mask_half_open"] < 0.15
    planner = mask.context.planner
    assert float(kept_fraction(planner, mask.gates(PHASES.freeze))) == pytest.approx(budget_fraction(planner), abs=1e-3)


def test_without_the_push_gates_stay_half_open():
    mask = make("polarized", strength=0.0)
    for step in range(PHASES.freeze):
        found = mask.after_backward(step, drawn(mask, step, 1e-3))
    assert found["mask_half_open"] > 0.2


def test_a_maskprune_step_is_gradient_then_proximal_then_ascent():
    mask = make("maskprune", ("mlp_channels",), PhaseSteps(0, 1, 2), pressure=2.0, learning_rate=0.1, ascent=0.25)
    given = drawn(mask, 0)
    mask.after_backward(0, given)
    grads = torch.stack(list(given.grad.values()))
    moved = 1 - 0.1 * (grads / grads.square().mean().sqrt()).clamp(-1, 1)
    [shape] = mask.context.planner.candidates
    factor = 1 / (1 + 2 * 0.1 * 2.0)
    for row, (name, found) in zip(moved, free(mask).items()):
        inside = torch.zeros(64, dtype=torch.bool)
        inside[row.argsort(descending=True, stable=True)[: shape.mlp_channels]] = True
        torch.testing.assert_close(found, torch.where(inside, row, row * factor))
        torch.testing.assert_close(mask.gates(1)[name], torch.where(inside, 1.0, (row * factor).clamp(0, 1)))
        excess = row[~inside].square().sum() / 64
        assert float(mask.state_dict()[f"pressure.{name}"]) == pytest.approx(float(2.0 + 0.5 * excess), rel=1e-5)


def test_maskprune_ends_at_one_width_for_all_layers():
    mask = make("maskprune")
    for step in range(PHASES.freeze):
        mask.after_backward(step, drawn(mask, step % 3))
    plan = mask.plan({})
    shape = plan_shape(mask.context.planner.arch, plan)
    gates = mask.gates(PHASES.freeze)[NAME]
    kept = list(plan.kept[NAME])
    assert len(kept) == shape.mlp_channels
    others = [channel for channel in range(64) if channel not in kept]
    assert float(gates[kept].min()) == 1.0
    assert float(gates[others].max()) < 0.3


def test_maskprune_closes_what_is_beyond_the_width_in_half_of_any_search():
    for search in (6, 60):
        mask = make("maskprune", ("mlp_channels",), PhaseSteps(0, search, search + 1), ramp_share=0.5, ascent=0)
        silent = GateStatistics({site.name: torch.zeros(site.size) for site in mask.sites}, {})
        for step in range(search):
            mask.after_backward(step, silent)
        kept = list(mask.plan({}).kept[NAME])
        gates = mask.gates(search)[NAME]
        assert float(gates.sum()) - len(kept) < 0.015 * (64 - len(kept)), search


@pytest.mark.parametrize("steps", [20, 400])
@pytest.mark.parametrize("name", ["maskprune", "polarized"])
def test_noise_does_not_close_the_units_that_matter_most(name, steps):
    """Their gradients are the largest, of either sign."""
    generator = torch.Generator().manual_seed(0)
    best = list(range(8))
    phases = PhaseSteps(2, 2 + steps, steps + 10)
    mask = build_mask(name, {}, context(("mlp_channels",), phases, kept="60%"))
    for step in range(phases.freeze):
        grad = {site.name: torch.randn(site.size, generator=generator) for site in mask.sites}
        for value in grad.values():
            value[best] *= 50
        mask.after_backward(step, GateStatistics(grad, {name: g.square() for name, g in grad.items()}))
    for name in grad:
        assert set(best) <= set(mask.plan({}).kept[name])


def test_a_light_peft_step_is_adam_on_the_loss_and_the_l1():
    mask = make("light_peft", l1=0.3, learning_rate=0.02, checks=100)
    reference = {site.name: torch.ones(site.size, requires_grad=True) for site in mask.sites}
    adam = torch.optim.Adam(list(reference.values()), lr=0.02, eps=1e-12)
    for step in range(2, 6):
        given = drawn(mask, step)
        for name, value in reference.items():
            value.grad = given.grad[name] + 0.3 * torch.sign(value.detach())
        adam.step()
        mask.after_backward(step, given)
    for name, value in reference.items():
        torch.testing.assert_close(free(mask)[name], value.detach(), rtol=1e-4, atol=1e-5)


def test_light_peft_decides_once_settled_and_then_fades():
    mask = make("light_peft", ("mlp_channels",), PhaseSteps(2, 102, 120))
    given = drawn(mask, 0)
    history = []
    for step in range(60):
        history.append(torch.cat(list(mask.gates(step).values())))
        mask.after_backward(step, given)  # always the same: the masks' order stands from the first step on
        decided = mask.plan({}).origin["settled"]
        assert decided == (step + 1 - 2 >= 5 * (1 + 5)), "five settled looks after the first, one in five steps"
    gates = torch.stack(history)
    assert 0 < float((gates[33] - gates[36]).max()) < 0.2, "it fades"
    plan = mask.plan({})
    closed = torch.ones(64)
    closed[list(plan.kept[NAME])] = 0.0
    assert torch.equal(mask.gates(60)[NAME], 1 - closed)
    before = mask.state_dict()["free." + NAME].clone()
    mask.after_backward(60, drawn(mask, 9))
    assert torch.equal(mask.state_dict()["free." + NAME], before), "what is decided is decided"


def test_light_peft_that_never_settles_decides_at_the_latest_share():
    mask = make("light_peft", distance=1e-9, latest=0.5)
    for step in range(PHASES.freeze):
        mask.after_backward(step, drawn(mask, step))
        assert mask.plan({}).origin["settled"] == (step >= 2 + 20 - 1)


@pytest.mark.parametrize("name", ["polarized", "maskprune", "light_peft"])
def test_numbers_start_apart_by_what_the_warm_up_saw(name):
    """Around 1 by a tenth of the log of the unit's score over the boundary's, limited to a tenth."""
    mask = make(name, ("mlp_channels",), start="saliency")
    squares = {site.name: torch.linspace(0.01, 10.0, 64) for site in mask.sites}
    for step in range(2):
        mask.after_backward(step, GateStatistics({key: torch.zeros(64) for key in squares}, squares))
    [shape] = mask.context.planner.candidates
    score = squares[NAME].double()
    boundary = (score[64 - shape.mlp_channels] * score[63 - shape.mlp_channels]).sqrt()
    expected = 1 + 0.1 * (score / boundary).log().clamp(-1, 1)
    torch.testing.assert_close(free(mask)[NAME].double(), expected, rtol=1e-5, atol=1e-5)
    assert all((value == 1).all() for value in free(make(name)).values())

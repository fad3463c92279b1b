"""ATP: Gumbel straight-through gates, the log-ratio budget and the proximal step against direct computations."""

from __future__ import annotations

import math

import pytest
import torch

from prunetune.config.presets import PhaseSteps
from prunetune.core.streams import stream
from prunetune.methods.masks import build_mask, kept_fraction
from prunetune.methods.masks._proximal import shrink
from prunetune.model.budget import full_shape, plan_shape
from prunetune.model.gates import GateStatistics
from tests.contracts.masks import ALL_KINDS, context, set_gradients, statistics, with_adapters
from tests.support import hard_gates, random_plan

PHASES = PhaseSteps(0, 200, 300)
UNITS = ("mlp_channels", "kv_groups")


def make(units=UNITS, phases=PHASES, seed=0, **options):
    return build_mask("atp", options, with_adapters(context(units, phases, seed)))


def train(mask, first, last, gradient=0.0):
    for step in range(first, last):
        mask.gates(step)
        grad = {site.name: torch.full((site.size,), gradient) for site in mask.sites}
        mask.after_backward(step, GateStatistics(grad, {}))


@pytest.mark.parametrize("size", ["small", "large"])
def test_the_first_gates_are_all_open_and_the_network_learns_the_budget(size):
    mask = make(size=size, learning_rate=5e-3)
    assert all((gate == 1).all() for gate in mask.gates(0).values())
    train(mask, 0, 200)
    kept = float(kept_fraction(mask.context.planner, mask.eval_gates(200)))
    assert kept == pytest.approx(0.5, abs=0.05)


def test_samples_follow_the_one_sided_gumbel():
    """P(gate stays) = 1 - exp(-exp(logit)); exp(logit) is the score over the unit's parameters."""
    mask = make(offset=-0.5, units=("mlp_channels",))
    score = mask.scores()["layers.0.mlp_channels"]
    expected = 1 - torch.exp(-score / (3 * 48))
    samples = torch.stack([mask.gates(step)["layers.0.mlp_channels"] for step in range(400)])
    torch.testing.assert_close(samples.mean(0), expected, atol=0.09, rtol=0)
    assert float(samples.mean()) == pytest.approx(float(expected.mean()), abs=0.01)
    keep = mask.eval_gates(5)["layers.0.mlp_channels"]
    assert torch.equal(keep, (expected > 0.5).float())


def test_the_gradient_passes_straight_through_to_the_relaxed_gates():
    """Against sigmoid((logit + noise) / T) written out, with the same noise."""
    mask = make(units=("mlp_channels",), offset=0.0, ratio_weight=0.0)
    grads = {site.name: torch.randn(64, generator=torch.Generator().manual_seed(1)) for site in mask.sites}
    logits = mask._logits()
    by_hand = torch.zeros(())
    for name, logit in logits.items():
        noise = torch.from_numpy(
            -torch.log(-torch.log(torch.from_numpy(stream(0, "mask.atp", 7, name).random(64)))).numpy()
        )
        by_hand = by_hand + (torch.sigmoid((logit + noise.float()) / 0.4) * grads[name]).sum()
    parameters = list(mask.parameters())
    expected = torch.autograd.grad(by_hand, parameters)
    norm = torch.cat([grad.flatten() for grad in expected]).norm()
    mask.gates(7)
    mask.after_backward(7, GateStatistics(grads, {}))
    for parameter, grad in zip(parameters, expected):
        torch.testing.assert_close(parameter.grad, grad * min(1.0, 3.0 / float(norm)), rtol=1e-3, atol=1e-6)


def test_the_penalty_is_the_log_ratio_of_kept_and_wanted_parameters():
    mask = make()
    assert float(mask.penalty(0)) == pytest.approx(5 * math.log(1.0 / mask._wanted), rel=1e-5)
    assert mask._wanted == pytest.approx(0.5, abs=0.03)
    near = make(tolerance=10.0)
    assert float(near.penalty(0)) == 0.0, "inside the dead zone it does not pull"
    assert all(
        not grad.any()
        for grad in torch.autograd.grad(near.penalty(0), list(near.parameters()), allow_unused=True)
        if grad is not None
    )


def test_kept_fraction_of_a_plan_is_the_plans():
    of = context(ALL_KINDS)
    planner = of.planner
    for seed in range(3):
        plan = random_plan(planner.arch, seed=seed)
        gates = hard_gates(planner.arch, planner.sites, plan)
        shape, full = plan_shape(planner.arch, plan), full_shape(planner.arch)
        cost = {s: s.layers * (s.query_heads * 2 * 8 + s.kv_groups * 2 * 8 + 3 * s.mlp_channels) for s in (shape, full)}
        assert float(kept_fraction(planner, gates)) == pytest.approx(cost[shape] / cost[full])


def test_in_turns_a_step_teaches_the_network_or_the_adapters():
    mask = make(alternate=True)
    factors = [factor for linear in mask.context.adapters.linears for factor in linear.factors()[:2]]
    beside = torch.nn.Parameter(torch.zeros(3))  # as a module that is trained whole, or a bias
    mask.context.adapters.trained.append(beside)
    for step in range(4):
        beside.grad = torch.ones(3)
        before = [parameter.detach().clone() for parameter in mask.parameters()]
        gates = torch.cat(list(mask.gates(step).values()))
        mask.after_backward(step, statistics(mask, step))
        network_moved = any(not torch.equal(old, new) for old, new in zip(before, mask.parameters()))
        assert network_moved == (step % 2 == 0)
        assert all((parameter.grad is None) == (step % 2 == 0) for parameter in [*factors, beside])
        assert mask.on_held_out(step) == (step % 2 == 0)
        assert bool(((gates > 0) & (gates < 1)).any()) == (step % 2 == 0), "soft for the network, hard for the adapters"


def test_rows_are_held_out_only_in_turns_and_not_in_the_warm_up():
    kind = type(make())
    assert kind.held_out({}) == kind.held_out({"held_out": "20%"}) == 0
    assert kind.held_out({"alternate": True, "held_out": "20%"}) == 0.2
    assert not any(make().on_held_out(step) for step in range(4))
    late = make(phases=PhaseSteps(2, 6, 8), alternate=True)
    assert [late.on_held_out(step) for step in range(6)] == [False, False, True, False, True, False]


def test_the_proximal_step_takes_its_amount_off_each_groups_joint_norm():
    of = with_adapters(context(UNITS))
    linears = of.adapters.linears
    rows = {}
    for linear in linears:
        if linear.layer == 1:
            a, b, _ = linear.factors()
            rows[linear.role] = (b if linear.role in ("gate", "up") else a.T).detach().clone()
    channel = torch.cat([rows["gate"][5], rows["up"][5], rows["down"][5]])
    amount = 0.3 * float(channel.norm())
    amounts = torch.zeros(64)
    amounts[5], amounts[6] = amount, 1e9
    shrink(of.adapters, {"layers.1.mlp_channels": amounts})
    after = {linear.role: linear for linear in linears if linear.layer == 1}
    torch.testing.assert_close(after["up"].factors()[1][5].detach(), 0.7 * rows["up"][5])
    torch.testing.assert_close(after["down"].factors()[0][:, 5].detach(), 0.7 * rows["down"][5])
    assert not after["gate"].factors()[1][6].any()
    assert not after["down"].factors()[0][:, 6].any()
    assert torch.equal(after["gate"].factors()[1][7].detach(), rows["gate"][7])


def test_adapters_of_closed_units_shrink_and_of_open_ones_do_not():
    mask = make(units=ALL_KINDS, offset=-0.3, phases=PhaseSteps(0, 20, 40))
    before = {
        linear.path: [factor.detach().clone() for factor in linear.factors()[:2]]
        for linear in mask.context.adapters.linears
    }
    gates = mask.gates(5)
    set_gradients(mask, torch.Generator().manual_seed(0), 1.0)
    mask.after_backward(5, statistics(mask, 5))
    mask.after_step(5, 1e-3)
    for linear in mask.context.adapters.linears:
        if linear.role == "up" and gates["layers"][linear.layer] == 1:
            gate = gates[f"layers.{linear.layer}.mlp_channels"].bool()
            b = linear.factors()[1].detach()
            assert torch.equal(b[gate], before[linear.path][1][gate])
            assert float(b[~gate].norm()) < 0.5 * float(before[linear.path][1][~gate].norm())
    assert {0.0, 1.0} == set(torch.cat(list(gates.values())).tolist())


def test_another_seed_is_another_network():
    first, second = (make(seed=seed).scores()["layers.0.mlp_channels"] for seed in (0, 1))
    assert not torch.equal(first, second)


def test_a_short_search_learns_faster_unless_a_rate_is_set():
    def rate(mask):
        return mask._adam.param_groups[0]["lr"]

    assert rate(make(phases=PhaseSteps(0, 1000, 2000))) == 1e-3
    short = make(phases=PhaseSteps(10, 40, 80))
    assert rate(short) == pytest.approx(5e-3)
    assert short.least_search == 400, "a warning, the same for every search: gates do not settle in 30 steps"
    assert rate(make(phases=PhaseSteps(10, 40, 80), alternate=True)) == 1e-2, "the network has half of the steps"
    assert make(phases=PhaseSteps(10, 40, 80), alternate=True).least_search == 800
    set_by_hand = make(phases=PhaseSteps(10, 60, 80), learning_rate=1e-2)
    assert set_by_hand.least_search == 40, "no warning: 50 steps are enough at this one"

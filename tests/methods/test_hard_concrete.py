"""Hard concrete: the expected size follows its ramp, large gradients hold gates open, noise is as published."""

from __future__ import annotations

import pytest
import torch

from prunetune.config.presets import PhaseSteps
from prunetune.methods.masks import build_mask
from prunetune.model.budget import kept_fractions
from prunetune.model.gates import GateStatistics
from tests.contracts.masks import ALL_KINDS, context

PHASES = PhaseSteps(10, 210, 300)


def train(mask, gradient, first=0, last=PHASES.freeze):
    """Runs the mask's own training; returns (step, expected kept, target) of every search step."""
    history = []
    for step in range(first, last):
        mask.gates(step)
        grad = gradient(mask)
        mask.after_backward(step, GateStatistics(grad, {name: value.square() for name, value in grad.items()}))
        if step >= mask.context.phases.warmup_end:
            history.append((step, float(mask.expected_kept()), mask.target_kept(step)))
    return history


def noise(mask, size=1e-3):
    generator = torch.Generator().manual_seed(0)
    return {site.name: size * torch.randn(site.size, generator=generator) for site in mask.sites}


@pytest.mark.parametrize("phases", [PHASES, PhaseSteps(4, 20, 40), PhaseSteps(0, 1, 2)], ids=str)
@pytest.mark.parametrize("size", [1e-7, 1e-3, 10.0])
@pytest.mark.parametrize("units", [("mlp_channels", "kv_groups"), ALL_KINDS], ids=len)
def test_the_expected_size_follows_the_ramp_down_to_the_budget(units, size, phases):
    """In any number of steps and on any scale of the loss: neither late, nor swinging around it."""
    mask = build_mask("hard_concrete", {}, context(units, phases, kept="60%"))
    history = train(mask, lambda mask: noise(mask, size), phases.warmup_end, phases.freeze)
    for step, kept, target in history:
        assert kept == pytest.approx(target, abs=1e-5), step
    targets = [target for _, _, target in history]
    assert targets == sorted(targets, reverse=True)
    assert targets[-1] < 0.9


def test_the_target_is_the_largest_shape_inside_the_budget():
    of = context(("mlp_channels",), PHASES, kept="60%")
    mask = build_mask("hard_concrete", {}, of)
    [shape] = of.planner.candidates
    wanted = kept_fractions(of.planner.arch, shape)["decoder"]
    assert mask.target_kept(PHASES.freeze) == pytest.approx(wanted, rel=1e-6)
    assert mask.target_kept(PHASES.warmup_end - 1) == pytest.approx(float(mask.expected_kept()))


def test_units_that_the_loss_holds_on_to_survive():
    def gradient(mask):
        grads = {site.name: torch.zeros(site.size) for site in mask.sites}
        grads["layers.0.mlp_channels"][[4, 50]] = -5.0  # opening them lowers the loss
        return grads

    mask = build_mask("hard_concrete", {}, context(("mlp_channels",), PHASES, kept="60%"))
    train(mask, gradient)
    scores = mask.scores()["layers.0.mlp_channels"]
    assert set(scores.argsort(descending=True)[:2].tolist()) == {4, 50}
    assert {4, 50} <= set(mask.plan({}).kept["layers.0.mlp_channels"])
    assert mask.eval_gates(PHASES.freeze)["layers.0.mlp_channels"][4] == 1.0
    assert scores[4] > 3 * scores.median()


def test_the_gradient_reaches_the_logits_through_the_sample_of_that_step():
    """Apart from the common shift, a logit moves against its gate's gradient, where the gate is not clipped."""
    of = context(("mlp_channels",), PhaseSteps(0, 10, 20), kept="60%")
    mask = build_mask("hard_concrete", {"init": 0.0}, of)
    before = {name: t.clone() for name, t in mask.state_dict().items()}
    gates = mask.gates(0)
    sign = {site.name: torch.where(torch.arange(site.size) % 2 == 0, 1.0, -1.0) for site in mask.sites}
    shift = mask.after_backward(0, GateStatistics(sign, {name: t.square() for name, t in sign.items()}))[
        "mask_multiplier"
    ]
    for site in mask.sites:
        moved = mask.state_dict()[f"logit.{site.name}"] - before[f"logit.{site.name}"] + shift
        inside = (gates[site.name] > 0) & (gates[site.name] < 1)
        assert inside.any()
        assert (torch.sign(moved)[inside] == -sign[site.name][inside]).all()
        assert moved[~inside].abs().max() < 1e-6


def test_samples_have_the_published_distribution():
    """P(z > 0) of Louizos et al., by counting over steps."""
    of = context(("mlp_channels",), PhaseSteps(0, 5000, 6000))
    mask = build_mask("hard_concrete", {"init": 0.3}, of)
    samples = torch.stack([mask.gates(step)["layers.0.mlp_channels"] for step in range(150)])
    expected = torch.sigmoid(torch.tensor(0.3) - 2 / 3 * torch.log(torch.tensor(0.1 / 1.1)))
    assert float((samples > 0).float().mean()) == pytest.approx(float(expected), abs=0.02)
    assert float((samples == 1).float().mean()) > 0.1
    assert len(samples.unique(dim=0)) == 150, "new noise every step"


def test_other_seeds_and_sites_draw_other_noise():
    first, second = (build_mask("hard_concrete", {}, context(phases=PHASES, seed=seed)) for seed in (0, 1))
    here, there = first.gates(50), second.gates(50)
    assert not torch.equal(here["layers.0.mlp_channels"], there["layers.0.mlp_channels"])
    assert not torch.equal(here["layers.0.mlp_channels"], here["layers.1.mlp_channels"])


def test_without_noise_the_gates_do_not_depend_on_the_step():
    mask = build_mask("hard_concrete", {"noise": False, "init": 1.0}, context(phases=PHASES))
    assert torch.equal(mask.gates(20)["layers.0.mlp_channels"], mask.gates(21)["layers.0.mlp_channels"])
    assert torch.equal(mask.gates(20)["layers.0.mlp_channels"], mask.eval_gates(21)["layers.0.mlp_channels"])


@pytest.mark.parametrize("init", [0.0, 1.0])
def test_any_start_is_open_in_warm_up(init):
    mask = build_mask("hard_concrete", {"init": init}, context(phases=PHASES))
    for gates in (mask.gates(0), mask.eval_gates(PHASES.warmup_end - 1)):
        assert all((gate == 1).all() for gate in gates.values())


def test_learnt_multipliers_resume_to_the_bit():
    of = context(phases=PhaseSteps(2, 30, 40), kept="60%")
    whole = build_mask("hard_concrete", {"multiplier": "learnt"}, of)
    train(whole, noise, 0, 15)
    state = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    assert state["multipliers"].any(), "they have begun to climb"
    train(whole, noise, 15, 30)
    resumed = build_mask("hard_concrete", {"multiplier": "learnt"}, of)
    resumed.load_state_dict(state)
    train(resumed, noise, 15, 30)
    after = resumed.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in whole.state_dict().items())
    assert not torch.equal(after["multipliers"], state["multipliers"])


def logits_of(mask):
    return {key.removeprefix("logit."): value for key, value in mask.state_dict().items() if key.startswith("logit.")}


def test_logits_start_at_the_log_of_the_warm_ups_saliency_over_the_boundary():
    """By hand: width 4 of 8 would stay; the boundary is the geometric mean of the 4th and the 5th score."""
    of = context(("mlp_channels",), PhaseSteps(2, 50, 60), kept="50%")
    mask = build_mask("hard_concrete", {"contrast": 3.0}, of)
    [shape] = of.planner.candidates
    squares = {site.name: torch.linspace(0.1, 6.4, site.size).flip(0) for site in mask.sites}
    for step in range(2):
        mask.after_backward(step, GateStatistics({name: torch.zeros(64) for name in squares}, squares))
    score = squares["layers.1.mlp_channels"].double() * 2
    boundary = (score[shape.mlp_channels - 1] * score[shape.mlp_channels]).sqrt()
    logits = logits_of(mask)["layers.1.mlp_channels"].double()
    expected = 3.0 * (score / boundary).log()
    torch.testing.assert_close(logits - logits[0], expected - expected[0], rtol=1e-4, atol=1e-4)
    assert float(mask.expected_kept()) == pytest.approx(mask.target_kept(1), abs=1e-5), "lifted: all but open at first"


def test_saliency_start_leaves_few_gates_half_open_and_equal_start_all_of_them():
    half_open = {}
    for start in ("saliency", "equal"):
        mask = build_mask(
            "hard_concrete", {"start": start}, context(("mlp_channels",), PhaseSteps(5, 35, 60), kept="70%")
        )
        generator = torch.Generator().manual_seed(0)
        importance = {site.name: torch.randn(site.size, generator=generator).exp() for site in mask.sites}
        train(mask, lambda mask, importance=importance: importance, 0, 5)
        train(mask, lambda mask: {site.name: torch.zeros(site.size) for site in mask.sites}, 5, 34)
        gates = torch.cat(list(mask.gates(34).values()))
        half_open[start] = float(((gates > 0.1) & (gates < 0.9)).float().mean())
    assert half_open["equal"] > 0.2
    assert half_open["saliency"] < half_open["equal"] / 2


def test_equal_start_takes_nothing_from_the_warm_up():
    mask = build_mask("hard_concrete", {"start": "equal"}, context(phases=PHASES))
    train(mask, noise, 0, PHASES.warmup_end)
    assert all((logit == 2.5).all() for logit in logits_of(mask).values())
    assert mask.least_search == 300
    assert build_mask("hard_concrete", {}, context(phases=PHASES)).least_search == 0


def test_units_that_no_loss_told_apart_start_equal():
    mask = build_mask("hard_concrete", {}, context(phases=PHASES))
    zeros = {site.name: torch.zeros(site.size) for site in mask.sites}
    for step in range(PHASES.warmup_end):
        mask.after_backward(step, GateStatistics(zeros, zeros))
    assert all(torch.equal(logit, logit[:1].expand_as(logit)) for logit in logits_of(mask).values())


def test_scores_tell_units_apart_whose_probabilities_are_equal_in_float32():
    mask = build_mask("hard_concrete", {}, context(("mlp_channels",), PHASES))
    state = mask.state_dict()
    for name in logits_of(mask):
        state[f"logit.{name}"] = torch.linspace(20.0, 30.0, 64)
    mask.load_state_dict(state)
    assert len(torch.sigmoid(torch.linspace(20.0, 30.0, 64)).unique()) < 64
    assert all((score.diff() > 0).all() for score in mask.scores().values())


def gated_regression(mask, step, rows=64):
    """Loss and gate statistics of y = sum_u g_u w_u x_u against the open sum; unit u matters as w_u^2 does."""
    generator = torch.Generator().manual_seed(step)
    gates = {name: gate.clone().requires_grad_() for name, gate in mask.gates(step).items()}
    weights = {
        name: 1.5 ** -torch.arange(len(gate)).float().roll(7 * at) for at, (name, gate) in enumerate(gates.items())
    }
    inputs = {name: torch.randn(rows, len(gate), generator=generator) for name, gate in gates.items()}
    error_T = sum((inputs[name] * weights[name] * (gate - 1)).sum(-1) for name, gate in gates.items())
    error_T = error_T + torch.randn(rows, generator=generator)
    per_token = {name: 2 * error_T[:, None] * inputs[name] * weights[name] / rows for name in gates}
    statistics = GateStatistics(
        {name: value.sum(0).detach() for name, value in per_token.items()},
        {name: value.square().sum(0).detach() for name, value in per_token.items()},
    )
    return float(error_T.detach().square().mean()), statistics


def test_in_a_short_search_the_saliency_start_loses_far_less_than_the_published_one():
    lost = {}
    for start in ("saliency", "equal"):
        mask = build_mask("hard_concrete", {"start": start}, context(("mlp_channels",), PhaseSteps(8, 40, 80)))
        losses = []
        for step in range(40):
            loss, statistics = gated_regression(mask, step)
            losses.append(loss)
            mask.after_backward(step, statistics)
        lost[start] = sum(losses[24:]) / 16 - 1.0  # of which 1 is noise that no gate can explain
    assert lost["saliency"] < 0.25 * lost["equal"]

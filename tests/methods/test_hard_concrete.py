"""Hard concrete: the expected size follows its ramp, large gradients hold gates open, noise is as published."""

from __future__ import annotations

import pytest
import torch

from prunetune.config.presets import PhaseSteps
from prunetune.methods.masks import build_mask
from prunetune.model.gates import GateStatistics
from tests.contracts.masks import ALL_KINDS, context

PHASES = PhaseSteps(10, 210, 300)


def train(mask, gradient, first=0, last=PHASES.freeze):
    """Runs the mask's own training; returns (step, expected kept, target) of every search step."""
    history = []
    for step in range(first, last):
        mask.gates(step)
        mask.after_backward(step, GateStatistics(gradient(mask), {}))
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
    assert mask.target_kept(PHASES.freeze) == pytest.approx(shape.mlp_channels / 64)
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
    shift = mask.after_backward(0, GateStatistics(sign, {}))["mask_multiplier"]
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

"""Fading in batches: five scores by hand, linear fades, what went stays away."""

from __future__ import annotations

import itertools

import pytest
import torch

from prunetune.config.presets import PhaseSteps
from prunetune.methods.masks import build_mask
from prunetune.methods.masks.gradual_zero import group_sums, saliences
from tests.contracts.masks import context, set_gradients, statistics, with_adapters

PHASES = PhaseSteps(4, 54, 80)  # 50 steps of search: ten periods of 4 steps, then 10 steps of rest


def make(**options):
    return build_mask("gradual_zero", options, with_adapters(context(("mlp_channels", "kv_groups"), PHASES)))


def test_saliences_equal_a_direct_computation():
    mask = make()
    set_gradients(mask, torch.Generator().manual_seed(1), 0.1)
    sums = group_sums(mask.context.adapters.linears)
    layers = [f"layers.{layer}.mlp_channels" for layer in range(3)]
    found = torch.cat(list(saliences({name: sums[name] for name in layers}).values()))
    groups = []
    for layer in range(3):
        own = {linear.role: linear for linear in mask.context.adapters.linears if linear.layer == layer}
        for channel in range(64):
            x, g = [], []
            for role in ("gate", "up", "down"):
                weight, grad = own[role].weight(), own[role].weight_gradient()
                x.append(weight[:, channel] if role == "down" else weight[channel])
                g.append(grad[:, channel] if role == "down" else grad[channel])
            groups.append((torch.cat(x), torch.cat(g)))
    scores = torch.stack(
        [
            torch.stack([x.norm() for x, _ in groups]),
            torch.stack([x.square().mean().sqrt() for x, _ in groups]),
            torch.stack([(1 - torch.cosine_similarity(x, g, dim=0)) / 2 for x, g in groups]),
            torch.stack([(x @ g).abs() for x, g in groups]),
            torch.stack([(x @ g) ** 2 / 2 for x, g in groups]),
        ]
    )
    torch.testing.assert_close(found, (scores / scores.norm(dim=1, keepdim=True)).mean(0), rtol=1e-3, atol=1e-6)


def test_each_period_fades_its_batch_linearly_and_for_good():
    mask = make()
    assert mask.fade_steps == 4.0
    history = []
    for step in range(PHASES.freeze):
        history.append(torch.cat([gate for name, gate in mask.gates(step).items() if name.endswith("mlp_channels")]))
        mask.after_backward(step, statistics(mask, step))
    gates = torch.stack(history)
    assert set(gates.unique().tolist()) == {0.0, 0.25, 0.5, 0.75, 1.0}
    assert bool((gates.diff(dim=0) <= 0).all()), "nothing comes back"
    for period in range(10):
        start = PHASES.warmup_end + 4 * period  # the first step of a period runs on three quarters
        fading = (gates[start] < 1) & (gates[start] > 0)
        assert torch.equal(gates[start : start + 4, fading].mean(1), torch.tensor([0.75, 0.5, 0.25, 0.0]))
        assert int(fading.sum()) > 0
    closed = (gates == 0).sum(1)
    batches = closed[PHASES.warmup_end + 3 :: 4][:10].diff()
    assert int(batches.max() - batches.min()) <= 3, "equal batches, rounded in three layers"
    assert torch.equal(gates[44], gates[-1]), "then it rests"


@pytest.mark.parametrize("search", [5, 16, 50])
def test_batches_are_equal_without_a_warm_up_too(search):
    """The first period then only looks, so there is one batch less."""
    phases = PhaseSteps(0, search, 200)
    mask = build_mask("gradual_zero", {}, with_adapters(context(("mlp_channels",), phases)))
    aimed = [0]
    for step in range(phases.freeze):
        mask.after_backward(step, statistics(mask, step))
        aimed.append(int(sum((target == 0).sum() for target in mask._target.values())))
    assert aimed[-1] == sum((~stays).sum() for stays in kept_masks(mask))
    batches = [new - old for old, new in itertools.pairwise(aimed) if new > old]
    assert len(batches) == min(10, int(0.8 * search)) - 1
    assert max(batches) - min(batches) <= 3, "equal batches, rounded in three layers"


@pytest.mark.parametrize("search", [3, 16, 24, 30, 57, 110])
def test_the_last_batch_has_gone_after_the_ramps_share_of_any_search(search):
    phases = PhaseSteps(4, 4 + search, 200)
    mask = build_mask("gradual_zero", {}, with_adapters(context(("mlp_channels",), phases)))
    closed = []
    for step in range(phases.freeze):
        mask.after_backward(step, statistics(mask, step))
        closed.append(int(sum((gate == 0).sum() for gate in mask.gates(step + 1).values())))
    last = next(step for step, number in enumerate(closed) if number == closed[-1]) + 1 - phases.warmup_end
    assert closed[-1] == sum((~stays).sum() for stays in kept_masks(mask))
    assert abs(last - 0.8 * search) <= 2


def kept_masks(mask):
    for site in mask.sites:
        stays = torch.zeros(site.size, dtype=torch.bool)
        stays[list(mask.plan({}).kept[site.name])] = True
        yield stays


def test_gradients_that_are_not_finite_change_no_salience():
    mask = make()
    mask.after_backward(0, statistics(mask, 0))
    before = mask.state_dict()["mean.layers.0.kv_groups"].clone()
    given = statistics(mask, 1)
    mask.context.adapters.linears[0].factors()[1].grad[0, 0] = float("inf")
    mask.after_backward(1, given)
    assert torch.equal(mask.state_dict()["mean.layers.0.kv_groups"], before)

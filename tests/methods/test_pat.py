"""The mask ``pat``: its formula and losses against direct computations, its maps against what they are folded to."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from prunetune.config.presets import PhaseSteps
from prunetune.model.fold import Fold, flat, fold_model, fold_tensors, unflat
from prunetune.model.surgery import base_model
from tests.contracts.masks import context, make
from tests.support import logits, tiny_model

PHASES = PhaseSteps(warmup_end=2, freeze=22, total=30)
WANTED = 24  # of 48 dimensions: what 60% allows a llama with 6 query heads, in eights


def pat(tmp_path, **options):
    return make("pat", tmp_path, context(("hidden",), PHASES, kept="60%"), **options)


def statistics(mask, seed):
    generator = torch.Generator().manual_seed(seed)
    grad = {"hidden": torch.randn(48, generator=generator)}
    own = {name: 0.01 * torch.randn(t.shape, generator=generator) for name, t in mask.hybrid.named().items()}
    return type("Seen", (), {"grad": grad | own, "square": {"hidden": grad["hidden"].square()}})()


def run(mask, first, last):
    for step in range(first, last):
        mask.gates(step)
        mask.after_backward(step, statistics(mask, step))
        if step >= PHASES.warmup_end:
            mask.after_step(step, 1e-3)


def test_noise_does_not_undo_the_start_in_a_short_search(tmp_path):
    """Numbers that start apart are still in that order after gradients that say nothing."""
    mask = pat(tmp_path)
    noise = torch.Generator().manual_seed(7)
    for step in range(PHASES.freeze):
        mask.gates(step)
        seen = statistics(mask, step)
        if step < PHASES.warmup_end:
            seen.square["hidden"] = torch.full((48,), 10.0)
            seen.square["hidden"][:WANTED] = 1.0
        seen.grad["hidden"] = 1e-2 * torch.randn(48, generator=noise)
        mask.after_backward(step, seen)
    assert list(mask.plan({}).kept["hidden"]) == list(range(48 - WANTED, 48))
    assert pat(tmp_path, start="equal")._adam.param_groups[0]["lr"] > mask._adam.param_groups[0]["lr"]


@pytest.mark.parametrize("step", [3, 8, 12, 17])
def test_gates_follow_the_formula(tmp_path, step):
    mask = pat(tmp_path)
    run(mask, 0, step)
    theta, t = mask.state_dict()["theta.hidden"].double(), 10_000 * (step - 2) / 20
    steepness = 1 / (1 - math.log(t) / math.log(10_000) + 1e-6)
    wanted = 1 / (1 + torch.exp((-steepness * theta).clamp(max=10))) + max(0.5 - t / 10_000, 0)
    torch.testing.assert_close(mask.gates(step)["hidden"].double(), wanted.clamp(max=1), atol=1e-6, rtol=0)
    assert theta.unique().numel() > 10


def test_the_first_gates_are_open_and_the_last_ones_are_the_plan(tmp_path):
    mask = pat(tmp_path, start="equal")
    run(mask, 0, 2)
    torch.testing.assert_close(mask.gates(2)["hidden"], torch.ones(48))
    run(mask, 2, 2 + 16)  # four fifths of the search
    gate = mask.gates(18)["hidden"]
    assert set(gate.tolist()) == {0.0, 1.0}
    assert gate.sum() == WANTED
    theta = mask.state_dict()["theta.hidden"]
    run(mask, 18, 22)
    assert torch.equal(mask.state_dict()["theta.hidden"], theta), "the numbers stand still once the mask is fixed"
    assert torch.equal(mask.gates(22)["hidden"], gate)
    assert torch.nonzero(gate).flatten().tolist() == list(mask.plan({}).kept["hidden"])


def test_the_penalty_and_its_gradient_are_the_published_ones(tmp_path):
    mask = pat(tmp_path, active=10.0)
    theta = mask._theta["hidden"]
    with torch.no_grad():
        theta.copy_(torch.linspace(-0.7, 0.9, 48))
    positive = theta.detach() > 0
    count = int((theta >= 0).sum())
    penalty = mask.penalty(5)
    squares = (theta[positive] - 0.5).square().mean() + (theta[~positive] + 0.5).square().mean()
    assert float(penalty) == pytest.approx(10 * abs(count - WANTED) / WANTED + float(squares), rel=1e-6)
    [grad] = torch.autograd.grad(penalty, [theta])
    pull = torch.where(positive, (theta - 0.5) / positive.sum(), (theta + 0.5) / (~positive).sum())
    torch.testing.assert_close(grad, (2 * pull + 10 / WANTED * math.copysign(1, count - WANTED)).detach())


def test_the_task_gradient_takes_the_formulas_way(tmp_path):
    """A first step of Adam moves every number by the rate, against the gradient of its gate."""
    mask = pat(tmp_path, active=0.0, start="equal", learning_rate=1e-3)
    run(mask, 0, 2)
    seen = statistics(mask, 0)
    seen.grad["hidden"] = 100 * torch.sign(torch.randn(48, generator=torch.Generator().manual_seed(3)))
    mask.after_backward(2, seen)
    moved = mask.state_dict()["theta.hidden"]
    torch.testing.assert_close(moved, -1e-3 * torch.sign(seen.grad["hidden"]), atol=1e-5, rtol=0)


def test_maps_begin_as_nothing_and_orthonormal(tmp_path):
    mask = pat(tmp_path)
    assert len(mask.hybrid.maps) == 2 * 3
    assert float(mask.hybrid.identity_loss()) == pytest.approx(0, abs=1e-10)
    for left, scale, right in mask.hybrid.maps.values():
        assert left.shape == (48, 2)  # 5% of 48
        assert right.shape == (2, 48)
        assert not scale.any()
    run(mask, 0, 10)
    assert 0 < float(mask.hybrid.identity_loss()) < 0.1
    assert all(scale.any() for _, scale, _ in mask.hybrid.maps.values())


def test_the_identity_loss_is_that_of_all_maps(tmp_path):
    mask = pat(tmp_path)
    direct = 0.0
    for number, (left, _, right) in enumerate(mask.hybrid.maps.values()):
        with torch.no_grad():
            left += 0.1 * (number + 1)
            right[0] *= 2
        one = torch.eye(2)
        direct += float(((left.T @ left - one) ** 2).mean() + ((right @ right.T - one) ** 2).mean())
    assert float(mask.hybrid.identity_loss()) == pytest.approx(direct, rel=1e-5)


@pytest.mark.parametrize("stop", [0, 2, 5, 17, 20])
def test_a_restored_mask_has_the_same_future(tmp_path, stop):
    whole, resumed = pat(tmp_path), pat(tmp_path)
    run(whole, 0, stop)
    state = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    run(whole, stop, 22)
    run(resumed, 0, 3)
    resumed.load_state_dict(state)
    run(resumed, stop, 22)
    mine, other = whole.state_dict(), resumed.state_dict()
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)


def tuned(**changes):
    config = LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False, lora_bias=True, **changes)
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(attention_bias=True, mlp_bias=True), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0.0, 0.2)
    return model


def some_folds(model):
    generator = torch.Generator().manual_seed(4)
    paths = [f"model.layers.{i}.{name}" for i in range(3) for name in ("self_attn.o_proj", "mlp.down_proj")]
    return {path: Fold(*(0.3 * torch.randn(s, generator=generator) for s in ((48, 5), (5, 48)))) for path in paths}


def test_a_folded_model_is_the_one_with_maps_behind_its_linears():
    """Base, bias, adapters and their biases: (I + L R) of all of it."""
    model = tuned()
    folds = some_folds(model)
    before, handles = logits(model), []
    for path, fold in folds.items():
        hook = lambda _, __, y, fold=fold: y + y @ fold.right.T @ fold.left.T  # noqa: E731
        handles.append(base_model(model).get_submodule(path).register_forward_hook(hook))
    wanted = logits(model)
    for handle in handles:
        handle.remove()
    fold_model(base_model(model), unflat(flat(folds)))
    assert (wanted - before).abs().max() > 0.1
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=1e-5)


def test_files_of_adapters_are_folded_like_live_ones():
    model = tuned()
    folds = some_folds(model)
    names = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    fold_model(base_model(model), folds)
    found = fold_tensors(names, folds)
    live = dict(model.named_parameters())
    assert all(torch.equal(found[name], live[name]) for name in names)
    assert any(not torch.equal(found[name], names[name]) for name in names)
    assert all(torch.equal(found[name], names[name]) for name in names if "lora_A" in name or "q_proj" in name)

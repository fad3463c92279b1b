"""Adapters seen from the units: the gradient estimate against autograd on the merged weight, sums by hand."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from prunetune.model.adapters import AdapterView
from prunetune.model.architecture import describe
from prunetune.model.surgery import base_model
from prunetune.model.units import KINDS, sites
from tests.support import batch, tiny_model


def adapted(model_type="llama", rank=4, **changes):
    """A tiny model with random adapters, and its view."""
    config = LoraConfig(r=rank, lora_alpha=6, target_modules="all-linear", init_lora_weights=False, **changes)
    model = get_peft_model(tiny_model(model_type), config)
    arch = describe(base_model(model).config)
    return model, AdapterView(model, arch, sites(arch, KINDS))


def linear_of(view, layer, role):
    [found] = [linear for linear in view.linears if (linear.layer, linear.role) == (layer, role)]
    return found


def gradient_of_merged(model, view):
    """role of layer 1 -> autograd's gradient on W + s B A, as a weight of its own."""
    grads = {}
    for role in ("q", "v", "o", "up", "down"):
        linear = linear_of(view, 1, role)
        weight = linear.weight().requires_grad_()

        def use(module, args, output, weight=weight):
            return torch.nn.functional.linear(args[0], weight)

        handle = linear.module.register_forward_hook(use)
        loss = model(**batch(), labels=batch()["input_ids"]).loss
        [grads[role]] = torch.autograd.grad(loss, [weight])
        handle.remove()
    return grads


def test_the_estimate_is_what_the_merged_weights_gradient_gives_through_the_factors():
    """gA = s B'G and gB = s G A', with G autograd's gradient on the merged weight; so the estimate follows from G."""
    model, view = adapted()
    merged = gradient_of_merged(model, view)
    model(**batch(), labels=batch()["input_ids"]).loss.backward()
    for role, grad_OI in merged.items():
        linear = linear_of(view, 1, role)
        a, b, scale = linear.factors()
        assert scale == 1.5
        expected = scale * (grad_OI @ a.T @ a + b @ b.T @ grad_OI) - scale**2 * (grad_OI @ a.T @ b.T @ grad_OI)
        torch.testing.assert_close(linear.weight_gradient(), expected.detach(), rtol=1e-3, atol=1e-6)


def test_with_orthonormal_a_and_empty_b_the_estimate_is_the_gradient_itself():
    """The least lossy case: A square and orthonormal, B zero, as at the start of training with full rank."""
    model, view = adapted(rank=48)
    for linear in view.linears:
        a, b, _ = linear.factors()
        torch.nn.init.orthogonal_(a)
        torch.nn.init.zeros_(b)
    merged = gradient_of_merged(model, view)
    model(**batch(), labels=batch()["input_ids"]).loss.backward()
    for role in ("q", "v", "o", "up"):
        linear = linear_of(view, 1, role)
        expected = linear.factors()[2] * merged[role]
        torch.testing.assert_close(linear.weight_gradient(), expected, rtol=1e-3, atol=1e-6)


def test_weights_are_base_plus_scaled_delta():
    _, view = adapted()
    linear = linear_of(view, 2, "gate")
    expected = linear.module.base_layer.weight + linear.module.get_delta_weight("default")
    torch.testing.assert_close(linear.weight(), expected.detach())


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_units_own_rows_and_columns_as_the_surgery_cuts_them(model_type):
    """By hand, in a model of 6 query heads in 3 KV groups: query head h belongs to group h // 2."""
    _, view = adapted(model_type)
    width = 12 if model_type == "gemma2" else 8
    by_role = {role: linear_of(view, 0, role) for role in ("q", "k", "v", "o", "gate", "up", "down")}
    for role, linear in by_role.items():
        shape = linear.weight().shape
        matrix = torch.arange(shape.numel()).reshape(shape).double()
        sums = {owner.site: owner.sums(matrix) for owner in linear.owners}
        lines = matrix.sum(0) if role in ("o", "down") else matrix.sum(1)
        if role in ("gate", "up", "down"):
            assert torch.equal(sums["layers.0.mlp_channels"], lines)
        else:
            span = width if role in ("k", "v") else 2 * width
            by_hand = torch.stack([lines[g * span : (g + 1) * span].sum() for g in range(3)])
            assert torch.equal(sums["layers.0.kv_groups"], by_hand)
        if role in ("q", "o"):
            by_hand = torch.stack([lines[h * width : (h + 1) * width].sum() for h in range(6)])
            assert torch.equal(sums["layers.0.query_heads"], by_hand)
        else:
            assert "layers.0.query_heads" not in sums
        assert sums["layers"].tolist() == [float(matrix.sum()), 0.0, 0.0]


def test_linears_without_an_adapter_say_so():
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    arch = describe(base_model(model).config)
    view = AdapterView(model, arch, sites(arch, ("mlp_channels", "kv_groups")))
    assert {linear.role for linear in view.linears if linear.adapted} == {"q", "down"}
    plain = linear_of(view, 0, "up")
    assert torch.equal(plain.weight(), plain.module.weight.detach())

"""Slicing by name: PEFT names, optimizer moments, layers that leave, configs."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict

from prunetune.core.errors import PlanMismatchError, UnsupportedModelError
from prunetune.model.architecture import describe
from prunetune.model.plan import Plan
from prunetune.model.surgery import Surgery, base_model, slice_model
from prunetune.model.units import KINDS
from tests.support import MODEL_TYPES, VARIANTS, empty_model, random_plan, tiny_arch, tiny_config, tiny_model

LORA = LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)


@pytest.mark.parametrize("variant", VARIANTS)
def test_slicing_every_named_tensor_equals_slicing_the_live_model(variant):
    model_type, changes = VARIANTS[variant]
    model = get_peft_model(tiny_model(model_type, **changes), LORA)
    arch = describe(base_model(model).config)
    plan = random_plan(arch, seed=2)
    surgery = Surgery(arch, plan)
    by_name = {}
    for name, tensor in model.state_dict().items():
        sliced = surgery.slice_parameter(name, tensor)
        assert (sliced is None) == (surgery.rename(name) is None)
        if sliced is not None:
            by_name[surgery.rename(name)] = sliced.clone()
    slice_model(model, plan)
    live = model.state_dict()
    assert by_name.keys() == live.keys()
    for name, tensor in live.items():
        assert torch.equal(tensor, by_name[name]), name


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_saved_adapter_names_are_understood_too(model_type):
    """A saved adapter leaves out the adapter's name: ...q_proj.lora_A.weight."""
    model = get_peft_model(tiny_model(model_type), LORA)
    arch = describe(base_model(model).config)
    plan = random_plan(arch, seed=2)
    surgery = Surgery(arch, plan)
    saved = get_peft_model_state_dict(model)
    sliced = {
        surgery.rename(name): surgery.slice_parameter(name, tensor)
        for name, tensor in saved.items()
        if surgery.rename(name)
    }
    slice_model(model, plan)
    expected = get_peft_model_state_dict(model)
    assert sliced.keys() == expected.keys()
    assert all(torch.equal(sliced[name], expected[name]) for name in expected)


def test_optimizer_moments_are_cut_like_their_parameters():
    model = get_peft_model(tiny_model(), LORA)
    arch = describe(base_model(model).config)
    surgery = Surgery(arch, random_plan(arch, seed=3))
    name = "base_model.model.model.layers.{}.mlp.down_proj.lora_A.default.weight"
    layer, kept = surgery.layers[0], surgery.plan.kept[f"layers.{surgery.layers[0]}.mlp_channels"]
    moment = torch.arange(3 * 64.0).reshape(3, 64)
    assert torch.equal(surgery.slice_parameter(name.format(layer), moment), moment[:, list(kept)])
    [gone] = set(range(3)) - set(surgery.layers)
    assert surgery.slice_parameter(name.format(gone), moment) is None
    assert surgery.rename(name.format(gone)) is None


def test_which_features_each_kind_of_parameter_carries():
    arch = tiny_arch(attention_bias=True)
    plan = Plan({"layers.0.kv_groups": (1,)}, arch.fingerprint())
    cut, path = Surgery(arch, plan).slice_parameter, "model.layers.0.self_attn"
    group, head = slice(16, 32), slice(8, 16)
    q, k, o = torch.randn(48, 48), torch.randn(24, 48), torch.randn(48, 48)
    assert torch.equal(cut(f"{path}.q_proj.weight", q), q[group])
    assert torch.equal(cut(f"{path}.q_proj.bias", q[:, 0]), q[group, 0])
    assert torch.equal(cut(f"{path}.k_proj.weight", k), k[head])
    assert torch.equal(cut(f"{path}.v_proj.bias", k[:, 0]), k[head, 0])
    assert torch.equal(cut(f"{path}.o_proj.weight", o), o[:, group])
    assert torch.equal(cut(f"{path}.o_proj.bias", o[0]), o[0])
    b, a = torch.randn(48, 3), torch.randn(3, 48)
    assert torch.equal(cut(f"{path}.q_proj.lora_B.default.weight", b), b[group])
    assert torch.equal(cut(f"{path}.q_proj.lora_A.default.weight", a), a)
    assert torch.equal(cut(f"{path}.o_proj.lora_A.default.weight", a), a[:, group])
    assert torch.equal(cut(f"{path}.o_proj.lora_B.default.weight", b), b)
    assert torch.equal(cut(f"{path}.q_proj.base_layer.weight", q), q[group])
    assert torch.equal(cut("model.layers.1.self_attn.q_proj.weight", q), q)
    assert torch.equal(cut("model.layers.0.input_layernorm.weight", q[0]), q[0])
    assert torch.equal(cut("model.embed_tokens.weight", q), q)


@pytest.mark.parametrize(
    ("name", "renamed"),
    [
        ("model.layers.2.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"),
        ("base_model.model.model.layers.0.input_layernorm.weight",) * 2,
        ("base_model.model.model.layers.1.input_layernorm.weight", None),
        ("model.layers.1.self_attn.q_proj.bias", None),
        ("model.norm.weight",) * 2,
        ("lm_head.weight",) * 2,
        ("model.embed_tokens.weight",) * 2,
    ],
)
def test_layers_that_stay_close_up(name, renamed):
    arch = tiny_arch()
    assert Surgery(arch, Plan({"layers": (0, 2)}, arch.fingerprint())).rename(name) == renamed


def test_two_digit_layers_are_not_mixed_up():
    arch = tiny_arch(num_hidden_layers=12)
    surgery = Surgery(arch, Plan({"layers": (1, 10, 11)}, arch.fingerprint()))
    assert surgery.rename("model.layers.10.mlp.up_proj.weight") == "model.layers.1.mlp.up_proj.weight"
    assert surgery.rename("model.layers.1.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight"
    assert surgery.rename("model.layers.0.mlp.up_proj.weight") is None


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_rewritten_config_makes_a_model_of_the_sliced_shapes(model_type):
    config = tiny_config(model_type)
    arch = describe(config)
    plan = random_plan(arch, seed=6)
    values = {**config.to_dict(), **Surgery(arch, plan).config_values()}
    values.pop("model_type")
    model = tiny_model(model_type)
    slice_model(model, plan)
    empty = empty_model(type(config)(**values))
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    if hasattr(config, "layer_types"):
        assert values["layer_types"] == [config.layer_types[i] for i in plan.kept_layers(arch)]


def test_what_cannot_be_sliced_is_refused_before_anything_changes():
    model = tiny_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(PlanMismatchError, match="another model"):
        slice_model(model, random_plan(tiny_arch(intermediate_size=80)))
    model.quantization_method = "gptq"
    with pytest.raises(UnsupportedModelError, match="bfloat16"):
        slice_model(model, random_plan(tiny_arch()))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_plan_that_keeps_everything_changes_nothing():
    model = tiny_model()
    before = dict(model.named_parameters())
    arch = describe(model.config)
    full = {f"layers.{i}.{kind}": tuple(range(n)) for i in range(3)
            for kind, n in (("mlp_channels", 64), ("kv_groups", 3), ("query_heads", 6))}  # fmt: skip
    slice_model(model, Plan({**full, "layers": (0, 1, 2)}, arch.fingerprint()))
    assert all(p is before[name] for name, p in model.named_parameters())


def test_frozen_and_trained_parameters_stay_so():
    model = get_peft_model(tiny_model(), LORA)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    slice_model(model, random_plan(describe(base_model(model).config), KINDS[:2]))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert all(p.is_contiguous() for p in model.parameters())

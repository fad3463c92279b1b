"""A closed gate equals a removed unit: logits, caches, generation and reloaded folders, in every family."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from prunetune.model.architecture import describe
from prunetune.model.budget import plan_shape, total_params
from prunetune.model.gates import GateSet
from prunetune.model.surgery import base_model, slice_model
from prunetune.model.units import KINDS, sites
from tests.support import MODEL_TYPES, VARIANTS, batch, count, hard_gates, logits, random_plan, tiny_model

# Logits have a standard deviation of about 1.
TOLERANCE = 2e-5
ADAPTERS = {
    "lora": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    "rslora": LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules="all-linear", init_lora_weights=False),
    "patterns": LoraConfig(
        r=4,
        target_modules=["q_proj", "o_proj", "up_proj", "down_proj"],
        rank_pattern={"down_proj": 7, "layers.1.self_attn.q_proj": 2},
        alpha_pattern={"o_proj": 11},
        init_lora_weights=False,
    ),
    "biases": LoraConfig(r=2, target_modules="all-linear", bias="all", lora_bias=True, init_lora_weights=False),
}


def mask(model, plan, kinds=KINDS):
    """Closes the plan's units with gates; returns what removes the gates."""
    base = base_model(model)
    arch = describe(base.config)
    gates = GateSet(base, sites(arch, kinds))
    gates.attach()
    gates.set(hard_gates(arch, gates.sites, plan))
    return gates


def randomise_adapters(model):
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2


def assert_masked_equals_sliced(model, plan, kinds=KINDS):
    inputs = batch(2, 11, padding=3)
    real = inputs["attention_mask"].bool()
    open_ = logits(model, inputs)
    gates = mask(model, plan, kinds)
    masked = logits(model, inputs)
    gates.detach()
    arch = slice_model(model, plan)
    sliced = logits(model, inputs)
    assert (open_ - masked)[real].abs().max() > 1e-2, "the plan must change something"
    torch.testing.assert_close(sliced[real], masked[real], atol=TOLERANCE, rtol=TOLERANCE)
    return arch


@pytest.mark.parametrize("kinds", [*((kind,) for kind in KINDS), KINDS], ids=lambda kinds: "+".join(kinds))
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family_and_kind(variant, kinds):
    model_type, changes = VARIANTS[variant]
    if kinds == ("query_heads",) and "num_key_value_heads" in changes:
        kinds = ("kv_groups", "query_heads")  # one query head a group: it can only leave with its group
    model = tiny_model(model_type, **changes)
    plan = random_plan(describe(model.config), kinds, seed=7)
    arch = assert_masked_equals_sliced(model, plan, kinds)
    assert count(model) == total_params(arch, plan_shape(arch, plan))
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == arch.tied_embeddings


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_with_adapters(model_type, adapter):
    model = get_peft_model(tiny_model(model_type), ADAPTERS[adapter]).eval()
    randomise_adapters(model)
    plan = random_plan(describe(base_model(model).config), seed=8)
    assert_masked_equals_sliced(model, plan)
    if adapter != "biases":  # PEFT merges an adapter's bias only where the base has one too
        apart = logits(model)
        torch.testing.assert_close(logits(model.merge_and_unload()), apart, atol=TOLERANCE, rtol=TOLERANCE)


def test_two_adapters_are_both_sliced():
    model = get_peft_model(tiny_model(), ADAPTERS["lora"])
    model.add_adapter("second", ADAPTERS["rslora"])
    randomise_adapters(model)
    plan = random_plan(describe(base_model(model).config), seed=9)
    gates = mask(model, plan)
    expected = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        expected[name] = logits(model.eval())
    gates.detach()
    slice_model(model, plan)
    for name in ("default", "second"):
        model.set_adapter(name)
        torch.testing.assert_close(logits(model), expected[name], atol=TOLERANCE, rtol=TOLERANCE)
    assert not torch.equal(expected["default"], expected["second"])


@pytest.mark.parametrize("model_type", [kind for kind in MODEL_TYPES if kind != "gemma2"])  # it has eager only
def test_other_attention_and_other_seeds(model_type):
    for seed in (1, 2):
        model = tiny_model(model_type, seed=seed, attention="sdpa")
        assert_masked_equals_sliced(model, random_plan(describe(model.config), seed=seed))


def generate(model, inputs, cache):
    with torch.no_grad():
        return model.generate(
            **inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False, use_cache=cache, pad_token_id=0
        )


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_generation_with_and_without_cache_and_left_padding(model_type):
    model = tiny_model(model_type, tie_word_embeddings=False)
    plan = random_plan(describe(model.config), seed=4)
    inputs = batch(3, 8, padding=2, seed=3)
    gates = mask(model, plan)
    masked = generate(model, inputs, cache=True)
    gates.detach()
    slice_model(model, plan)
    sliced = generate(model, inputs, cache=True)
    assert torch.equal(sliced, masked)
    assert torch.equal(sliced, generate(model, inputs, cache=False))
    assert len(set(sliced[:, 8:].flatten().tolist())) > 4, "the continuation must not be trivial"
    for row in range(3):
        alone = {name: value[row : row + 1, 2 * row :] for name, value in inputs.items()}
        assert torch.equal(generate(model, alone, cache=True)[0], sliced[row, 2 * row :])


@pytest.mark.parametrize("kinds", [("kv_groups", "mlp_channels"), KINDS], ids=["widths", "all"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_saved_sliced_model_reloads_equal(tmp_path, model_type, kinds):
    model = tiny_model(model_type)
    arch = describe(model.config)
    plan = random_plan(arch, kinds, seed=5)
    slice_model(model, plan)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert torch.equal(logits(again), logits(model))
    assert count(again) == count(model)
    shape, config = plan_shape(arch, plan), describe(again.config)
    assert (config.layers, config.kv_groups, config.query_heads) == (shape.layers, shape.kv_groups, shape.query_heads)
    assert (config.head_dim, config.mlp_channels) == (arch.head_dim, shape.mlp_channels)
    inputs = batch(2, 6, padding=2)
    assert torch.equal(generate(again, inputs, cache=True), generate(model, inputs, cache=True))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_gradients_of_the_sliced_model_are_the_masked_ones(model_type):
    """Training may go on after slicing as if nothing had happened to the parameters that stay."""
    model = get_peft_model(tiny_model(model_type), ADAPTERS["lora"])
    randomise_adapters(model)
    plan = random_plan(describe(base_model(model).config), ("mlp_channels", "kv_groups"), seed=6)
    gates = mask(model, plan)
    inputs = batch()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    masked = {name: p.grad.norm() for name, p in model.named_parameters() if p.grad is not None}
    gates.detach()
    slice_model(model, plan)
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    sliced = {name: p.grad.norm() for name, p in model.named_parameters() if p.grad is not None}
    assert masked.keys() == sliced.keys()
    for name, norm in sliced.items():
        # What was cut away had no gradient, so the norms agree as well.
        torch.testing.assert_close(norm, masked[name], atol=1e-5, rtol=1e-3)

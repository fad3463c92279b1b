"""Counting by arithmetic equals counting real models: parameters, bytes, FLOPs, KV cache."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from prunetune.config.schema import TargetConfig
from prunetune.core.errors import BudgetError
from prunetune.model.architecture import describe
from prunetune.model.budget import (
    Budget,
    Shape,
    decoder_params,
    describe_kept,
    flops_per_token,
    full_shape,
    kept_fractions,
    kv_cache_bytes_per_token,
    plan_shape,
    total_params,
    weight_bytes,
)
from prunetune.model.legality import config_values
from prunetune.model.plan import Plan
from tests.support import (
    MODEL_TYPES,
    VARIANTS,
    batch,
    count,
    empty_model,
    random_plan,
    tiny_arch,
    tiny_config,
    tiny_model,
)

SHAPES = [None, Shape(3, 3, 1, 64), Shape(2, 2, 1, 1), Shape(1, 1, 1, 17), Shape(3, 1, 2, 40)]
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def of_shape(config, arch, shape):
    """An empty model with the shape's widths."""
    values = {**config.to_dict(), **config_values(arch, shape)}
    values.pop("model_type")
    if "layer_types" in values:
        values["layer_types"] = values["layer_types"][: shape.layers]
    return empty_model(type(config)(**values))


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_and_bytes_equal_real_models(variant):
    model_type, changes = VARIANTS[variant]
    config = tiny_config(model_type, **changes)
    arch = describe(config)
    for shape in SHAPES:
        shape = shape or full_shape(arch)
        model = of_shape(config, arch, shape)
        assert count(model) == total_params(arch, shape)
        decoder = sum(p.numel() for name, p in model.named_parameters() if name.split(".")[-2] in LINEARS)
        assert decoder == decoder_params(arch, shape)
        for dtype in ("float32", "bfloat16", "float16"):
            cast = model.to(getattr(torch, dtype))
            assert sum(p.numel() * p.element_size() for p in cast.parameters()) == weight_bytes(arch, shape, dtype)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("shape", [None, Shape(2, 2, 1, 17)])
def test_flops_equal_what_torch_counts(model_type, shape):
    config = tiny_config(model_type, num_hidden_layers=3)
    arch = describe(config)
    shape = shape or full_shape(arch)
    model = of_shape(config, arch, shape).to_empty(device="cpu")
    model.set_attn_implementation("eager")
    length = 10
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False)
    # Biases are additions that the counter leaves out; rotary tables are a product of width 1.
    expected = length * flops_per_token(arch, shape, context=length)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


def test_flops_grow_with_context_and_width():
    arch = tiny_arch()
    full = full_shape(arch)
    assert flops_per_token(arch, full, 100) - flops_per_token(arch, full, 0) == 100 * 3 * 4 * 48
    assert flops_per_token(arch, Shape(3, 3, 2, 32), 0) < flops_per_token(arch, full, 0)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_cache_bytes_equal_a_real_cache(model_type):
    model = tiny_model(model_type)
    arch = describe(model.config)
    length = 3  # within every sliding window
    with torch.no_grad():
        cache = model(**batch(1, length), use_cache=True).past_key_values
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert stored == length * kv_cache_bytes_per_token(arch, full_shape(arch), "float32")


def test_shape_of_a_plan():
    arch = tiny_arch()
    assert plan_shape(arch, random_plan(arch)) == Shape(2, 2, 1, 40)
    assert plan_shape(arch, Plan({}, arch.fingerprint())) == full_shape(arch) == Shape(3, 3, 2, 64)
    only_heads = Plan({f"layers.{i}.query_heads": (0, 2, 5) for i in range(3)}, arch.fingerprint())
    assert plan_shape(arch, only_heads) == Shape(3, 3, 1, 64)


def test_widths_that_differ_between_layers_are_refused():
    arch = tiny_arch()
    with pytest.raises(BudgetError, match="different widths in different layers"):
        plan_shape(arch, Plan({"layers.0.mlp_channels": (0, 1)}, arch.fingerprint()))
    uniform = Plan({"layers": (1, 2), "layers.0.mlp_channels": (0, 1)}, arch.fingerprint())
    assert plan_shape(arch, uniform) == Shape(2, 3, 2, 64), "the width of a layer that leaves does not matter"


@pytest.mark.parametrize("percent", range(1, 101))
def test_a_percentage_means_exactly_that_share(percent):
    """0.29 * 100 is 28.999... in floating point: one parameter short can cost a whole alignment step."""
    arch = tiny_arch(hidden_size=50, head_dim=10, num_attention_heads=5, num_key_value_heads=5, intermediate_size=100)
    whole = decoder_params(arch, full_shape(arch))
    assert whole % 100 == 0
    limit = Budget.from_target(arch, TargetConfig(kept=f"{percent}%"), "bfloat16").limit
    assert limit == whole * percent // 100


def test_metrics_of_the_three_targets():
    arch = tiny_arch()
    full = full_shape(arch)
    assert Budget.from_target(arch, TargetConfig(params=40_000), "float32") == Budget("total", 40_000, "float32")
    size = Budget.from_target(arch, TargetConfig(size="90KB"), "bfloat16")
    assert (size.metric, size.limit, size.cost(arch, full)) == ("bytes", 90_000, 2 * total_params(arch, full))
    assert Budget.from_target(arch, TargetConfig(kept=1.0), "float32").limit == decoder_params(arch, full)
    assert Budget.from_target(arch, TargetConfig(params=total_params(arch, full)), "float32").limit


@pytest.mark.parametrize("target", [{"params": "1M"}, {"size": "1MB"}])
def test_more_than_the_model_has_is_refused(target):
    with pytest.raises(BudgetError, match=rf"target\.{next(iter(target))} is 1\.0 ?M.*the whole model has only"):
        Budget.from_target(tiny_arch(), TargetConfig(**target), "bfloat16")


def test_the_way_to_the_budget():
    arch = tiny_arch()
    budget = Budget.from_target(arch, TargetConfig(kept="50%"), "bfloat16")
    whole = decoder_params(arch, full_shape(arch))
    assert budget.at(arch, 0.0).limit == whole
    assert budget.at(arch, 1.0) == budget
    assert budget.at(arch, 0.5).limit == pytest.approx(0.75 * whole, abs=1)


def test_both_denominators_are_shown():
    arch = tiny_arch()
    shape = Shape(3, 3, 2, 32)
    fractions = kept_fractions(arch, shape)
    assert fractions["decoder"] < fractions["total"] < 1
    assert describe_kept(arch, shape) == "71.4% of decoder, 76.3% of total parameters"

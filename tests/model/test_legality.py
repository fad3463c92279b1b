"""Our list of config classes that refuse head counts against what the classes really do."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from prunetune.model.architecture import describe
from prunetune.model.budget import Shape
from prunetune.model.legality import config_values, heads_legal
from tests.support import MODEL_TYPES, tiny_config


def class_accepts(config, values):
    raw = {**config.to_dict(), **values}
    try:
        again = AutoConfig.for_model(**raw)
        if hasattr(again, "validate"):
            again.validate()
    except Exception:  # whatever the class raises, it refuses
        return False
    return all(getattr(again, name) == value for name, value in values.items())


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_legal_head_counts_are_those_the_config_class_takes(model_type):
    config = tiny_config(model_type, num_attention_heads=12, num_key_value_heads=12, head_dim=4)
    arch = describe(config)
    for groups in range(1, 13):
        values = config_values(arch, Shape(arch.layers, groups, 1, 40))
        assert heads_legal(arch, groups) == class_accepts(config, values), groups


def test_the_list_is_not_trivial():
    assert not heads_legal(describe(tiny_config("llama")), 5)
    assert heads_legal(describe(tiny_config("qwen2")), 5)


def test_the_dense_count_is_always_legal():
    """A llama whose heads do not divide its width exists only outside transformers 5, but then it does exist."""
    raw = {**tiny_config("llama").to_dict(), "num_attention_heads": 5, "num_key_value_heads": 5}
    assert heads_legal(describe(raw), 5)
    assert not heads_legal(describe(raw), 7)


def test_the_head_size_is_always_written():
    arch = describe(tiny_config("llama"))
    assert config_values(arch, Shape(2, 1, 2, 16)) == {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 16,
    }

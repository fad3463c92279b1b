"""What is read from config.json agrees with what the transformers class makes of the same file."""

from __future__ import annotations

import json

import pytest
from transformers import AutoConfig

from prunetune.model.architecture import describe
from tests.support import MODEL_TYPES, VARIANTS, empty_model, tiny_config


def facts(arch):
    return {**arch.fingerprint(), "tied": arch.tied_embeddings, "bias": arch.attention_bias, "mlp_bias": arch.mlp_bias}


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_object_saved_file_and_model_agree(tmp_path, variant):
    model_type, changes = VARIANTS[variant]
    config = tiny_config(model_type, **changes)
    config.save_pretrained(tmp_path)
    arch = describe(json.loads((tmp_path / "config.json").read_text()))
    assert facts(arch) == facts(describe(config))
    model = empty_model(config)
    layer = model.get_submodule(arch.family.layers)[0]
    assert layer.self_attn.q_proj.out_features == arch.query_heads * arch.head_dim
    assert layer.self_attn.k_proj.out_features == arch.kv_groups * arch.head_dim
    assert layer.mlp.up_proj.out_features == arch.mlp_channels
    assert (layer.self_attn.q_proj.bias is not None) == arch.attention_bias
    assert (layer.self_attn.o_proj.bias is not None) == (arch.attention_bias and arch.family.bias_on_o)
    assert (layer.mlp.down_proj.bias is not None) == arch.mlp_bias
    assert config.tie_word_embeddings == arch.tied_embeddings


@pytest.mark.parametrize("absent", ["head_dim", "num_key_value_heads", "tie_word_embeddings", "attention_bias"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_key_left_out_of_config_json_means_what_the_class_takes_it_for(model_type, absent):
    """Old config.json files leave keys out; guessing another width than the class does would miscount everything."""
    raw = {
        "model_type": model_type,
        "hidden_size": 4096,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 64,
        "num_key_value_heads": 32,
        "head_dim": 64,
        "tie_word_embeddings": False,
        "vocab_size": 99,
    }
    raw.pop(absent, None)
    assert facts(describe(raw)) == facts(describe(AutoConfig.for_model(**raw)))


def test_null_means_absent():
    raw = {**tiny_config("llama").to_dict(), "num_key_value_heads": None, "head_dim": None}
    arch = describe(raw)
    assert (arch.kv_groups, arch.head_dim) == (6, 8)

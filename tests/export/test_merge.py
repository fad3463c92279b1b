import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from prunetune.core.errors import UnsupportedModelError
from prunetune.export.merge import merged_tensors, ties_hold, untied_sources
from prunetune.model.surgery import base_model
from tests.export.export_support import FAMILIES, adapt, base_of

IDS = torch.arange(3, 27)[None]


def reload(tuned):
    base = base_model(tuned)
    config = type(base.config).from_dict(base.config.to_dict())
    config.tie_word_embeddings = ties_hold(tuned)
    state = dict(merged_tensors(tuned, torch.float32))
    return type(base).from_pretrained(None, config=config, state_dict=state).eval()


@torch.no_grad()
def difference(tuned, plain):
    return float((tuned(IDS).logits - plain(IDS).logits).abs().max())


VARIANTS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}, "alpha_pattern": {"down_proj": 3}},
    "attention_only": {"target_modules": ["q_proj", "v_proj"]},
    "trained_norms": {"modules_to_save": ["norm", "input_layernorm"]},
    "trained_head": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "o_proj"]},
    "trained_embedding": {"modules_to_save": ["embed_tokens"]},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["llama", "llama_tied_mha", "gemma3_text"])
def test_merged_equals_live_for_every_variant(family, variant):
    tuned = adapt(base_of(family), **VARIANTS[variant])
    assert difference(tuned, reload(tuned)) < 2e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_equals_live_for_every_family(family):
    tuned = adapt(base_of(family))
    with tuned.disable_adapter():
        assert difference(tuned, reload(tuned)) < 2e-5
        plain = tuned(IDS).logits
    assert difference(tuned, reload(tuned)) < 2e-5
    assert (tuned(IDS).logits - plain).abs().max() > 0.1


def test_lora_bias_is_merged():
    tuned = adapt(base_of("llama_tied_mha"), target_modules=["q_proj", "v_proj"], lora_bias=True)
    assert difference(tuned, reload(tuned)) < 2e-5


def test_several_active_adapters_add_up():
    tuned = adapt(base_of("llama"))
    tuned.add_adapter("second", LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=False))
    tuned.base_model.set_adapter(["default", "second"])
    tuned.eval()
    assert difference(tuned, reload(tuned)) < 2e-5


def test_transposed_weights_are_merged_in_their_own_orientation():
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=99, n_positions=64))
    for options in ({}, {"use_dora": True}):
        tuned = adapt(GPT2LMHeadModel(base.config), target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, **options)
        assert difference(tuned, reload(tuned)) < 2e-5


def test_an_adapter_that_is_merged_already_is_not_added_again():
    tuned = adapt(base_of("llama"))
    before = dict(merged_tensors(tuned, torch.float32))
    tuned.merge_adapter()
    after = dict(merged_tensors(tuned, torch.float32))
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


def test_names_are_the_plain_models_and_ties_come_once():
    tied, untied = adapt(base_of("qwen2")), adapt(base_of("llama"))
    for tuned, head in ((tied, False), (untied, True)):
        names = {source.name for source in untied_sources(tuned)}
        plain = set(base_of("qwen2" if tuned is tied else "llama").state_dict())
        assert names == plain - (set() if head else {"lm_head.weight"})


@pytest.mark.parametrize("variant", ["trained_head", "embedding", "trained_embedding"])
def test_a_tie_that_training_broke_is_written_out(variant):
    tuned = adapt(base_of("llama_tied_mha"), **VARIANTS[variant])
    assert not ties_hold(tuned)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= {source.name for source in untied_sources(tuned)}


def test_the_sum_is_rounded_once():
    tuned = adapt(base_of("llama").bfloat16())
    name = "model.layers.0.mlp.up_proj"
    layer = base_model(tuned).get_submodule(name)
    a, b = layer.lora_A["default"].weight.float(), layer.lora_B["default"].weight.float()
    exact = layer.base_layer.weight.float() + 2.0 * b @ a
    merged = dict(merged_tensors(tuned, torch.bfloat16))[f"{name}.weight"]
    assert torch.equal(merged, exact.bfloat16())


def test_the_model_is_left_as_it_was():
    tuned = adapt(base_of("llama"), use_dora=True)
    before = {name: value.clone() for name, value in tuned.state_dict().items()}
    list(merged_tensors(tuned, torch.float16))
    assert all(torch.equal(before[name], value) for name, value in tuned.state_dict().items())


def test_unsaved_buffers_are_left_out():
    base = base_of("llama")
    base.model.register_buffer("scratch", torch.ones(2), persistent=False)
    base.model.register_buffer("kept", torch.ones(2))
    names = {name for name, _ in merged_tensors(base, torch.float32)}
    assert "model.kept" in names
    assert not {"model.scratch", "model.rotary_emb.inv_freq"} & names


def test_quantised_weights_are_refused():
    base = base_of("llama")
    layer = base.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"up_proj\.weight.*4 or 8 bit"):
        untied_sources(base)


@pytest.mark.parametrize(
    "options", [{"target_modules": ["embed_tokens"], "use_dora": True}, {"trainable_token_indices": [5]}]
)
def test_what_has_no_exact_merge_is_refused(options):
    base = base_of("llama")
    options = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options}
    with pytest.raises(UnsupportedModelError, match="embed_tokens"):
        untied_sources(get_peft_model(base, LoraConfig(**options)))

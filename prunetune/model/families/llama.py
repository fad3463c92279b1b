"""Llama and everything that uses its class: Llama 1-3, SmolLM, TinyLlama."""

from prunetune.model.families import FAMILIES
from prunetune.model.families._table import gated_decoder

FAMILIES.register("llama")(
    gated_decoder("llama", ("llama",), attention_bias="attention_bias", bias_on_o=True, mlp_bias="mlp_bias")
)

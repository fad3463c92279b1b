"""Qwen3: a norm of head size on q and k, shared by all heads, so units do not touch it."""

from prunetune.model.families import FAMILIES
from prunetune.model.families._table import gated_decoder

FAMILIES.register("qwen3")(
    gated_decoder(
        "qwen3",
        ("qwen3",),
        attention_bias="attention_bias",
        bias_on_o=True,
        qk_norm=True,
        per_layer_lists=("layer_types",),
        defaults={"head_dim": 128, "num_key_value_heads": 32},
    )
)

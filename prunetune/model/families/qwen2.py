"""Qwen2 and Qwen2.5: biased q, k and v."""

from prunetune.model.families import FAMILIES
from prunetune.model.families._table import gated_decoder

FAMILIES.register("qwen2")(
    gated_decoder(
        "qwen2",
        ("qwen2",),
        attention_bias=True,
        per_layer_lists=("layer_types",),
        defaults={"num_key_value_heads": 32},
    )
)

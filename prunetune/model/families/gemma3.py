"""Gemma 3, text only: Gemma 2's block with a norm of head size on q and k."""

from prunetune.model.families import FAMILIES
from prunetune.model.families._table import gated_decoder
from prunetune.model.families.gemma2 import AFTER_NORM, NORMS

FAMILIES.register("gemma3")(
    gated_decoder(
        "gemma3",
        ("gemma3_text",),
        attention_bias="attention_bias",
        bias_on_o=True,
        writers=AFTER_NORM,
        norms=NORMS,
        gain_offset=1.0,
        scales_embeddings=True,
        qk_norm=True,
        per_layer_lists=("layer_types",),
        defaults={"head_dim": 256, "num_key_value_heads": 4},
    )
)

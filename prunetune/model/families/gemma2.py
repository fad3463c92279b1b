"""Gemma 2: a norm after each sublayer too, so that norm is what writes to the residual stream."""

from prunetune.model.families import FAMILIES
from prunetune.model.families._table import gated_decoder

# A soft gate before the norm would be normalised away: the layer gate has to sit behind it.
AFTER_NORM = ("post_attention_layernorm", "post_feedforward_layernorm")
NORMS = ("input_layernorm", "pre_feedforward_layernorm", *AFTER_NORM)

FAMILIES.register("gemma2")(
    gated_decoder(
        "gemma2",
        ("gemma2",),
        attention_bias="attention_bias",
        bias_on_o=True,
        writers=AFTER_NORM,
        norms=NORMS,
        gain_offset=1.0,
        scales_embeddings=True,
        per_layer_lists=("layer_types",),
        defaults={"head_dim": 256, "num_key_value_heads": 4},
    )
)

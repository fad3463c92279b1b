"""Mistral: Llama's block with an optional sliding window."""

from prunetune.model.families import FAMILIES
from prunetune.model.families._table import gated_decoder

FAMILIES.register("mistral")(gated_decoder("mistral", ("mistral",), defaults={"num_key_value_heads": 8}))

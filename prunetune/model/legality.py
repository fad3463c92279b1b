"""Which widths a stock config of the target class can say."""

from __future__ import annotations

from typing import Any

from prunetune.model.architecture import Architecture
from prunetune.model.budget import Shape

# Families whose transformers 5 config refuses hidden_size % num_attention_heads != 0. Kept so that planning
# needs no transformers import; tests compare it with what the classes really do.
HEADS_DIVIDE_HIDDEN = frozenset({"llama", "gemma2", "gemma3_text"})


def heads_legal(arch: Architecture, query_heads: int, hidden: int = 0) -> bool:
    """Whether a stock config of this class can say this number of query heads beside this hidden size (0: its own).

    The dense model's own widths are always legal: its config exists.
    """
    if query_heads == arch.query_heads and hidden in (0, arch.hidden_size):
        return True
    return arch.model_type not in HEADS_DIVIDE_HIDDEN or (hidden or arch.hidden_size) % query_heads == 0


def config_values(arch: Architecture, shape: Shape) -> dict[str, Any]:
    """The config.json fields that say a uniform shape. head_dim is always written: it must not be derived."""
    hidden = {"hidden_size": shape.hidden} if shape.hidden else {}
    return {
        **hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.query_heads,
        "num_key_value_heads": shape.kv_groups,
        "head_dim": arch.head_dim,
        "intermediate_size": shape.mlp_channels,
    }


def bias_fields(arch: Architecture, role: str) -> dict[str, Any] | None:
    """The config.json fields that give a consumer (``o`` or ``down``) a bias.

    Returns:
        The fields to set; none if it has a bias already. None: no config of this class says such a bias.
    """
    family = arch.family
    rule = (family.attention_bias if family.bias_on_o else False) if role == "o" else family.mlp_bias
    if isinstance(rule, bool):
        return {} if rule else None
    has = arch.attention_bias if role == "o" else arch.mlp_bias
    return {} if has else {rule: True}

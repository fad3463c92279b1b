"""The form of a family's table: roles, and for every kind of unit the tensor rows and columns it owns.

Shapes: D hidden, F MLP width, H query heads, K KV heads, G = H/K queries per KV head, hd head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

Role = Literal["q", "k", "v", "o", "gate", "up", "down"]
Span = Literal["channel", "head", "group"]

# Roles that read the residual stream, and those that write to it.
_READERS: tuple[Role, ...] = ("q", "k", "v", "gate", "up")
_WRITERS: tuple[Role, ...] = ("o", "down")


@dataclass(frozen=True)
class Rows:
    """A unit owns output features of ``role``: rows of its weight (and bias), rows of lora_B.

    ``span`` says how many consecutive features one unit is: a channel (1), a head (hd), a group (G * hd).
    """

    role: Role
    span: Span


@dataclass(frozen=True)
class Columns:
    """A unit owns input features of ``role``: columns of its weight, columns of lora_A. Gates sit here."""

    role: Role
    span: Span


@dataclass(frozen=True)
class Writers:
    """A layer owns everything under its path; its gate multiplies the outputs of these modules, which are
    what the layer adds to the residual stream."""

    modules: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """What prunetune must know about an architecture.

    Args:
        name: what `prunetune list families` shows.
        model_types: values of ``config.model_type`` that this table covers.
        layers: path of the list of decoder layers.
        modules: role -> module path inside a layer.
        units: kind -> what one unit owns.
        per_layer_lists: config fields with one entry a layer; they are cut when layers leave.
        hidden: what one dimension of the residual stream owns in every layer; see also ``norms``.
        norms: the norms over the residual stream inside a layer.
        gain_offset: what the class adds to a norm's weight before it multiplies.
        scales_embeddings: whether the class multiplies embeddings by the root of the hidden size.
        attention_bias: config field that adds biases to q, k, v (and o, if ``bias_on_o``); a bool is constant.
        defaults: what the config class takes for ``head_dim`` and ``num_key_value_heads`` where config.json leaves
            them out, if that is a number of its own and not derived from the other widths.
    """

    ROLES: ClassVar[tuple[str, ...]] = ("q", "k", "v", "o", "gate", "up", "down")

    name: str
    model_types: tuple[str, ...]
    layers: str
    modules: dict[str, str]
    units: dict[str, tuple[Rows | Columns | Writers, ...]]
    attention_bias: str | bool
    bias_on_o: bool
    mlp_bias: str | bool
    qk_norm: bool
    hidden: tuple[Rows | Columns, ...]
    norms: tuple[str, ...]
    gain_offset: float = 0.0
    scales_embeddings: bool = False
    per_layer_lists: tuple[str, ...] = ()
    defaults: dict[str, int] = field(default_factory=dict)

    embedding: ClassVar[str] = "model.embed_tokens"
    final_norm: ClassVar[str] = "model.norm"
    head: ClassVar[str] = "lm_head"

    def parts(self, kind: str) -> tuple[Rows | Columns | Writers, ...]:
        """What one unit of a kind owns in a layer."""
        return self.hidden if kind == "hidden" else self.units[kind]


def gated_decoder(
    name: str,
    model_types: tuple[str, ...],
    *,
    attention_bias: str | bool = False,
    bias_on_o: bool = False,
    mlp_bias: str | bool = False,
    writers: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj"),
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm"),
    gain_offset: float = 0.0,
    scales_embeddings: bool = False,
    qk_norm: bool = False,
    per_layer_lists: tuple[str, ...] = (),
    defaults: dict[str, int] | None = None,
) -> Family:
    """The common shape: grouped-query attention and a gated MLP, each behind a norm and a residual add."""
    return Family(
        name=name,
        model_types=model_types,
        layers="model.layers",
        modules={
            "q": "self_attn.q_proj",
            "k": "self_attn.k_proj",
            "v": "self_attn.v_proj",
            "o": "self_attn.o_proj",
            "gate": "mlp.gate_proj",
            "up": "mlp.up_proj",
            "down": "mlp.down_proj",
        },
        units={
            "mlp_channels": (Rows("gate", "channel"), Rows("up", "channel"), Columns("down", "channel")),
            "kv_groups": (Rows("q", "group"), Rows("k", "head"), Rows("v", "head"), Columns("o", "group")),
            "query_heads": (Rows("q", "head"), Columns("o", "head")),
            "layers": (Writers(writers),),
        },
        attention_bias=attention_bias,
        bias_on_o=bias_on_o,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        hidden=(
            *(Columns(role, "channel") for role in _READERS),
            *(Rows(role, "channel") for role in _WRITERS),
        ),
        norms=norms,
        gain_offset=gain_offset,
        scales_embeddings=scales_embeddings,
        per_layer_lists=per_layer_lists,
        defaults=defaults or {},
    )

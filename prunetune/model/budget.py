"""Parameters, bytes, FLOPs and KV cache of any shape, by arithmetic on config.json; no torch here.

Two denominators, never mixed: ``decoder`` is the parameters of the decoder's linear layers (q, k, v, o, gate,
up, down), the papers' convention; ``total`` is everything, tied embeddings counted once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prunetune.config.schema import TargetConfig
from prunetune.core.errors import BudgetError
from prunetune.core.sizes import format_bytes, format_count, format_fraction
from prunetune.model.architecture import Architecture
from prunetune.model.plan import Plan
from prunetune.model.units import HIDDEN

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, order=True)
class Shape:
    """Uniform widths: the same in every layer that stays. ``hidden`` 0: the residual stream is as wide as it was."""

    layers: int
    kv_groups: int
    queries_per_group: int
    mlp_channels: int
    hidden: int = 0

    @property
    def query_heads(self) -> int:
        """Query heads of a layer."""
        return self.kv_groups * self.queries_per_group

    def width(self, arch: Architecture) -> int:
        """The hidden size."""
        return self.hidden or arch.hidden_size

    def within(self, other: Shape, arch: Architecture) -> bool:
        """Whether this is another shape that is nowhere wider than ``other``."""
        widths = [
            (shape.layers, shape.kv_groups, shape.queries_per_group, shape.mlp_channels, shape.width(arch))
            for shape in (self, other)
        ]
        return widths[0] != widths[1] and all(mine <= its for mine, its in zip(*widths))

    def __str__(self) -> str:
        heads = f"{self.query_heads} query heads in {self.kv_groups} KV groups"
        hidden = f", hidden {self.hidden}" if self.hidden else ""
        return f"{self.layers} layers x ({heads}, MLP {self.mlp_channels}){hidden}"


def full_shape(arch: Architecture) -> Shape:
    """The dense model's shape."""
    return Shape(arch.layers, arch.kv_groups, arch.queries_per_group, arch.mlp_channels)


def plan_shape(arch: Architecture, plan: Plan) -> Shape:
    """The shape a plan leads to.

    Raises:
        BudgetError: widths differ between layers, which no stock config can say.
    """
    layers = plan.kept_layers(arch)
    stream = len(plan.kept_units(arch, -1, HIDDEN))
    hidden, shapes = 0 if stream == arch.hidden_size else stream, set()
    for layer in layers:
        groups = len(plan.kept_units(arch, layer, "kv_groups"))
        heads = len(plan.kept_query_heads(arch, layer))
        channels = len(plan.kept_units(arch, layer, "mlp_channels"))
        shapes.add(Shape(len(layers), groups, heads // groups, channels, hidden))
    if len(shapes) != 1:
        raise BudgetError(
            "the plan has different widths in different layers; stock model classes have one width for all layers. "
            "Make a plan with uniform widths."
        )
    return shapes.pop()


def layer_decoder_params(arch: Architecture, shape: Shape) -> int:
    """Decoder-linear parameters of one layer, biases included."""
    d, hd = shape.width(arch), arch.head_dim
    q, kv = shape.query_heads * hd, shape.kv_groups * hd
    weights = d * (2 * q + 2 * kv) + 3 * d * shape.mlp_channels
    biases = 0
    if arch.attention_bias:
        biases += q + 2 * kv + (d if arch.family.bias_on_o else 0)
    if arch.mlp_bias:
        biases += 2 * shape.mlp_channels + d
    return weights + biases


def decoder_params(arch: Architecture, shape: Shape) -> int:
    """Parameters of all decoder linears."""
    return shape.layers * layer_decoder_params(arch, shape)


def total_params(arch: Architecture, shape: Shape) -> int:
    """All parameters; tied embeddings counted once."""
    d = shape.width(arch)
    embeddings = arch.vocab_size * d * (1 if arch.tied_embeddings else 2)
    norms = shape.layers * (len(arch.family.norms) * d + (2 * arch.head_dim if arch.family.qk_norm else 0)) + d
    return decoder_params(arch, shape) + embeddings + norms


def weight_bytes(arch: Architecture, shape: Shape, dtype: str) -> int:
    """Bytes of the exported weights."""
    return total_params(arch, shape) * DTYPE_BYTES[dtype]


def flops_per_token(arch: Architecture, shape: Shape, context: int) -> int:
    """Forward FLOPs of one token with ``context`` tokens before it: linears, attention products, LM head."""
    linears = 2 * decoder_params(arch, shape)
    attention = shape.layers * 4 * context * shape.query_heads * arch.head_dim
    return linears + attention + 2 * arch.vocab_size * shape.width(arch)


def kv_cache_bytes_per_token(arch: Architecture, shape: Shape, dtype: str) -> int:
    """Bytes of keys and values that one token leaves in the cache."""
    return shape.layers * 2 * shape.kv_groups * arch.head_dim * DTYPE_BYTES[dtype]


Metric = Literal["decoder", "total", "bytes"]


@dataclass(frozen=True)
class Budget:
    """An upper bound on one metric of a shape."""

    metric: Metric
    limit: int
    dtype: str

    @classmethod
    def from_target(cls, arch: Architecture, target: TargetConfig, dtype: str) -> Budget:
        """The bound that the user's target means for this model, bytes counted in ``dtype``.

        Raises:
            BudgetError: the target asks for more than the model has.
        """
        full = full_shape(arch)
        if target.kept is not None:
            # 0.41 * 75000 is 30749.999...: rounding first keeps a whole number from losing an alignment step.
            return cls("decoder", int(round(target.kept * decoder_params(arch, full), 2)), dtype)
        metric: Metric = "total" if target.params is not None else "bytes"
        limit = target.params if target.params is not None else target.size
        assert limit is not None
        budget = cls(metric, limit, dtype)
        if limit > budget.cost(arch, full):
            shown, field = _show(metric, budget.cost(arch, full)), "params" if metric == "total" else "size"
            raise BudgetError(
                f"target.{field} is {_show(metric, limit)}, but the whole model has only {shown}; set less than {shown}"
            )
        return budget

    def cost(self, arch: Architecture, shape: Shape) -> int:
        """The metric's value for a shape."""
        if self.metric == "decoder":
            return decoder_params(arch, shape)
        if self.metric == "total":
            return total_params(arch, shape)
        return weight_bytes(arch, shape, self.dtype)

    def at(self, arch: Architecture, fraction_of_way: float) -> Budget:
        """The bound part of the way from the dense model (0) to this one (1)."""
        full = self.cost(arch, full_shape(arch))
        return Budget(self.metric, round(full + (self.limit - full) * fraction_of_way), self.dtype)

    def show(self) -> str:
        """The bound for a person."""
        return _show(self.metric, self.limit)


def _show(metric: Metric, value: int) -> str:
    return format_bytes(value) if metric == "bytes" else f"{format_count(value)} {metric} parameters"


def kept_fractions(arch: Architecture, shape: Shape) -> dict[str, float]:
    """Both kept fractions of a shape: ``decoder`` and ``total``."""
    full = full_shape(arch)
    return {
        "decoder": decoder_params(arch, shape) / decoder_params(arch, full),
        "total": total_params(arch, shape) / total_params(arch, full),
    }


def describe_kept(arch: Architecture, shape: Shape) -> str:
    """Both kept fractions with their denominators, for a person."""
    fractions = kept_fractions(arch, shape)
    return (
        f"{format_fraction(fractions['decoder'])} of decoder, {format_fraction(fractions['total'])} of total parameters"
    )

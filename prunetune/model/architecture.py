"""The facts about a model that counting and planning need, read from config.json alone; no torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from prunetune.core.errors import PlanMismatchError, UnsupportedModelError
from prunetune.model.families import Family, family_of


@dataclass(frozen=True)
class Architecture:
    """Widths of a dense model. G = ``queries_per_group`` query heads share one KV head."""

    family: Family = field(repr=False)
    model_type: str
    hidden_size: int
    layers: int
    query_heads: int
    kv_groups: int
    head_dim: int
    mlp_channels: int
    vocab_size: int
    tied_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    config: dict[str, Any] = field(repr=False, compare=False)

    @property
    def queries_per_group(self) -> int:
        """Query heads that share one KV head."""
        return self.query_heads // self.kv_groups

    def fingerprint(self) -> dict[str, Any]:
        """The widths that a plan must find again in the model it is applied to."""
        return {
            "family": self.family.name,
            "hidden_size": self.hidden_size,
            "layers": self.layers,
            "query_heads": self.query_heads,
            "kv_groups": self.kv_groups,
            "head_dim": self.head_dim,
            "mlp_channels": self.mlp_channels,
            "vocab_size": self.vocab_size,
        }

    def require(self, fingerprint: dict[str, Any]) -> None:
        """Raises PlanMismatchError unless ``fingerprint`` is this model's."""
        mine = self.fingerprint()
        wrong = [
            f"{key} {fingerprint.get(key)} there, {mine[key]} here" for key in mine if fingerprint.get(key) != mine[key]
        ]
        if wrong:
            raise PlanMismatchError(
                "the plan was made for another model: "
                + "; ".join(wrong)
                + ". Use the base model that the plan was made with, or make a new plan for this one."
            )


def describe(config: Any) -> Architecture:
    """Reads the facts from a config.json mapping or a transformers config.

    Raises:
        UnsupportedModelError: the architecture has no unit table, or its config lacks a width.
    """
    raw: dict[str, Any] = dict(config) if isinstance(config, dict) else dict(config.to_dict())
    model_type = str(raw.get("model_type", ""))
    family = family_of(model_type)
    hidden = _width(raw, model_type, "hidden_size")
    heads = _width(raw, model_type, "num_attention_heads")
    groups = _or_default(raw, family, "num_key_value_heads", heads)
    if heads % groups:
        raise UnsupportedModelError(
            f"{model_type}: {heads} query heads cannot be shared out over {groups} KV heads; check config.json"
        )
    return Architecture(
        family=family,
        model_type=model_type,
        hidden_size=hidden,
        layers=_width(raw, model_type, "num_hidden_layers"),
        query_heads=heads,
        kv_groups=groups,
        head_dim=_or_default(raw, family, "head_dim", hidden // heads),
        mlp_channels=_width(raw, model_type, "intermediate_size"),
        vocab_size=_width(raw, model_type, "vocab_size"),
        tied_embeddings=bool(raw.get("tie_word_embeddings", _tied_by_default(model_type))),
        attention_bias=_flag(raw, family.attention_bias),
        mlp_bias=_flag(raw, family.mlp_bias),
        config=raw,
    )


def _width(raw: dict[str, Any], model_type: str, key: str) -> int:
    value = raw.get(key)
    if type(value) is not int or value < 1:
        raise UnsupportedModelError(
            f"{model_type}: config.json has {key} = {value!r}; one whole number is needed "
            "(a width per layer is not supported as a starting point)"
        )
    return value


def _or_default(raw: dict[str, Any], family: Family, key: str, derived: int) -> int:
    # A key that is left out means the class's default; null means the value derived from the others.
    if key not in raw:
        return family.defaults.get(key, derived)
    return derived if raw[key] is None or raw[key] == 0 else _width(raw, str(raw.get("model_type", "")), key)


def _flag(raw: dict[str, Any], rule: str | bool) -> bool:
    return rule if isinstance(rule, bool) else bool(raw.get(rule, False))


def _tied_by_default(model_type: str) -> bool:
    # Gemma's config class ties unless told otherwise and may leave the key out of config.json.
    return model_type.startswith("gemma")

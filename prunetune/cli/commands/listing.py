"""`prunetune list`: what can be named in a configuration."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from prunetune.core.registry import Registry


class Subject(str, Enum):  # noqa: UP042 - typer shows the values of a (str, Enum)
    """What can be listed."""

    masks = "masks"
    families = "families"
    units = "units"
    scores = "scores"
    allocation = "allocation"
    compensation = "compensation"
    samples = "samples"
    tokens = "tokens"
    deltas = "deltas"
    ranks = "ranks"
    engines = "engines"


_UNITS = {
    "mlp_channels": "one channel of an MLP: a row of gate and up, a column of down",
    "kv_groups": "a key/value head with all its query heads",
    "query_heads": "a query head; as many leave in every KV group",
    "layers": "a whole layer, attention and MLP",
    "hidden": "a dimension of the residual stream, in every layer; not among the default units",
}


def listing(what: Annotated[Subject, typer.Argument(help="what to list")]) -> None:
    """List the methods, model families or unit kinds that a configuration can name."""
    from prunetune.core.console import console

    for table in _TABLES[what]():
        console().print(table)


def _masks() -> list[Table]:
    from prunetune.config.schema import MaskConfig
    from prunetune.methods.masks import MASKS

    return _methods(MASKS, "mask", MaskConfig().method, ("needs", "cost"))


def _scores() -> list[Table]:
    from prunetune.methods.scores import SCORES

    return _methods(SCORES, "score", "wanda", ("needs", "cost", "kinds"))


def _allocation() -> list[Table]:
    from prunetune.methods.allocation import ALLOCATIONS

    return _methods(ALLOCATIONS, "allocation", "uniform", ("needs", "cost"))


def _compensation() -> list[Table]:
    from prunetune.config.schema import CompensationConfig
    from prunetune.methods.compensation import COMPENSATIONS

    return _methods(COMPENSATIONS, "compensation", CompensationConfig().method, ("needs", "cost"))


def _samples() -> list[Table]:
    from prunetune.methods.samples import SAMPLES

    return _methods(SAMPLES, "data.samples")


def _tokens() -> list[Table]:
    from prunetune.methods.tokens import TOKENS

    return _methods(TOKENS, "data.tokens")


def _deltas() -> list[Table]:
    from prunetune.methods.deltas import DELTAS

    return _methods(DELTAS, "delta", "identity")


def _ranks() -> list[Table]:
    from prunetune.config.schema import RanksConfig
    from prunetune.methods.ranks import RANKS

    return _methods(RANKS, "lora.ranks", RanksConfig().method, ("needs", "cost"))


def _engines() -> list[Table]:
    from prunetune.config.engines import ENGINES, FEATURES, refusal

    table = _table("Engines: --launch", "name", "every process holds", "needs", "on a CPU")
    for name, held in ENGINES.items():
        table.add_row(name, held.summary, held.package or "", "yes" if held.on_cpu else "")
    combined = _table("What works under which", "feature", *ENGINES)
    refused = _table("What is refused, and why", "feature", "reason")
    for name, feature in FEATURES.items():
        combined.add_row(name, *("" if refusal(engine, name) else "yes" for engine in ENGINES))
        for reason, engines in feature.reasons().items():
            refused.add_row(name, f"{', '.join(engines)}: {reason}; {feature.instead}")
    return [table, combined, refused]


def _families() -> list[Table]:
    from prunetune.model.families import FAMILIES

    table = _table("Families: architectures with a unit table", "family", "model_type in config.json", "prunable")
    for name, family in FAMILIES.items():
        table.add_row(name, ", ".join(family.model_types), ", ".join([*family.units, "hidden"]))
    return [table]


def _units() -> list[Table]:
    from prunetune.config.schema import TargetConfig

    table = _table("Units: target.units", "kind", "one unit is", "default")
    default = TargetConfig.model_fields["units"].default
    for kind, meaning in _UNITS.items():
        table.add_row(kind, meaning, "yes" if kind in default else "")
    return [table]


def _methods(
    registry: Registry[Any], section: str, default: str | None = None, facts: tuple[str, ...] = ()
) -> list[Table]:
    """Names and options of a registry; the default or, if there is none, the online methods are marked.

    ``facts``: further attributes of the methods, told below what a method does.
    """
    from rich.markup import escape

    mark = "default" if default else "online"
    table = _table(f"{section}.method", "name", "what it does")
    options = _table(f"Options of these methods: {section}.KEY", "method", "key", "default", "meaning")
    for name, method in registry.items():
        marked = name == default if default else method.online
        told = [f"{fact}: {_words(getattr(method, fact))}" for fact in facts if getattr(method, fact)]
        below = "; ".join([*told, *([method.paper] if method.paper else [])])
        what = escape(registry.summary(name)) + (f"\n[dim]{escape(below)}[/dim]" if below else "")
        beside = [*([mark] if marked else []), *(f"or {alias}" for alias in registry.aliases(name))]
        table.add_row(name + "".join(f"\n[dim]({word})[/dim]" for word in beside), what)
        for key, field in method.Options.model_fields.items():
            value = "required" if field.is_required() else _shown(field.default)
            options.add_row(name, key, value, field.description or "")
    return [table, options] if options.row_count else [table]


def _words(value: Any) -> str:
    """A text as it is, several names as a list."""
    return value if isinstance(value, str) else ", ".join(value if isinstance(value, tuple) else sorted(value))


def _shown(value: Any) -> str:
    """A default as it is written in YAML."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, no_wrap=index == 0, style="bold" if index == 0 else "")
    return table


_TABLES = {
    Subject.masks: _masks,
    Subject.families: _families,
    Subject.units: _units,
    Subject.scores: _scores,
    Subject.allocation: _allocation,
    Subject.compensation: _compensation,
    Subject.samples: _samples,
    Subject.tokens: _tokens,
    Subject.deltas: _deltas,
    Subject.ranks: _ranks,
    Subject.engines: _engines,
}

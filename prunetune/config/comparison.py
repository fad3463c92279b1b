"""A comparison of recipes: a run's configuration with one more section, ``compare``, that says what varies.

Everything outside that section (data, steps, batch, adapters, learning rate) is the same for every recipe.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from prunetune.config.load import Check, load_config
from prunetune.config.recipe import BASE, DENSE, JOINT, ONE_SHOT, REFERENCES, Recipe
from prunetune.config.schema import Fraction, RunConfig, Section
from prunetune.config.source import Source, read_source
from prunetune.core.errors import ConfigError, Problem

SECTION = "compare"


class CompareSection(Section):
    """What varies between the runs of a comparison."""

    kept: tuple[Fraction, ...] = Field((0.8, 0.6), min_length=1, description="budgets, fractions of the decoder")
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="each recipe is run once a seed")
    recipes: tuple[Recipe, ...] = Field(min_length=1, description="see Recipe")


@dataclass(frozen=True)
class Cell:
    """One recipe with one budget and one seed.

    Args:
        id: names its folder and its result.
        label: for people; the same for all budgets and seeds.
        kind: base, dense, joint or one_shot.
        kept: the budget; None for the references, which have none.
        score, allocation: of one_shot; empty otherwise.
        config: the run's settings, ``folder`` and ``seed`` included.
        options: ``score``, ``allocation`` -> that method's own options.
        tokens: that one_shot calibrates on, whatever its compensation; None: the default.
    """

    id: str
    label: str
    kind: str
    kept: float | None
    seed: int
    score: str
    allocation: str
    config: RunConfig
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tokens: int | None = None


@dataclass(frozen=True)
class Comparison:
    """All cells in the order in which they are run, and the folder of their results."""

    folder: Path
    cells: tuple[Cell, ...]


def load_comparison(path: Path, overrides: Sequence[str] = (), checks: Sequence[Check] = ()) -> Comparison:
    """The comparison in ``path``; arguments as in ``load_config``.

    Raises:
        ConfigError: every fault found in the section, or in the settings of its first faulty recipe.
    """
    source = read_source(path, overrides)
    section = _section(source)
    cells: dict[str, Cell] = {}
    common = load_config(path, [*overrides, "target.kept=1.0"], checks, without=[SECTION])
    for recipe in section.recipes:
        for kept, seed in itertools.product(section.kept, section.seeds):
            for cell in _cells(recipe, kept, seed, common, path, overrides, checks):
                # The references have no budget, so they come once a seed.
                cells.setdefault(cell.id, cell)
    return Comparison(common.folder, tuple(cells.values()))


def _section(source: Source) -> CompareSection:
    raw = source.values.get(SECTION)
    if not isinstance(raw, dict):
        message = f"has no section `{SECTION}`; write one with kept, seeds and recipes below the run's settings"
        raise ConfigError([Problem(message, where=source.name)])
    try:
        return CompareSection.model_validate(raw)
    except ValidationError as error:
        # The location of a union's member ends in names that the file does not have.
        problems = {
            (SECTION, *details["loc"][:3]): details["msg"].removeprefix("Value error, ") for details in error.errors()
        }
        # A list counts faulty items as missing; what is wrong with them is enough.
        inner = {key[:length] for key in problems for length in range(1, len(key))}
        found = [source.problem(key, message) for key, message in problems.items() if key not in inner]
        raise ConfigError(found) from None


def _cells(
    recipe: Recipe,
    kept: float,
    seed: int,
    common: RunConfig,
    path: Path,
    overrides: Sequence[str],
    checks: Sequence[Check],
) -> Iterator[Cell]:
    for kind, method, allocation, compensation in _variants(recipe):
        words = [word for word in (kind, method, allocation, compensation) if word]
        label = _label(kind, method, allocation, compensation, recipe.set)
        budget = None if kind in REFERENCES else kept
        tail = [f"{budget:g}"] if budget is not None else []
        if recipe.set:
            tail.append(hashlib.sha256(json.dumps(recipe.set, sort_keys=True).encode()).hexdigest()[:6])
        name = re.sub(r"[^\w.]+", "-", "-".join([*words, *tail, f"s{seed}"]))
        own = [
            f"target.kept={1.0 if budget is None else budget}",
            f"seed={seed}",
            f"folder={common.folder / 'cells' / name}",
            *([f"mask={method}"] if kind == JOINT else []),
            *([f"compensation={compensation}"] if compensation else []),
            *(f"{key}={json.dumps(value)}" for key, value in recipe.run_settings().items()),
        ]
        config = load_config(path, [*overrides, *own], checks, without=[SECTION])
        if kind != ONE_SHOT:
            yield Cell(name, label, kind, budget, seed, "", "", config)
            continue
        tokens = common.compensation.options().get("tokens")
        options = recipe.method_options()
        yield Cell(name, label, kind, budget, seed, method, allocation, config, options, tokens)


def _variants(recipe: Recipe) -> Iterator[tuple[str, str, str, str]]:
    """(kind, method, allocation, compensation) of every combination of the recipe's lists."""
    if recipe.reference:
        yield recipe.reference, "", "", ""
    for method, compensation in itertools.product(recipe.joint, recipe.compensation):
        yield JOINT, method, "", compensation
    for names in itertools.product(recipe.one_shot, recipe.allocation, recipe.compensation):
        yield ONE_SHOT, *names


def _label(kind: str, method: str, allocation: str, compensation: str, further: dict[str, Any]) -> str:
    if kind in REFERENCES:
        label = {BASE: "base", DENSE: "dense LoRA"}[kind]
    elif kind == JOINT:
        label = f"joint {method}, {compensation}"
    else:
        label = f"one-shot {method}, {allocation}, {compensation}"
    return label + "".join(f", {key}={value}" for key, value in further.items())

"""A comparison of recipes: a run's configuration with one more section, ``compare``, that says what varies.

Everything outside that section (data, steps, batch, adapters, learning rate) is the same for every recipe.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from prunetune.config.load import Check, load_config
from prunetune.config.schema import Fraction, RunConfig, Section
from prunetune.config.source import Source, read_source
from prunetune.core.errors import ConfigError, Problem

SECTION = "compare"
BASE, DENSE, JOINT, ONE_SHOT = "base", "dense", "joint", "one_shot"
REFERENCES = (BASE, DENSE)

Names = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]


class Recipe(Section):
    """One way to get a smaller model, or several: lists of names stand for every combination.

    Example:
        >>> Recipe(one_shot=["wanda", "taylor"], compensation="refit").one_shot
        ('wanda', 'taylor')
    """

    reference: str | None = Field(None, description="base (as it is) or dense (plain LoRA); nothing is removed")
    joint: Names = Field((), description="masks that are trained while the adapters learn")
    one_shot: Names = Field((), description="scores by which the base is pruned before LoRA trains for all the steps")
    allocation: Names = Field(("uniform",), description="how one_shot spreads the budget")
    compensation: Names = Field(("refit",), description="what the weights that stay do about the others")
    set: dict[str, Any] = Field(default_factory=dict, description="further settings of this recipe, by dotted key")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        """``- dense`` is ``- {reference: dense}``."""
        return {"reference": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_kind(self) -> Recipe:
        kinds = [name for name in ("reference", JOINT, ONE_SHOT) if getattr(self, name)]
        if len(kinds) != 1:
            raise ValueError(
                f"a recipe is base, dense, `joint: MASK` or `one_shot: SCORE`; set here: {', '.join(kinds) or 'none'}"
            )
        if self.reference and self.reference not in REFERENCES:
            raise ValueError(f"{self.reference!r} is not base or dense; for a mask write `joint: {self.reference}`")
        return self


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
    """

    id: str
    label: str
    kind: str
    kept: float | None
    seed: int
    score: str
    allocation: str
    config: RunConfig

    def fingerprint(self) -> str:
        """Digest of everything that the result depends on."""
        settings = self.config.model_dump(mode="json", exclude={"folder"})
        return hashlib.sha256(json.dumps([self.id, settings], sort_keys=True).encode()).hexdigest()[:16]


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
    folder = load_config(path, [*overrides, "target.kept=1.0"], checks, without=[SECTION]).folder
    for recipe in section.recipes:
        for kept, seed in itertools.product(section.kept, section.seeds):
            for cell in _cells(recipe, kept, seed, folder, path, overrides, checks):
                # The references have no budget, so they come once a seed.
                cells.setdefault(cell.id, cell)
    return Comparison(folder, tuple(cells.values()))


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
        raise ConfigError([source.problem(key, message) for key, message in problems.items()]) from None


def _cells(
    recipe: Recipe, kept: float, seed: int, folder: Path, path: Path, overrides: Sequence[str], checks: Sequence[Check]
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
            f"folder={folder / 'cells' / name}",
            *([f"mask={method}"] if kind == JOINT else []),
            *([f"compensation={compensation}"] if compensation else []),
            *(f"{key}={json.dumps(value)}" for key, value in recipe.set.items()),
        ]
        config = load_config(path, [*overrides, *own], checks, without=[SECTION])
        score = method if kind == ONE_SHOT else ""
        yield Cell(name, label, kind, budget, seed, score, allocation, config)


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

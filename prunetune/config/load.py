"""From a YAML file and overrides to a RunConfig, or to all that is wrong with them at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from prunetune.config import rules
from prunetune.config.messages import explain
from prunetune.config.schema import RunConfig
from prunetune.config.source import KeyPath, Source, read_source
from prunetune.core.errors import ConfigError, Problem

Check = Callable[[RunConfig], list[Problem]]

# Stand-ins for required sections that are missing or faulty, so that the rules can look at everything else.
_STAND_INS: dict[str, dict[str, Any]] = {"model": {"name": "unnamed"}, "target": {"kept": 1.0}}


def load_config(
    path: Path | None,
    overrides: Sequence[str] = (),
    checks: Sequence[Check] = (),
    *,
    without: Sequence[str] = (),
) -> RunConfig:
    """The configuration in ``path`` with ``key=value`` overrides on top.

    Args:
        path: YAML file; None to start from the overrides alone.
        overrides: for example ``["target.kept=60%", "train.max_steps=80"]``; they win over the file, and a
            budget given here replaces the file's budget whatever its kind.
        checks: further rules, for what this layer cannot know (which methods exist); each returns Problems
            whose ``field`` is a dotted key, and the place is filled in here.
        without: top-level sections of the file that are another reader's.

    Raises:
        ConfigError: every fault found, each with ``file:line`` or the override it comes from.

    Example:
        >>> load_config(None, ["model=smollm2-135m", "target=60%"]).target.kept
        0.6
    """
    source = read_source(path, overrides)
    for section in without:
        source.values.pop(section, None)
    config, faults = _validate(source)
    problems = [*source.problems, *(source.problem(key, message) for key, message in faults.items())]
    if config is not None:
        problems += _checked(config, source, [rules.check, *checks], set(faults))
    if problems or config is None:
        raise ConfigError(sorted(problems, key=_order))
    return config


def _validate(source: Source) -> tuple[RunConfig | None, dict[KeyPath, str]]:
    """The configuration, and the faults. With faults it is built from what remains without the faulty keys,
    so that the cross-field rules still see the rest; None if even that fails."""
    faults: dict[KeyPath, str] = {}
    values = source.values
    for _ in range(4):  # a section's own rules speak up only when its keys are right, hence several rounds
        try:
            return RunConfig.model_validate(values), faults
        except ValidationError as error:
            found = explain(error, source)
        for key, message in found.items():
            faults.setdefault(key, message)
        values = _without(values, list(found))
    return None, faults


def _without(values: dict[str, Any], paths: list[KeyPath]) -> dict[str, Any]:
    kept: dict[str, Any] = _pruned(values, paths, ())
    for section, stand_in in _STAND_INS.items():
        if any(path[0] == section for path in paths if path):
            others = kept.get(section)
            # Keys that were right stay, except the budget: with a faulty one no statement about it is safe.
            kept[section] = {**(others if isinstance(others, dict) else {}), **stand_in}
            if section == "target":
                kept[section].pop("params", None)
                kept[section].pop("size", None)
    return kept


def _pruned(value: Any, paths: list[KeyPath], here: KeyPath) -> Any:
    """``value`` without the keys in ``paths``; a list with a faulty item goes as a whole."""
    if not isinstance(value, dict):
        return value
    broken = {path[: len(here) + 1] for path in paths if path[: len(here)] == here and _ends_here(path, here)}
    return {key: _pruned(inner, paths, (*here, key)) for key, inner in value.items() if (*here, key) not in broken}


def _ends_here(path: KeyPath, here: KeyPath) -> bool:
    rest = path[len(here) + 1 :]
    return not rest or isinstance(rest[0], int)


def _checked(config: RunConfig, source: Source, checks: Sequence[Check], faults: set[KeyPath]) -> list[Problem]:
    """What the rules find, with places, less what concerns keys that are known to be faulty already."""
    problems = []
    for check in checks:
        for problem in check(config):
            key: KeyPath = tuple(problem.field.split(".")) if problem.field else ()
            if not any(key[: len(fault)] == fault or fault[: len(key)] == key for fault in faults if key):
                problems.append(source.problem(key, problem.message))
    return problems


def _order(problem: Problem) -> tuple[str, int, str]:
    """By file and line, overrides last."""
    file, _, line = problem.where.rpartition(":")
    if line.isdigit() and not problem.where.startswith("override"):
        return (f"0{file}", int(line), problem.field)
    return ("1" if problem.where.startswith("override") else "0" + problem.where, 0, problem.field)

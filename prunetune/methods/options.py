"""Options of a single method: declared beside it, checked with the same care as the main schema."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from prunetune.core.errors import ConfigError, Problem, suggest


class MethodOptions(BaseModel):
    """Base of every method's options; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


O = TypeVar("O", bound=MethodOptions)  # noqa: E741 - a type variable, not a number


def parse_options(section: str, method: str, options: type[O], given: Mapping[str, Any]) -> O:
    """The method's options with defaults filled in.

    Raises:
        ConfigError: all unknown keys (with suggestions) and bad values at once.
    """
    try:
        return options(**given)
    except ValidationError as error:
        raise ConfigError([_problem(section, method, options, fault) for fault in error.errors()]) from error


def problems_of(build: Callable[[], object]) -> list[Problem]:
    """The problems that building a method raises; none if it can be built."""
    try:
        build()
    except ConfigError as error:
        return list(error.problems)
    return []


def _problem(section: str, method: str, options: type[MethodOptions], fault: Any) -> Problem:
    key = ".".join(str(part) for part in fault["loc"])
    field = f"{section}.{key}" if key else section
    if fault["type"] == "extra_forbidden":
        known = options.model_fields
        hint = suggest(key, known) if known else "it has no options"
        return Problem(f"{method!r} has no such option; {hint}", field)
    if fault["type"] == "missing":
        about = options.model_fields[str(fault["loc"][0])].description or "it has no default"
        return Problem(f"{method!r} needs this option: {about}", field)
    return Problem(f"{fault['msg']} (set: {fault['input']!r})", field)

"""Turning what pydantic found into sentences: what was set, why it cannot work, what to set instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from prunetune.config.schema import MethodSection, RunConfig
from prunetune.config.source import KeyPath, Source, dotted
from prunetune.config.upstream import OWN_SETTING, sft_fields
from prunetune.core.errors import suggest

# What a missing key is for, with an example.
_REQUIRED = {
    "model": "name the base model, for example `model: smollm2-135m`",
    "model.name": "name the base model, for example `model: smollm2-135m`",
    "target": "say how small the model becomes, for example `target: 60%`",
}
# pydantic's error types, by what would have been right.
_WANTED = {
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "tuple_type": "a list, for example [a, b]",
    "dict_type": "a group of `key: value` lines",
    "model_type": "a group of `key: value` lines",
    "model_attributes_type": "a group of `key: value` lines",
}
# Names that other tools use for the same thing.
_ALIASES = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "lr": "learning_rate",
}
_BOUNDS = {
    "greater_than_equal": ("ge", "too small", "at least"),
    "greater_than": ("gt", "too small", "more than"),
    "less_than_equal": ("le", "too large", "at most"),
    "less_than": ("lt", "too large", "less than"),
}


def explain(error: ValidationError, source: Source) -> dict[KeyPath, str]:
    """One sentence for every faulty key of a RunConfig, by the key's path."""
    messages: dict[KeyPath, str] = {}
    for details in error.errors():
        path = _schema_path(details["loc"])
        # A union reports once per member (text, list of texts); one sentence is enough.
        messages.setdefault(path, _sentence(path, details, source))
    return messages


def section_at(path: KeyPath) -> type[BaseModel] | None:
    """The model class of the section at ``path``; None if it is not a section."""
    section: Any = RunConfig
    for part in path:
        field = section.model_fields.get(part) if section else None
        annotation = field.annotation if field else None
        section = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    return section


def unknown_key(path: KeyPath) -> str:
    """What to write instead of the unknown key at ``path``."""
    key, section = str(path[-1]), section_at(path[:-1])
    here = list(section.model_fields) if section else []
    parent = dotted(path[:-1])
    prefix = f"{parent}." if parent else ""
    near = [_ALIASES[key]] if _ALIASES.get(key) in here else difflib.get_close_matches(key, here, n=1, cutoff=0.75)
    if near:
        return f"unknown key; did you mean {prefix}{near[0]}?"
    if elsewhere := [place for place in _all_keys() if place.rsplit(".", 1)[-1] == key]:
        return f"unknown key here; did you mean {' or '.join(elsewhere)}?"
    if key in OWN_SETTING:
        return f"unknown key; {OWN_SETTING[key]} sets it"
    if key in sft_fields():
        return f"unknown key; {key} is a field of trl.SFTConfig: set it as train.sft.{key}"
    return f"unknown key; {suggest(key, here)}"


def shown(value: Any) -> str:
    """A value as a person would type it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return "nothing" if value is None else repr(value) if isinstance(value, str) else str(value)


def _all_keys() -> Iterator[str]:
    for name, field in RunConfig.model_fields.items():
        yield name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from (f"{name}.{key}" for key in field.annotation.model_fields)


def _schema_path(location: tuple[str | int, ...]) -> KeyPath:
    """The part of pydantic's location that is the user's; union members and the like are cut off."""
    path: KeyPath = ()
    for part in location:
        section = section_at(path)
        inside_list = isinstance(part, int) and section is None
        if section is None and not inside_list:
            break
        path = (*path, part)
    return path


def _sentence(path: KeyPath, details: Mapping[str, Any], source: Source) -> str:
    kind, context = details["type"], details.get("ctx", {})
    raw = source.get(path)
    value = shown(raw if raw is not None else details["input"])
    if kind == "missing":
        return f"is missing; {_REQUIRED.get(dotted(path), _description(path))}"
    if kind == "extra_forbidden":
        return unknown_key(path)
    if kind == "value_error":
        return str(context["error"])
    if kind in _BOUNDS:
        limit, fault, relation = _BOUNDS[kind]
        bound = f"{context[limit]:.0%}" if "%" in value else f"{context[limit]:g}"
        return f"{value} is {fault}; set {relation} {bound}{_help(path)}"
    if kind == "literal_error":
        choices = [
            choice for choice in context["expected"].replace(" or ", ", ").replace("'", "").split(", ") if choice
        ]
        return f"{value} is not one of {', '.join(choices)}{_nearest(str(raw), choices)}"
    if kind == "tuple_type" and isinstance(raw, str):
        return f"{value} is not a list; write [{raw}]"
    if kind in _WANTED:
        return f"{value} is not {_WANTED[kind]}{_help(path)}"
    return f"{details['msg']}; set now: {value}"


def _nearest(word: str, choices: list[str]) -> str:
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def _description(path: KeyPath) -> str:
    section = section_at(path[:-1])
    if section is None or path[-1] not in section.model_fields or issubclass(section, MethodSection):
        return ""
    return section.model_fields[str(path[-1])].description or ""


def _help(path: KeyPath) -> str:
    text = _description(path)
    return f"; it means: {text}" if text else ""

"""Reading the raw settings of a run (YAML, then key=value overrides), remembering where each was written.

What the settings mean is not known here, except for the short forms (``target: 60%``) that must be spelt out
before an override can reach inside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prunetune.core.errors import ConfigError, Problem

# A path inside the settings: ("target", "units", 0).
KeyPath = tuple[str | int, ...]

# Sections that may be written as one value, and the key that this value stands for.
SHORT_FORMS: dict[KeyPath, str] = {
    ("model",): "name",
    ("target",): "kept",
    ("mask",): "method",
    ("compensation",): "method",
    ("delta",): "method",
    ("lora", "ranks"): "method",
    ("data", "samples"): "method",
    ("data", "tokens"): "method",
}
# Keys of which only one may be set; an override of one replaces what the file has for the others.
ALTERNATIVES = {"target": ("kept", "params", "size")}
# Sections whose other keys belong to the named method, and keys of theirs that do not: naming another method starts
# the section afresh but for these.
METHOD_SECTIONS: dict[KeyPath, tuple[str, ...]] = {
    ("mask",): (),
    ("compensation",): (),
    ("delta",): ("drop", "regularize", "strength", "train_drop", "train_drop_unit"),
    ("lora", "ranks"): (),
    ("data", "samples"): ("kept",),
    ("data", "tokens"): ("kept", "scope", "floor", "final_answer"),
}


@dataclass
class Source:
    """Raw settings, and for every key the place where it was written."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    name: str = ""

    def where(self, path: KeyPath) -> str:
        """The place of ``path``, or of the nearest key around it, or the file's name."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return self.name

    def problem(self, path: KeyPath, message: str) -> Problem:
        """A Problem at ``path``, with its place."""
        where, name = self.where(path), dotted(path)
        # An override is quoted whole, so its key need not be repeated.
        repeated = where.startswith(f"override: {name}=")
        return Problem(message, field="" if repeated else name, where=where)

    def get(self, path: KeyPath) -> Any:
        """The raw value at ``path``; None if there is none."""
        value: Any = self.values
        for part in path:
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError):
                return None
        return value


def dotted(path: KeyPath) -> str:
    """("target", "units", 0) as ``target.units[0]``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def read_source(path: Path | None, overrides: Sequence[str]) -> Source:
    """The settings of ``path`` with ``overrides`` on top; interpolations (``${seed}``) are resolved.

    Raises:
        ConfigError: the file is missing, is not YAML, or is not a list of ``key: value`` settings.
    """
    source = _read_file(Path(path)) if path is not None else Source()
    _spell_out(source.values)
    _apply_overrides(source, overrides)
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(source.values), resolve=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or ""
        reason = str(error).splitlines()[0]
        raise ConfigError([source.problem(tuple(key.split(".")) if key else (), reason)]) from None
    source.values = _as_settings(resolved)
    return source


def _read_file(path: Path) -> Source:
    name = str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError([Problem(_missing(path), where=name)]) from None
    except IsADirectoryError:
        resolved = path / "resolved.yaml"
        hint = f"; did you mean {resolved}?" if resolved.exists() else "; give a .yaml file"
        raise ConfigError([Problem("is a folder, not a configuration file" + hint, where=name)]) from None
    except UnicodeDecodeError:
        raise ConfigError([Problem("is not a text file; write the settings as UTF-8 YAML", where=name)]) from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None and not isinstance(root, yaml.MappingNode):
            message = "holds no settings; write them as `key: value` lines, for example `target: 60%`"
            raise ConfigError([Problem(message, where=f"{name}:1")])
        values = OmegaConf.to_container(OmegaConf.create(text)) if root is not None else {}
    except yaml.YAMLError as error:
        raise ConfigError([_syntax_problem(name, error)]) from None
    source = Source(_as_settings(values), name=name)
    if root is not None:
        _record_lines(root, (), source.places, name)
    return source


def _as_settings(container: Any) -> dict[str, Any]:
    return dict(container) if isinstance(container, dict) else {}


def _missing(path: Path) -> str:
    near = sorted(file.name for file in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
    if near:
        return f"no such file; {path.parent}/ has {', '.join(near)}"
    return "no such file; give the path of a run's YAML file, for example configs/quickstart.yaml"


def _syntax_problem(name: str, error: yaml.YAMLError) -> Problem:
    mark = getattr(error, "problem_mark", None)
    reason = getattr(error, "problem", None) or str(error)
    if "\\t" in reason:
        reason = "a tab is used for indentation; YAML wants spaces"
    elif "mapping values are not allowed" in reason:
        reason = "a second `key: value` on one line, or a line indented too far; quote a value that holds a colon"
    where = f"{name}:{mark.line + 1}" if mark is not None else name
    return Problem(f"is not valid YAML: {reason}", where=where)


def _record_lines(node: yaml.Node, path: KeyPath, places: dict[KeyPath, str], name: str) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*path, key.value)
            places[inner] = f"{name}:{key.start_mark.line + 1}"
            _record_lines(value, inner, places, name)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            places[*path, index] = f"{name}:{value.start_mark.line + 1}"
            _record_lines(value, (*path, index), places, name)


def _spell_out(values: dict[str, Any]) -> None:
    """``target: 60%`` becomes ``target: {kept: 60%}``; a section with all keys commented out is empty."""
    for path, key in SHORT_FORMS.items():
        around = _section(values, path[:-1])
        value = None if around is None else around.get(path[-1])
        if around is not None and value is not None and not isinstance(value, dict | list):
            around[path[-1]] = {key: value}
    for section, value in values.items():
        if value is None and section != "folder":
            values[section] = {}


def _apply_overrides(source: Source, overrides: Sequence[str]) -> None:
    given: set[KeyPath] = set()
    for text in overrides:
        place = f"override: {text}"
        key, equals, _ = text.partition("=")
        path: KeyPath = tuple(key.strip().split("."))
        if not equals or not all(path):
            source.problems.append(
                Problem("is not an override; write key=value, for example target.kept=60%", where=place)
            )
            continue
        try:
            value = _override_value(text)
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            reason = getattr(error, "problem", None) or str(error).splitlines()[0]
            source.problems.append(Problem(f"the value cannot be read: {reason}; quote it", where=place))
            continue
        if path in SHORT_FORMS and not isinstance(value, dict):
            path = (*path, SHORT_FORMS[path])
        _make_room(source, path, value, given)
        _put(source, path, value, place)
        given.add(path)


def _override_value(text: str) -> Any:
    value: Any = OmegaConf.to_container(OmegaConf.from_dotlist([text]), resolve=False)
    for part in text.partition("=")[0].strip().split("."):
        value = value[part]
    return value


def _make_room(source: Source, path: KeyPath, value: Any, given: set[KeyPath]) -> None:
    """Removes what the override at ``path`` replaces; two overrides are left to disagree."""
    section = str(path[0])
    current = source.values.get(section)
    if not isinstance(current, dict):
        return
    new_keys = [str(path[1])] if len(path) > 1 else list(value) if isinstance(value, dict) else []
    if any(key in ALTERNATIVES.get(section, ()) for key in new_keys):
        for other in ALTERNATIVES[section]:
            if other not in new_keys and (section, other) not in given:
                current.pop(other, None)
    method = _section(source.values, path[:-1])
    if path[:-1] in METHOD_SECTIONS and path[-1] == "method" and method and method.get("method") != value:
        stays = METHOD_SECTIONS[path[:-1]]
        for key in [key for key in method if (*path[:-1], key) not in given and key not in stays]:
            del method[key]


def _section(values: dict[str, Any], path: KeyPath) -> dict[Any, Any] | None:
    """The group of settings at ``path``; None if there is no such group."""
    current: Any = values
    for part in path:
        current = current.get(part) if isinstance(current, dict) else None
    return current if isinstance(current, dict) else None


def _put(source: Source, path: KeyPath, value: Any, place: str) -> None:
    target: Any = source.values
    for part in path[:-1]:
        if not isinstance(target.get(part), dict):
            target[part] = {}
        target = target[part]
    last = path[-1]
    if isinstance(value, dict) and isinstance(target.get(last), dict):
        for key, inner in value.items():
            _put(source, (*path, key), inner, place)
        return
    target[last] = value
    for known in [known for known in source.places if known[: len(path)] == path]:
        del source.places[known]
    source.places[path] = place

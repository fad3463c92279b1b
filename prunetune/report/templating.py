"""Filling in the templates beside this file; HTML is escaped, Markdown is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(template: str, **values: Any) -> str:
    """The template's text with the values filled in; a value that is missing is an error."""
    environment = Environment(
        loader=PackageLoader("prunetune.report", "templates"),
        autoescape=template.endswith(".html.jinja"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(**values)


def version_rows(versions: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(name, version) pairs of versions.json; names inside a section get the section's name before them."""
    rows: list[tuple[str, str]] = []
    for name, value in versions.items():
        if isinstance(value, Mapping):
            rows += version_rows(value, f"{prefix}{name} ")
        else:
            rows.append((f"{prefix}{name}", str(value)))
    return rows

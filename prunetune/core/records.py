"""The small frozen records that stages hand each other; never a trainer or another stage's config."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class DataBundle:
    """Rows ready for TRL. ``train`` and ``validation`` are ``datasets.Dataset`` in prompt-completion,
    messages or text form; ``general_text`` is prose outside the domain, for the general perplexity."""

    train: Any
    validation: Any
    general_text: str
    description: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PreparedModel:
    """A base model folder that stock transformers opens, and what is known of it without loading it."""

    folder: Path
    config: dict[str, Any]
    source: str
    licence: str


@dataclass(frozen=True)
class ExportedModel:
    """An ordinary model folder and what its verification measured."""

    folder: Path
    verification: dict[str, Any]


@dataclass(frozen=True)
class EvalResult:
    """Measurements of one model, by name; see evaluate/harness.py for the names and units."""

    label: str
    folder: Path
    numbers: dict[str, float]

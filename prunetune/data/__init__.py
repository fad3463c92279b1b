"""Data: rows from files, scores of rows, selections. In Python: ``prunetune.data.score`` and ``.select``."""

from __future__ import annotations

from typing import Any

_PUBLIC = {"score": "prunetune.data.scoring", "select": "prunetune.data.selection"}


def __getattr__(name: str) -> Any:
    # Lazily: scoring needs torch, and most of what is here does not.
    if name in _PUBLIC:
        import importlib

        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

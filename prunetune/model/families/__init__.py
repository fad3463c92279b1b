"""One file per architecture family: which tensors belong to a unit. A new family is one new file here."""

from __future__ import annotations

from prunetune.core.errors import UnsupportedModelError
from prunetune.core.registry import Registry
from prunetune.model.families._table import Columns, Family, Rows, Writers

FAMILIES: Registry[Family] = Registry("family", "prunetune.model.families")

__all__ = ["FAMILIES", "Columns", "Family", "Rows", "Writers", "family_of"]


def family_of(model_type: str) -> Family:
    """The family whose table covers ``config.model_type``.

    Raises:
        UnsupportedModelError: no table knows this architecture; the message says what a table must name.
    """
    for _, family in FAMILIES.items():
        if model_type in family.model_types:
            return family
    known = sorted(kind for _, family in FAMILIES.items() for kind in family.model_types)
    raise UnsupportedModelError(
        f"model_type {model_type!r} has no unit table. prunetune can prune: {', '.join(known)}. To add a family, "
        f"write one file that names its roles ({', '.join(Family.ROLES)}) beside the existing ones."
    )

"""The frozen decision: for every site the sorted indices that stay, in the dense model's coordinates.

A plan does not know how it was found or how it is applied; it is a small JSON file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunetune.core.errors import PlanMismatchError
from prunetune.core.files import read_json, write_json
from prunetune.model.architecture import Architecture
from prunetune.model.units import HIDDEN, LAYERS_SITE, kind_size, parse_site, site_name

FORMAT = "prunetune-plan"
VERSION = 1


@dataclass(frozen=True)
class Plan:
    """What stays of a model.

    Args:
        kept: site -> sorted indices that stay. A site that is absent keeps everything.
        architecture: fingerprint of the dense model.
        origin: how it was found (method, budget, seed, step); information only.
    """

    kept: Mapping[str, tuple[int, ...]]
    architecture: Mapping[str, Any]
    origin: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def kept_units(self, arch: Architecture, layer: int, kind: str) -> tuple[int, ...]:
        """Indices that stay at a site (the layer means nothing for whole layers and the hidden width)."""
        name = kind if kind in (LAYERS_SITE, HIDDEN) else site_name(layer, kind)
        return self.kept.get(name, tuple(range(kind_size(arch, kind))))

    def kept_layers(self, arch: Architecture) -> tuple[int, ...]:
        """Layers that stay."""
        return self.kept_units(arch, -1, LAYERS_SITE)

    def kept_query_heads(self, arch: Architecture, layer: int) -> tuple[int, ...]:
        """Query heads that stay: their KV group stays and they were not removed within it."""
        groups = set(self.kept_units(arch, layer, "kv_groups"))
        heads = self.kept_units(arch, layer, "query_heads")
        return tuple(head for head in heads if head // arch.queries_per_group in groups)

    def check(self, arch: Architecture) -> None:
        """Raises PlanMismatchError unless the plan is legal for this model."""
        arch.require(dict(self.architecture))
        for name, kept in self.kept.items():
            self._check_site(arch, name, kept)
        for layer in self.kept_layers(arch):
            self._check_heads(arch, layer)

    def _check_site(self, arch: Architecture, name: str, kept: Sequence[int]) -> None:
        try:
            layer, kind = parse_site(name)
        except ValueError as error:
            raise PlanMismatchError(f"the plan names {error}") from error
        size = kind_size(arch, kind)
        if layer >= arch.layers:
            raise PlanMismatchError(f"the plan names {name}, but the model has {arch.layers} layers")
        if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= size:
            raise PlanMismatchError(f"{name} must keep at least one of 0..{size - 1}, sorted and without repeats")

    def _check_heads(self, arch: Architecture, layer: int) -> None:
        groups = self.kept_units(arch, layer, "kv_groups")
        heads = self.kept_query_heads(arch, layer)
        counts = {sum(head // arch.queries_per_group == group for head in heads) for group in groups}
        if len(counts) != 1 or 0 in counts:
            raise PlanMismatchError(
                f"layer {layer}: every KV group that stays must keep the same number of query heads, at least one"
            )

    def digest(self) -> str:
        """Hex digest of the decision; equal plans have equal digests on every process."""
        text = json.dumps({name: list(kept) for name, kept in sorted(self.kept.items())})
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Writes the plan as JSON in one step."""
        write_json(
            path,
            {
                "format": FORMAT,
                "version": VERSION,
                "architecture": dict(self.architecture),
                "origin": dict(self.origin),
                "kept": {name: list(kept) for name, kept in self.kept.items()},
            },
        )

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Reads a plan; raises PlanMismatchError if the file is not one."""
        try:
            raw = read_json(path)
        except FileNotFoundError as error:
            raise PlanMismatchError(f"there is no plan at {path}; give a run's plan.json") from error
        except (OSError, ValueError, RecursionError) as error:
            raise PlanMismatchError(f"{path} is not a plan file ({error}); give a run's plan.json") from error
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise PlanMismatchError(f"{path} is not a plan file; give a run's plan.json")
        if raw.get("version") != VERSION:
            raise PlanMismatchError(f"{path} has plan version {raw.get('version')}; this prunetune reads {VERSION}")
        kept = {name: _indices(path, name, units) for name, units in _mapping(path, raw, "kept").items()}
        return cls(kept, _mapping(path, raw, "architecture"), _mapping(path, raw, "origin"))


def _mapping(path: Path, raw: dict[str, Any], key: str) -> dict[str, Any]:
    value = raw.get(key)
    if not isinstance(value, dict):
        raise PlanMismatchError(f"{path}: {key} must be a mapping; the file is damaged")
    return value


def _indices(path: Path, name: str, units: Any) -> tuple[int, ...]:
    # bool is a kind of int to Python, and int() would take "3" and 3.7 for an index.
    if not isinstance(units, list) or any(type(index) is not int for index in units):
        raise PlanMismatchError(f"{path}: {name} must be a list of whole numbers; the file is damaged")
    return tuple(units)

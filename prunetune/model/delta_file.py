"""Pruned deltas in a small file: values only. Their places are drawn again from the seed, so positions cost nothing.

Layout, in a safetensors file: for every changed matrix ``values.<name>`` (its surviving entries, row by row, unscaled)
and ``counts.<name>`` (int64, survivors before each row, m + 1 of them); whole tensors as ``whole.<name>``. The header
holds format, version, seed, model name, drop rate, each matrix's shape and divisor, and a fingerprint of the base. An
entry (i, j) of a matrix survives if word (i, j) of the lattice named ("dare", model, matrix) is below
round((1 - drop) * 2^32); see ``core.streams.lattice``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prunetune.core.errors import PlanMismatchError, UnsupportedModelError
from prunetune.core.files import new_file
from prunetune.model.deltas import Delta, Place, threshold, words_of
from prunetune.model.shards import ShardReader, read_header
from prunetune.model.tuned import BaseSlices, Tuned

FORMAT, VERSION, SUFFIX = "prunetune-delta", 1, ".delta"
_PURPOSE = "dare"


@torch.no_grad()
def save_delta(
    path: Path,
    tuned: Tuned,
    base: BaseSlices,
    *,
    drop: float,
    divisors: Mapping[str, float] | float,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Writes what random dropping leaves of a tuned model, in one step.

    Args:
        path: file to write; must not exist.
        tuned: adapter or model. base: what it was trained on.
        drop: fraction of the entries that is dropped. divisors: what survivors are divided by, one for all or by name.
        seed: of the masks. dtype: of the stored values; bfloat16 rounds each by 0.4% at most.

    Raises:
        FileExistsError: ``path`` exists.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists; name another file")
    tensors: dict[str, Tensor] = {f"whole.{name}": build().clone() for name, build in tuned.replaced(base).items()}
    matrices, limit = {}, threshold(1 - drop)
    for name, shape in tuned.changed(base).items():
        place = Place(name, shape)
        values, counts = [], [torch.zeros(1, dtype=torch.int64)]
        for start, block in tuned.delta(place, base).blocks():
            stays = words_of(place, seed, tuned.folder.name, _PURPOSE, start, start + len(block)) < limit
            values.append(block[stays].to(dtype))
            counts.append(stays.sum(1))
        tensors[f"values.{name}"] = torch.cat(values)
        tensors[f"counts.{name}"] = torch.cat(counts).cumsum(0)
        divisor = divisors if isinstance(divisors, float) else divisors[name]
        matrices[name] = {"shape": list(shape), "divisor": divisor}
    facts = {"version": VERSION, "seed": seed, "model": tuned.folder.name, "drop": drop, "matrices": matrices}
    said = json.dumps(facts | {"base": base_fingerprint(base.reader)})
    with new_file(path) as temporary:
        save_file(tensors, temporary, metadata={"format": FORMAT, "facts": said, "sha256": _digest(said, tensors)})
        temporary.chmod(0o644)


class DeltaFile(Tuned):
    """A file that ``save_delta`` wrote.

    Args:
        path: the file.

    Raises:
        UnsupportedModelError: it is none, it is cut short, or it is not as it was written.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        read_header(path)  # says so if the file is cut short
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                names = list(file.keys())
                self._tensors = {name: file.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise _damaged(path, str(error)) from error
        if metadata.get("format") != FORMAT:
            raise UnsupportedModelError(f"{path} is no delta file; make one with `prunetune delta save`")
        said = metadata.get("facts", "")
        if _digest(said, self._tensors) != metadata.get("sha256"):
            raise UnsupportedModelError(f"{path} was changed after it was written; copy it again")
        try:
            self.facts: dict[str, Any] = json.loads(said)
            if self.facts["version"] != VERSION:
                raise UnsupportedModelError(
                    f"{path} has version {self.facts['version']}; this prunetune reads {VERSION}"
                )
            if fault := _fault(self.facts, self._tensors):
                raise _damaged(path, fault)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _damaged(path, f"its header is not readable ({error})") from error

    def changed(self, base: BaseSlices) -> dict[str, tuple[int, int]]:
        found = base_fingerprint(base.reader)
        if found != self.facts["base"]:
            raise PlanMismatchError(
                f"{self.folder} belongs to a base with fingerprint {self.facts['base']}, and {base.reader.folder} has "
                f"{found}; name the base that it was made with"
            )
        shapes = {name: (entry["shape"][0], entry["shape"][1]) for name, entry in self.facts["matrices"].items()}
        for name, shape in shapes.items():
            if base.shape(name) != shape:
                raise PlanMismatchError(
                    f"{self.folder} changes {name} of {shape}, and the base's is {base.shape(name)}; name another base"
                )
        return shapes

    def delta(self, place: Place, base: BaseSlices) -> Delta:
        if place.rows is not None or place.columns is not None:
            raise PlanMismatchError(f"{self.folder} is for the dense base; apply it there, then prune")
        values, counts = self._tensors[f"values.{place.name}"], self._tensors[f"counts.{place.name}"]
        divisor = float(self.facts["matrices"][place.name]["divisor"]) or 1.0
        return _Stored(place, values, counts, divisor, self.facts)

    def replaced(self, base: BaseSlices) -> dict[str, Callable[[], Tensor]]:
        names = [name for name in self._tensors if name.startswith("whole.")]
        return {name.removeprefix("whole."): partial(self._tensors.__getitem__, name) for name in names}


class _Stored(Delta):
    """Values put back where the seed says."""

    def __init__(self, place: Place, values: Tensor, counts: Tensor, divisor: float, facts: Mapping[str, Any]):
        super().__init__(place)
        self._values, self._counts, self._divisor, self._facts = values, counts, divisor, facts

    def rows(self, start: int, stop: int) -> Tensor:
        facts = self._facts
        words = words_of(self.place, facts["seed"], facts["model"], _PURPOSE, start, stop)
        found = torch.zeros(stop - start, self.place.shape[1])
        stays = words < threshold(1 - facts["drop"])
        values = self._values[self._counts[start] : self._counts[stop]]
        if len(values) != int(stays.sum()):
            raise UnsupportedModelError(f"the delta of {self.place.name} has other places than its seed draws")
        found[stays] = values.float()
        return found / self._divisor


def base_fingerprint(reader: ShardReader) -> str:
    """Of a model's tensor names, shapes and dtypes, and of the first numbers of each."""
    found = hashlib.sha256()
    for name, entry in sorted(reader.entries.items()):
        found.update(f"{name} {entry.shape} {entry.dtype}".encode())
        if len(entry.shape) == 2:
            found.update(reader.rows(name, 0, 1).contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:32]


def _damaged(path: Path, fact: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"the delta file {path} is damaged: {fact}; copy it again")


def _fault(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str | None:
    """What is wrong with a header that says it was not changed; None if nothing is."""
    if not (isinstance(facts["model"], str) and isinstance(facts["base"], str) and type(facts["seed"]) is int):
        return "its model, base or seed is of the wrong kind"
    if not 0 <= float(facts["drop"]) <= 1:
        return f"it drops {facts['drop']}"
    for name, entry in facts["matrices"].items():
        m, n = entry["shape"]
        values, counts = tensors[f"values.{name}"], tensors[f"counts.{name}"]
        if not (type(m) is int and type(n) is int and min(m, n) > 0 and math.isfinite(float(entry["divisor"]))):
            return f"shape or divisor of {name}"
        if values.dim() != 1 or counts.dtype != torch.int64 or tuple(counts.shape) != (m + 1,):
            return f"values or counts of {name} have the wrong shape"
        if int(counts[0]) != 0 or int(counts[-1]) != len(values) or bool((counts.diff() < 0).any()):
            return f"the counts of {name} do not add up"
    return None


def _digest(said: str, tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256(said.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()

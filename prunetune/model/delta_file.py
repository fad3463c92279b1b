"""Pruned deltas in a small file: the survivors' values, and where they stand in whatever takes the fewest bytes.

Layout, in a safetensors file: for every matrix ``values.<name>`` (survivors row by row, not yet divided) and
``counts.<name>`` (survivors of each row), and by its encoding

* seed: nothing more; entry (i, j) survives if word (i, j) of the lattice named ("dare", model, matrix) is below
  round((1 - drop) * 2^32), see ``core.streams.lattice``;
* gaps: ``gaps.<name>`` and ``lengths.<name>`` (bytes of each row), see ``delta_codes``;
* bitmask: ``bits.<name>``;
* dense: all entries are values, and there are no counts.

Whole tensors are ``whole.<name>``. The header holds format, version, method, seed, model name, each matrix's shape,
encoding, drop rate and divisor, whether a change of the embedding is one of the head that is tied to it, a fingerprint
of the base, and a digest of everything.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prunetune.core.errors import PlanMismatchError, UnsupportedModelError
from prunetune.core.files import new_file
from prunetune.model.delta_codes import bits, bits_width, from_bits, from_gaps, gap_lengths, gaps
from prunetune.model.deltas import Delta, Place, stays_of
from prunetune.model.shards import ShardReader, TensorEntry, read_header
from prunetune.model.tensor_spool import TensorSpool, tensor_digest
from prunetune.model.tuned import BaseSlices, Tuned

FORMAT, VERSION, SUFFIX = "prunetune-delta", 2, ".delta"
_PURPOSE = "dare"
# Of rows that are coded at once; places of survivors take several times the bytes of a block meanwhile.
_BLOCK_BYTES = 8 * 2**20
_INTEGERS = {"U8": torch.uint8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}
_FLOATS = ("F64", "F32", "F16", "BF16")
# Encoding -> tensors with a number a row.
_INDEXES: dict[str, tuple[str, ...]] = {
    "seed": ("counts",),
    "bitmask": ("counts",),
    "gaps": ("counts", "lengths"),
    "dense": (),
}


@dataclass(frozen=True)
class Kept:
    """What is left of one matrix.

    Args:
        delta: the survivors, not yet divided. divisor: what they are divided by.
        drawn: the rate at which the lattice that is named in the module's docstring dropped the rest; None: something
            else did.
    """

    delta: Delta
    divisor: float = 1.0
    drawn: float | None = None


@torch.no_grad()
def save_delta(
    path: Path,
    kept: Iterable[Kept],
    whole: Mapping[str, Callable[[], Tensor]],
    base: ShardReader,
    *,
    method: str,
    model: str,
    moves_tied_head: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, dict[str, int]]:
    """Writes a delta file in one step, row block by row block; every matrix is looked at twice.

    Args:
        path: file to write; must not exist.
        kept: of every changed matrix. whole: name -> tensors that are taken whole. base: what they belong to.
        method: what pruned it, for the header. model, seed: of the lattice. moves_tied_head: see ``Tuned``.
        dtype: of the stored values; bfloat16 rounds each by 0.4% at most.

    Returns:
        Name -> encoding -> bytes that the matrix would take, the encoding that was taken first.

    Raises:
        FileExistsError: ``path`` exists.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists; name another file")
    matrices: dict[str, Any] = {}
    sizes: dict[str, dict[str, int]] = {}
    with new_file(path) as temporary:
        spool = TensorSpool(temporary.parent)
        for name, build in whole.items():
            spool.add(f"whole.{name}", build())
        for part in kept:
            name, stays = part.delta.place.name, partial(_stays, part, model, seed)
            matrices[name], sizes[name] = _write(spool, part, stays, dtype)
        facts = {"version": VERSION, "method": method, "seed": seed, "model": model, "matrices": matrices}
        facts |= {"moves_tied_head": moves_tied_head, "base": base_fingerprint(base)}
        said = json.dumps(facts)
        spool.finish(temporary, {"format": FORMAT, "facts": said, "sha256": _digest(said, spool.digests())})
        temporary.chmod(0o644)
    return sizes


def _stays(part: Kept, model: str, seed: int, start: int, block: Tensor) -> Tensor:
    """(b, n) bool: the survivors of the rows that begin at ``start``."""
    if part.drawn is None:
        return block != 0
    return stays_of(part.delta.place, seed, model, _PURPOSE, start, start + len(block), 1 - part.drawn)


def _write(
    spool: TensorSpool, part: Kept, stays: Callable[[int, Tensor], Tensor], dtype: torch.dtype
) -> tuple[dict[str, Any], dict[str, int]]:
    """Spools one matrix; (its entry of the header, bytes by encoding, the smallest first)."""
    delta, (m, n) = part.delta, part.delta.shape
    name = delta.place.name
    counts, lengths = [], []
    for start, block in delta.blocks(_BLOCK_BYTES):
        found = stays(start, block)
        counts.append(found.sum(1))
        lengths.append(gap_lengths(found))
    narrow = {"counts": _narrow(torch.cat(counts)), "lengths": _narrow(torch.cat(lengths))}
    index = {key: tensor.numel() * tensor.dtype.itemsize for key, tensor in narrow.items()}
    values = int(torch.cat(counts).sum()) * dtype.itemsize + index["counts"]
    sizes = {"seed": values} if part.drawn is not None else {}
    sizes |= {
        "gaps": values + index["lengths"] + int(torch.cat(lengths).sum()),
        "bitmask": values + m * bits_width(n),
        "dense": m * n * dtype.itemsize,
    }
    encoding = min(sizes, key=sizes.__getitem__)
    for key, tensor in narrow.items():
        if encoding == "gaps" or (key == "counts" and encoding != "dense"):
            spool.append(f"{key}.{name}", tensor)
    for start, block in delta.blocks(_BLOCK_BYTES):
        found = torch.ones_like(block, dtype=torch.bool) if encoding == "dense" else stays(start, block)
        spool.append(f"values.{name}", block[found].to(dtype))
        if encoding == "gaps":
            spool.append(f"gaps.{name}", gaps(found))
        elif encoding == "bitmask":
            spool.append(f"bits.{name}", bits(found))
    entry = {"shape": [m, n], "encoding": encoding, "divisor": part.divisor}
    entry |= {"drop": part.drawn} if encoding == "seed" else {}
    return entry, dict(sorted(sizes.items(), key=lambda pair: pair[0] != encoding))


def _narrow(numbers: Tensor) -> Tensor:
    """The same whole numbers in the fewest bytes each."""
    largest = int(numbers.max())
    return numbers.to(next(kind for kind in _INTEGERS.values() if largest <= torch.iinfo(kind).max))


class DeltaFile(Tuned):
    """A file that ``save_delta`` wrote; values are read when they are asked for.

    Args:
        path: the file.

    Raises:
        UnsupportedModelError: it is none, it is cut short, or it is not as it was written.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        entries = read_header(path)  # says so if the file is cut short
        try:
            self._file = safe_open(path, framework="pt")
            metadata = self._file.metadata() or {}
        except SafetensorError as error:
            raise _damaged(path, str(error)) from error
        if metadata.get("format") != FORMAT:
            raise UnsupportedModelError(f"{path} is no delta file; make one with `prunetune delta save`")
        said = metadata.get("facts", "")
        if _digest(said, {name: tensor_digest(self._read(name)) for name in entries}) != metadata.get("sha256"):
            raise UnsupportedModelError(f"{path} was changed after it was written; copy it again")
        try:
            self.facts: dict[str, Any] = json.loads(said)
            if self.facts["version"] != VERSION:
                raise UnsupportedModelError(
                    f"{path} has version {self.facts['version']}; this prunetune reads {VERSION}: save it anew"
                )
            if fault := _fault(self.facts, entries, self._read):
                raise _damaged(path, fault)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _damaged(path, f"its header is not readable ({error})") from error
        self.moves_tied_head = bool(self.facts.get("moves_tied_head"))
        self._whole = [name for name in entries if name.startswith("whole.")]

    def _read(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def _part(self, name: str, start: int, stop: int) -> Tensor:
        tensor: Tensor = self._file.get_slice(name)[start:stop]
        return tensor

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
        entry = self.facts["matrices"][place.name]
        if entry["encoding"] == "dense":
            return _Dense(place, self._part, entry)
        indexes = {key: self._read(f"{key}.{place.name}").long() for key in _INDEXES[entry["encoding"]]}
        return _Sparse(place, self._part, entry, indexes, self.facts)

    def replaced(self, base: BaseSlices) -> dict[str, Callable[[], Tensor]]:
        return {name.removeprefix("whole."): partial(self._read, name) for name in self._whole}


class _Dense(Delta):
    """Every entry is stored."""

    def __init__(self, place: Place, part: Callable[[str, int, int], Tensor], entry: Mapping[str, Any]):
        super().__init__(place)
        self._part, self._divisor = part, float(entry["divisor"]) or 1.0

    def rows(self, start: int, stop: int) -> Tensor:
        n = self.place.shape[1]
        return self._part(f"values.{self.place.name}", start * n, stop * n).reshape(-1, n).float() / self._divisor


class _Sparse(Delta):
    """Values put back where they stood."""

    def __init__(
        self,
        place: Place,
        part: Callable[[str, int, int], Tensor],
        entry: Mapping[str, Any],
        indexes: Mapping[str, Tensor],
        facts: Mapping[str, Any],
    ):
        super().__init__(place)
        self._part, self._entry, self._indexes, self._facts = part, entry, indexes, facts
        # (m + 1,) where each row's values, or bytes, begin.
        self._starts = {
            key: torch.cat([torch.zeros(1, dtype=torch.int64), numbers.cumsum(0)]) for key, numbers in indexes.items()
        }

    def rows(self, start: int, stop: int) -> Tensor:
        first, last = self._starts["counts"][[start, stop]].tolist()
        values = self._part(f"values.{self.place.name}", first, last)
        stays = self._stays(start, stop)
        if stays is None or not torch.equal(stays.sum(1), self._indexes["counts"][start:stop]):
            raise UnsupportedModelError(f"the delta of {self.place.name} has other places than values; copy it again")
        found = torch.zeros(stop - start, self.place.shape[1])
        found[stays] = values.float()
        return found / (float(self._entry["divisor"]) or 1.0)

    def _stays(self, start: int, stop: int) -> Tensor | None:
        name, n, facts = self.place.name, self.place.shape[1], self._facts
        if self._entry["encoding"] == "seed":
            keep = 1 - float(self._entry["drop"])
            return stays_of(self.place, facts["seed"], facts["model"], _PURPOSE, start, stop, keep)
        if self._entry["encoding"] == "bitmask":
            width = bits_width(n)
            return from_bits(self._part(f"bits.{name}", start * width, stop * width), n)
        first, last = self._starts["lengths"][[start, stop]].tolist()
        return from_gaps(self._part(f"gaps.{name}", first, last), self._indexes["lengths"][start:stop], n)


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


def _fault(facts: Mapping[str, Any], entries: Mapping[str, TensorEntry], read: Callable[[str], Tensor]) -> str | None:
    """What is wrong with a header that says it was not changed; None if nothing is."""
    if not (isinstance(facts["model"], str) and isinstance(facts["base"], str) and type(facts["seed"]) is int):
        return "its model, base or seed is of the wrong kind"
    faults = (_matrix_fault(name, entry, entries, read) for name, entry in facts["matrices"].items())
    return next((fault for fault in faults if fault), None)


def _matrix_fault(
    name: str, entry: Mapping[str, Any], entries: Mapping[str, TensorEntry], read: Callable[[str], Tensor]
) -> str | None:
    """The same of one matrix: its numbers against the tensors that are there."""
    (m, n), encoding = entry["shape"], entry["encoding"]
    if not (type(m) is int and type(n) is int and min(m, n) > 0 and math.isfinite(float(entry["divisor"]))):
        return f"shape or divisor of {name}"
    if encoding == "seed" and not 0 <= float(entry["drop"]) <= 1:
        return f"it drops {entry['drop']} of {name}"
    values = entries[f"values.{name}"]
    sizes = {"dense": {"values": m * n}, "bitmask": {"bits": m * bits_width(n)}}.get(encoding, {})
    vectors = ["values", *_INDEXES[encoding], *{"gaps": ["gaps"], "bitmask": ["bits"]}.get(encoding, [])]
    sizes |= dict.fromkeys(_INDEXES[encoding], m)
    for kind in vectors:
        found = entries[f"{kind}.{name}"]
        fitting = {"values": _FLOATS, "gaps": ("U8",), "bits": ("U8",)}.get(kind, _INTEGERS)
        if found.dtype not in fitting or found.shape != (sizes.get(kind, math.prod(found.shape)),):
            return f"{kind} of {name} are {found.dtype} of {found.shape}"
    totals = {"counts": values.shape[0], "lengths": entries[f"gaps.{name}"].shape[0] if encoding == "gaps" else 0}
    for kind in _INDEXES[encoding]:
        numbers = read(f"{kind}.{name}").long()
        if int(numbers.min()) < 0 or int(numbers.max()) > totals[kind] or int(numbers.sum()) != totals[kind]:
            return f"the {kind} of {name} do not add up"
    return None


def _digest(said: str, tensors: Mapping[str, str]) -> str:
    """Of the header's facts and of every tensor's name and digest."""
    found = hashlib.sha256(said.encode())
    for name, digest in sorted(tensors.items()):
        found.update(f"{name} {digest}".encode())
    return found.hexdigest()

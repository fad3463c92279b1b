"""The folder of one run of a comparison: what it was begun with, and what a finished run no longer needs."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prunetune.config.comparison import Cell
from prunetune.core.console import note
from prunetune.core.files import discard, read_json, sha256, write_json

TRAIN, PRUNED = "train", "pruned"
BEGUN = "begun.json"

# A file: path, size in bytes, time of its last change in nanoseconds.
_Stats = tuple[tuple[str, int, int], ...]


def begin(cell: Cell) -> None:
    """Makes the cell's folder, or leaves it as it is to go on there; what was begun otherwise is thrown away."""
    folder, mine = cell.config.folder, {"fingerprint": fingerprint(cell)}
    note_file = folder / BEGUN
    if folder.exists() and (not note_file.exists() or read_json(note_file) != mine):
        note(f"{folder} was begun with other settings, another base or other rows: thrown away, it starts anew")
        discard(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(note_file, mine)


def drop_weights(cell: Cell) -> None:
    """Deletes what a finished cell no longer needs: checkpoints and pruned bases of dozens of cells fill a disk."""
    for name in (TRAIN, PRUNED):
        shutil.rmtree(cell.config.folder / name, ignore_errors=True)


def fingerprint(cell: Cell) -> str:
    """Digest of everything that the result depends on.

    That is settings, and what is in the local files that they name. Models and rows of the hub go by their names.
    """
    settings = cell.config.model_dump(mode="json", exclude={"folder"})
    data = cell.config.data
    contents = [_content(name) for name in (data.train, data.validation, data.general_text)]
    facts = [cell.id, settings, cell.options, cell.tokens, *contents, _base(cell.config.model.name)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _content(name: str | None) -> str | None:
    """Digest of a file, or of all the files in a folder; None if there is none of this name."""
    path = Path(name).expanduser() if name else None
    if path is None or not path.exists():
        return None
    return _digest(_stats(path.rglob("*") if path.is_dir() else [path]))


def _base(name: str) -> Any:
    """Facts about a model folder; a GGUF file is like any other."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return _content(name)
    texts = [file for pattern in ("*.json", "*.jinja", "*.model", "*.txt") for file in folder.glob(pattern)]
    return [_digest(_stats(texts)), _weights(folder, _stats(folder.glob("*.safetensors")))]


def _stats(files: Iterable[Path]) -> _Stats:
    found = ((str(file), file.stat()) for file in sorted(files) if file.is_file())
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in found)


# Dozens of cells name the same files, so that each is read once, and again only when it has changed.
@functools.cache
def _digest(stats: _Stats) -> str:
    found = hashlib.sha256()
    for name, size, _ in stats:
        found.update(f"{Path(name).name} {size} {sha256(Path(name))}".encode())
    return found.hexdigest()


@functools.cache
def _weights(folder: Path, _: _Stats) -> str:
    from prunetune.model.delta_file import base_fingerprint
    from prunetune.model.shards import ShardReader

    return base_fingerprint(ShardReader(folder))

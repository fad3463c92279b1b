"""Weight files: lazy reading by tensor name over one or many safetensors shards, and rolling shards out.

Headers are read without torch, so names, shapes and completeness are known before anything is loaded.
What the tensors mean is not decided here.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunetune.core.errors import UnsupportedModelError
from prunetune.core.files import sha256, write_json

if TYPE_CHECKING:
    from torch import Tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_BITS = {"F64": 64, "I64": 64, "F32": 32, "I32": 32, "F16": 16, "BF16": 16, "I16": 16}
_LENGTH_BYTES = 8
_LONGEST_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as its file's header describes it; ``dtype`` is safetensors' word (``F32``, ``BF16``)."""

    shape: tuple[int, ...]
    dtype: str
    file: str

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor's data; dtypes that are not known here count as one byte per element."""
        return math.prod(self.shape) * _BITS.get(self.dtype, 8) // 8


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Names, shapes and dtypes in one safetensors file.

    Raises:
        UnsupportedModelError: the file is shorter than its header says, or is no safetensors file.
    """
    size_bytes = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(_LENGTH_BYTES)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == _LENGTH_BYTES else _LONGEST_HEADER_BYTES + 1
        text = file.read(length) if length <= _LONGEST_HEADER_BYTES else b""
    if not text or len(text) < length:
        raise _damaged(path, f"its {size_bytes} bytes do not hold a whole header")
    try:
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        entries = {
            name: TensorEntry(tuple(entry["shape"]), entry["dtype"], path.name) for name, entry in header.items()
        }
        sizes = [size for entry in header.values() for size in (*entry["shape"], *entry["data_offsets"])]
        if any(type(size) is not int or size < 0 for size in sizes):
            raise ValueError("a size is no whole number")
        if any(type(entry.dtype) is not str for entry in entries.values()):
            raise ValueError("a dtype is no text")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise _damaged(path, "its header is not readable") from error
    expected = _LENGTH_BYTES + length + end
    if size_bytes != expected:
        raise _damaged(path, f"it has {size_bytes} bytes where its header announces {expected}")
    return entries


def _damaged(path: Path, fact: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the weights file {path} is truncated or damaged: {fact}; download or copy the model again"
    )


class ShardReader:
    """The tensors of a model folder, read one at a time.

    Args:
        folder: holds ``model.safetensors``, or shards with ``model.safetensors.index.json``.
        file: read this one safetensors file of the folder instead.

    Raises:
        UnsupportedModelError: no safetensors weights, a shard of the index is missing or truncated, or a
            tensor of the index is in none of them.

    Example:
        >>> reader = ShardReader(Path("compact"))                          # doctest: +SKIP
        >>> reader.entries["model.embed_tokens.weight"].shape              # doctest: +SKIP
        (49152, 576)
    """

    def __init__(self, folder: Path, file: str = SINGLE_FILE):
        self.folder = Path(folder)
        self.entries: dict[str, TensorEntry] = {}
        index_file = self.folder / INDEX_FILE
        if (self.folder / file).is_file():
            self.entries = read_header(self.folder / file)
        elif index_file.is_file():
            self._read_index(index_file)
        else:
            raise UnsupportedModelError(
                f"{self.folder} has no {SINGLE_FILE} and no {INDEX_FILE}; "
                "only safetensors weights are read: save the model with save_pretrained first"
            )

    def _read_index(self, index_file: Path) -> None:
        try:
            places: dict[str, str] = json.loads(index_file.read_text(encoding="utf-8"))["weight_map"]
            shards = sorted(set(places.values()))
            outside = [shard for shard in shards if shard != Path(shard).name or not shard.endswith(".safetensors")]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UnsupportedModelError(f"{index_file} is not a readable weights index; copy it again") from error
        if outside:
            raise UnsupportedModelError(
                f"{index_file} names {outside[0]!r}, which is no safetensors file in its own folder; copy the model "
                "again from a source that you trust"
            )
        missing = [shard for shard in shards if not (self.folder / shard).is_file()]
        if missing:
            raise UnsupportedModelError(
                f"{self.folder} lacks {len(missing)} of its {len(shards)} weights files "
                f"({', '.join(missing[:3])}); {index_file.name} names them: download or copy the model again"
            )
        found: dict[str, TensorEntry] = {}
        for shard in shards:
            found.update(read_header(self.folder / shard))
        lost = [name for name in places if name not in found or found[name].file != places[name]]
        if lost:
            raise UnsupportedModelError(
                f"{index_file} places {lost[0]!r} in {places[lost[0]]}, where it is not "
                f"({len(lost)} such tensors); the shards belong to different saves: copy the model again"
            )
        self.entries = {name: found[name] for name in places}

    def names(self) -> list[str]:
        """All tensor names, in file order."""
        return list(self.entries)

    def digest(self) -> str:
        """Hex digest of everything in the weights files; takes about as long as reading them."""
        files = sorted({entry.file for entry in self.entries.values()})
        return hashlib.sha256("".join(sha256(self.folder / file) for file in files).encode()).hexdigest()

    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.size_bytes for entry in self.entries.values())

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU in its stored dtype; only its bytes are read."""
        from safetensors import safe_open

        with safe_open(self.folder / self.entries[name].file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of a matrix, in its stored dtype; only their bytes are read."""
        from safetensors import safe_open

        with safe_open(self.folder / self.entries[name].file, framework="pt") as file:
            tensor: Tensor = file.get_slice(name)[start:stop]
        return tensor


class ShardWriter:
    """Writes tensors into files of at most ``shard_size`` bytes, with Hugging Face's names and index.

    Tensors are collected until a file is full, so the memory held is one shard. A tensor larger than
    ``shard_size`` gets a file of its own.

    Example:
        >>> writer = ShardWriter(folder, 5 * 10**9)      # doctest: +SKIP
        >>> writer.write(merged_tensors(model, dtype))   # doctest: +SKIP
    """

    def __init__(self, folder: Path, shard_size: int):
        self.folder = Path(folder)
        self.shard_size = shard_size
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def write(self, tensors: Iterable[tuple[str, Tensor]]) -> int:
        """Writes all tensors and the index; returns the bytes of their data.

        Raises:
            OSError, safetensors.SafetensorError: the disk refused.
        """
        for name, tensor in tensors:
            size_bytes = tensor.numel() * tensor.element_size()
            if self._pending and self._pending_bytes + size_bytes > self.shard_size:
                self._flush()
            self._pending[name] = tensor.detach().to("cpu").contiguous()
            self._pending_bytes += size_bytes
        if self._pending or not self._shards:
            self._flush()
        self._name_shards()
        return self._total_bytes

    def _flush(self) -> None:
        from safetensors.torch import save_file

        path = self.folder / f"shard-{len(self._shards)}"
        save_file(self._pending, path, metadata={"format": "pt"})
        path.chmod(0o644)
        self._shards.append(list(self._pending))
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def _name_shards(self) -> None:
        """Gives the files their final names, which say how many there are."""
        count = len(self._shards)
        if count == 1:
            (self.folder / "shard-0").rename(self.folder / SINGLE_FILE)
            return
        places: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            file_name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            (self.folder / f"shard-{number}").rename(self.folder / file_name)
            places.update(dict.fromkeys(names, file_name))
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(places.items()))}
        write_json(self.folder / INDEX_FILE, index)

"""A safetensors file written piece by piece: no tensor is ever whole in memory.

Data lies in side files until all sizes are known, one for every width of numbers, because the format has no gaps and
its data must be aligned: the widest come first.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from prunetune.core.errors import UnsupportedModelError

_WORDS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass
class _Spooled:
    dtype: torch.dtype
    start: int
    shape: tuple[int, ...] = (0,)
    count: int = 0
    hash: Any = field(default_factory=hashlib.sha256)


class TensorSpool:
    """Collects tensors and writes them out at the end.

    Args:
        folder: for the side files.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._files: dict[int, BinaryIO] = {}
        self._tensors: dict[str, _Spooled] = {}

    def append(self, name: str, piece: Tensor) -> None:
        """Adds to the end of a 1-D tensor. Tensors whose numbers are equally wide are appended to one after another."""
        if piece.dtype not in _WORDS:
            raise UnsupportedModelError(f"{name} holds {piece.dtype}, which no weights file can")
        width = piece.dtype.itemsize
        if width not in self._files:
            self._files[width] = open(self._folder / f"spool-{width}", "w+b")  # noqa: SIM115 - closed by finish
        file = self._files[width]
        tensor = self._tensors.setdefault(name, _Spooled(piece.dtype, file.tell()))
        data = _bytes(piece)
        file.write(data)
        tensor.hash.update(data)
        tensor.count += piece.numel()
        tensor.shape = (tensor.count,)

    def add(self, name: str, tensor: Tensor) -> None:
        """Adds a whole tensor of any shape."""
        self.append(name, tensor)
        self._tensors[name].shape = tuple(tensor.shape)

    def digests(self) -> dict[str, str]:
        """Name -> ``tensor_digest`` of every tensor."""
        return {name: _described(part.shape, part.dtype, part.hash) for name, part in self._tensors.items()}

    def finish(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Writes the file and removes the side files."""
        starts, end = {}, 0
        for width in sorted(self._files, reverse=True):
            starts[width] = end
            end += self._files[width].tell()
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        for name, part in self._tensors.items():
            start = starts[part.dtype.itemsize] + part.start
            offsets = [start, start + part.count * part.dtype.itemsize]
            header[name] = {"dtype": _WORDS[part.dtype], "shape": list(part.shape), "data_offsets": offsets}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for width in starts:
                self._files[width].seek(0)
                shutil.copyfileobj(self._files[width], file)
                self._files[width].close()
                (self._folder / f"spool-{width}").unlink()


def tensor_digest(tensor: Tensor) -> str:
    """Of a tensor's shape, dtype and bytes."""
    return _described(tuple(tensor.shape), tensor.dtype, hashlib.sha256(_bytes(tensor)))


def _described(shape: tuple[int, ...], dtype: torch.dtype, data: Any) -> str:
    return f"{shape} {dtype} {data.hexdigest()}"


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data

"""What was learnt, as folders hold it: a LoRA adapter, or a whole fine-tuned model. Both hand out deltas by tensor.

Nothing is loaded as a model; an adapter's factors are read module by module, everything else in slices, when it is
asked for.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunetune.core.errors import PlanMismatchError, UnsupportedModelError
from prunetune.core.files import read_json
from prunetune.model.deltas import Delta, Difference, LowRank, Place
from prunetune.model.shards import ShardReader

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<kind>A|B|embedding_A|embedding_B|magnitude_vector)(\.weight)?$")
# Of adapter_config.json: what has no delta that could be read off the file.
_REFUSED = {
    "lora_bias": "trains biases beside the factors",
    "trainable_token_indices": "trains single token rows",
    "target_parameters": "adapts parameters that are no linear's weight",
    "layer_replication": "repeats layers",
}


@dataclass(frozen=True)
class BaseSlices:
    """Row slices of the base's tensors, as stored.

    Args:
        reader: the base folder's tensors.
        tied: name of a tensor that is not in the files -> the one it is tied to.
    """

    reader: ShardReader
    tied: Mapping[str, str]

    def name(self, name: str) -> str:
        """Where a tensor's numbers are stored."""
        return name if name in self.reader.entries else self.tied.get(name, name)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of a tensor; None if there is none of that name."""
        entry = self.reader.entries.get(self.name(name))
        return None if entry is None else entry.shape

    def rows(self, name: str) -> Callable[[int, int], Tensor]:
        """(start, stop) -> rows."""
        return lambda start, stop: self.reader.rows(self.name(name), start, stop)


class Tuned(ABC):
    """What was learnt on top of a base.

    Args:
        folder: where it is.
    """

    # Whether a change of the embedding is one of the head that is tied to it, too. For an adapter it is not: PEFT adds
    # its factors to the one module alone.
    moves_tied_head = False

    def __init__(self, folder: Path):
        self.folder = folder

    @abstractmethod
    def changed(self, base: BaseSlices) -> dict[str, tuple[int, int]]:
        """Stock name -> shape of every matrix that has a delta."""

    @abstractmethod
    def delta(self, place: Place, base: BaseSlices) -> Delta:
        """The delta of one of them, at the rows and columns that are left."""

    @abstractmethod
    def replaced(self, base: BaseSlices) -> dict[str, Callable[[], Tensor]]:
        """Stock name -> tensors that are taken whole: trained without factors, or with new rows."""


class Adapter(Tuned):
    """A LoRA adapter folder of PEFT.

    Scales are read module by module (rank and alpha patterns, rsLoRA). Embedding adapters, DoRA and
    ``modules_to_save`` are understood.

    Raises:
        UnsupportedModelError: no adapter, a kind that has no delta on file, numbers that are not finite.
    """

    def __init__(self, folder: Path):
        super().__init__(folder)
        if not (folder / ADAPTER_WEIGHTS).is_file():
            raise UnsupportedModelError(f"{folder} has no {ADAPTER_WEIGHTS}; save the adapter with save_pretrained")
        self.config: dict[str, Any] = _adapter_config(folder / ADAPTER_CONFIG)
        if self.config.get("peft_type") != "LORA":
            raise UnsupportedModelError(f"{folder} is a {self.config.get('peft_type')} adapter; LoRA can be merged")
        for name, why in _REFUSED.items():
            if self.config.get(name):
                raise UnsupportedModelError(f"{folder} {why} ({name}), which has no delta on file; merge it with PEFT")
        self._reader = ShardReader(folder, ADAPTER_WEIGHTS)  # says so if the file is cut short
        # Module -> kind of factor -> its name in the file; and the names of tensors that were trained whole.
        self._factors: dict[str, dict[str, str]] = {}
        self._whole: dict[str, str] = {}
        for name in self._reader.names():
            if not bool(torch.isfinite(self._reader.read(name)).all()):
                raise UnsupportedModelError(
                    f"{folder}: {name} holds numbers that are not finite; the training diverged"
                )
            if ".base_layer." in name:
                continue  # PEFT saves an adapted embedding's own weights, too
            match = _FACTOR.match(name.removeprefix(_PREFIX))
            if match is None:
                self._whole[name.removeprefix(_PREFIX)] = name
            else:
                self._factors.setdefault(match["module"], {})[match["kind"].removeprefix("embedding_")] = name

    def changed(self, base: BaseSlices) -> dict[str, tuple[int, int]]:
        found = {}
        for module in self._factors:
            (_, inputs), (outputs, _) = self._oriented_shapes(module)
            found[f"{module}.weight"] = (outputs, inputs)
        return found

    def delta(self, place: Place, base: BaseSlices) -> Delta:
        module = place.name.removesuffix(".weight")
        a, b = self.factors(module)
        a = a if place.columns is None else a[:, place.columns]
        b = b if place.rows is None else b[place.rows]
        low_rank = LowRank(place, a, b, self.scale(module))
        if "magnitude_vector" not in self._factors[module]:
            return low_rank
        if place.rows is not None or place.columns is not None or self._transposed(module):
            raise PlanMismatchError(
                f"{self.folder} is a DoRA adapter: its magnitudes are norms over all inputs of {module}, so it cannot "
                "be sliced. Merge it into the dense base, then prune"
            )
        return _Dora(low_rank, base.rows(place.name), self._read(module, "magnitude_vector"))

    def replaced(self, base: BaseSlices) -> dict[str, Callable[[], Tensor]]:
        return {name: partial(self._reader.read, stored) for name, stored in self._whole.items()}

    @property
    def modules(self) -> list[str]:
        """Stock paths of the modules that have factors."""
        return list(self._factors)

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """(r, n) and (m, r) whose product has the orientation of the stored weight."""
        self._oriented_shapes(module)  # says so if they do not fit
        a, b = self._read(module, "A"), self._read(module, "B")
        return (b.T, a.T) if self._turned(module) else (a, b)

    def scale(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA, as this module has them."""
        (rank, _), _ = self._oriented_shapes(module)
        alpha = _by_pattern(self.config.get("alpha_pattern") or {}, module, self.config["lora_alpha"])
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def named_factors(self, module: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        """(r, n) and (m, r) under the names and in the orientation in which this adapter's file has its factors."""
        kinds = ("A.weight", "B.weight")
        if self._is_embedding(module):
            kinds = ("embedding_A", "embedding_B")
        if self._turned(module):
            a, b = b.T, a.T
        return {f"{_PREFIX}{module}.lora_{kind}": factor for kind, factor in zip(kinds, (a, b))}

    def _transposed(self, module: str) -> bool:
        return bool(self.config.get("fan_in_fan_out"))

    def _turned(self, module: str) -> bool:
        """Whether the file has the factors the other way round than the stored weight."""
        return self._transposed(module) or self._is_embedding(module)

    def _read(self, module: str, kind: str) -> Tensor:
        return self._reader.read(self._factors[module][kind])

    def _oriented_shapes(self, module: str) -> tuple[tuple[int, int], tuple[int, int]]:
        """(r, n) and (m, r), from the file's header."""
        names = self._factors[module]
        missing = [f"lora_{kind}" for kind in ("A", "B") if kind not in names]
        if missing:
            raise UnsupportedModelError(f"{self.folder}: {module} has no {missing[0]}; the file is incomplete")
        a, b = (self._reader.entries[names[kind]].shape for kind in ("A", "B"))
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise UnsupportedModelError(f"{self.folder}: the factors of {module} do not fit each other; copy it again")
        (r, n), (m, _) = a, b
        return ((r, m), (n, r)) if self._turned(module) else ((r, n), (m, r))

    def _is_embedding(self, module: str) -> bool:
        return module.rpartition(".")[2] in ("embed_tokens", "wte", "word_embeddings")


class _Dora(Delta):
    """m * (W + D) / |W + D| - W, row by row (arXiv 2402.09353)."""

    def __init__(self, low_rank: LowRank, base: Callable[[int, int], Tensor], magnitude: Tensor):
        super().__init__(low_rank.place)
        self._low_rank, self._base, self._magnitude = low_rank, base, magnitude.float().reshape(-1)

    def rows(self, start: int, stop: int) -> Tensor:
        base = self._base(start, stop).float()
        moved = base + self._low_rank.rows(start, stop)
        norm = torch.linalg.vector_norm(moved, dim=1, keepdim=True)
        rows: Tensor = moved * (self._magnitude[start:stop, None] / norm) - base
        return rows


class TunedModel(Tuned):
    """A whole fine-tuned model folder: delta = tuned - base, matrix by matrix.

    Vectors (norms, biases), and an embedding and head of other than the base's rows (added vocabulary), are no deltas.
    """

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._reader = ShardReader(folder)
        self.moves_tied_head = HEAD not in self._reader.entries

    def changed(self, base: BaseSlices) -> dict[str, tuple[int, int]]:
        self._check(base)
        return {
            name: (entry.shape[0], entry.shape[1])
            for name, entry in self._reader.entries.items()
            if len(entry.shape) == 2 and base.shape(name) == entry.shape
        }

    def _check(self, base: BaseSlices) -> None:
        """That it has the base's tensors, no others, and of the same shapes, but for tied heads and vocabulary."""
        entries, advice = self._reader.entries, "is this the base it was tuned from?"
        if strange := [name for name in entries if base.shape(name) is None]:
            raise UnsupportedModelError(
                f"{self.folder} has {strange[0]}, which {base.reader.folder} does not have: {advice}"
            )
        tied = base.tied.get(HEAD) is not None
        if missing := [name for name in base.reader.entries if name not in entries and not (name == HEAD and tied)]:
            raise UnsupportedModelError(
                f"{self.folder} lacks {missing[0]} and {len(missing) - 1} more of the base's tensors; copy or save it "
                "again, whole"
            )
        for name, entry in entries.items():
            shape = base.shape(name)
            assert shape is not None
            if entry.shape != shape and not (name in (EMBEDDING, HEAD) and entry.shape[1:] == shape[1:]):
                raise PlanMismatchError(
                    f"{self.folder} has {name} of shape {entry.shape}, and in {base.reader.folder} it is {shape}: "
                    f"{advice} Of a pruned base, merge into the dense one, then prune"
                )

    def delta(self, place: Place, base: BaseSlices) -> Delta:
        if place.rows is not None or place.columns is not None:
            raise PlanMismatchError(
                f"{self.folder} is a whole model, and the base was pruned: its delta needs the dense base. Merge into "
                "the dense base, then prune"
            )
        reader = self._reader
        return Difference(place, lambda start, stop: reader.rows(place.name, start, stop), base.rows(place.name))

    def replaced(self, base: BaseSlices) -> dict[str, Callable[[], Tensor]]:
        changed = self.changed(base)
        return {name: partial(self._reader.read, name) for name in self._reader.entries if name not in changed}


def _adapter_config(path: Path) -> dict[str, Any]:
    try:
        config = read_json(path)
        if not isinstance(config, dict):
            raise ValueError("it holds no mapping")
        alpha = config.get("lora_alpha") if config.get("peft_type") == "LORA" else 0
        numbers = [alpha, *(config.get("alpha_pattern") or {}).values()]
        if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
            raise ValueError("an alpha is no number")
        for pattern in config.get("alpha_pattern") or {}:
            re.compile(pattern)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, re.error) as error:
        raise UnsupportedModelError(f"{path} is no adapter configuration ({error}); copy it again") from error
    return config


def open_tuned(folder: Path) -> Tuned:
    """The adapter or model in a folder.

    Raises:
        UnsupportedModelError: there is neither.
    """
    if not folder.is_dir():
        raise UnsupportedModelError(f"there is no folder {folder}")
    return Adapter(folder) if (folder / ADAPTER_CONFIG).is_file() else TunedModel(folder)


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that names the module, by PEFT's rule: the whole name or a dotted end of it."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)

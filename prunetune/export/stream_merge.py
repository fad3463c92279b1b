"""Deltas into a base folder, tensor by tensor, without loading a model: memory does not grow with the base.

Held at once: the shard that is being filled and one block of rows. Shards get their final names in a working folder
beside the target; a merge that was stopped goes on with the shards that are missing, and the folder takes its name when
the last one is there.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from prunetune.core.console import note, warn
from prunetune.core.errors import ExportError, PlanMismatchError, UnsupportedModelError
from prunetune.core.files import free_bytes, new_file, read_json, recover, sweep, take_place, write_json
from prunetune.core.lock import only_one
from prunetune.core.sizes import format_bytes
from prunetune.export.combine import combine
from prunetune.export.merge_source import Source, ranks_of
from prunetune.methods.deltas import DeltaContext, DeltaMethod
from prunetune.model.deltas import BLOCK_BYTES, Delta, Place
from prunetune.model.shards import INDEX_FILE, SINGLE_FILE, ShardReader
from prunetune.model.surgery import Surgery
from prunetune.model.tuned import EMBEDDING, HEAD, BaseSlices

MERGE_FILE = "prunetune_merge.json"
# What an entry of a block takes while it is merged: the sum, and for each model its delta, 64-bit words and a mask.
_SUM_BYTES, _DELTA_BYTES = 16, 32
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".gguf", ".pt", ".pth")


@dataclass(frozen=True)
class MergeSettings:
    """How deltas are added up.

    Args:
        consensus: see ``combine``. normalise: see ``combine``. scale: of the merged delta.
        seed: of random masks. dtype: of the floating point tensors that are written; None: as the base stores them.
        shard_size: a weights file is at most so many bytes. block_bytes: of rows in work at once.
        keep_zeros: entries of matrices that are 0 in the base stay 0; None: it has too few to ask.
    """

    consensus: bool = False
    normalise: bool = False
    scale: float = 1.0
    seed: int = 0
    dtype: torch.dtype | None = None
    shard_size: int = 2 * 10**9
    block_bytes: int = BLOCK_BYTES
    keep_zeros: bool | None = None


@dataclass(frozen=True)
class Part:
    """What one source adds to one tensor; ``method`` None: all of its delta."""

    source: Source
    delta: Delta
    method: DeltaMethod | None
    context: DeltaContext

    def pruned(self) -> Delta:
        """What the method leaves of the delta."""
        return self.delta if self.method is None else self.method.apply(self.delta, self.context)


class StreamMerge:
    """A merge that was checked and is ready to be written; ``slices`` are the base's tensors.

    Args:
        base: folder of the base model, dense or pruned.
        sources: what is merged.
        settings: how.
        surgery: the plan by which the base was pruned, when the sources were trained on the dense model.
        reader: of the base's numbers, where they are not what its files hold (a quantised base).

    Raises:
        PlanMismatchError: a source's matrices do not fit the base's.
        UnsupportedModelError: a source changes a tensor that the base does not have.
    """

    def __init__(
        self,
        base: Path,
        sources: Sequence[Source],
        settings: MergeSettings,
        surgery: Surgery | None = None,
        reader: ShardReader | None = None,
    ):
        self.base, self.sources, self.settings = base, sources, settings
        self.config: dict[str, Any] = read_json(base / "config.json")
        self._reader = reader or ShardReader(base)
        tied = self.config.get("tie_word_embeddings") and HEAD not in self._reader.entries
        self.slices = BaseSlices(self._reader, {HEAD: EMBEDDING} if tied else {})
        # Name in the base -> the deltas that are added there, each with its source.
        self._deltas: dict[str, list[tuple[Source, Place]]] = {}
        # Name in the base -> tensors that stand there whole, each with its source.
        self._replaced: dict[str, list[tuple[Source, Callable[[], Tensor]]]] = {}
        self._ranked: dict[str, Mapping[str, tuple[int, int]]] = {}
        for source in sources:
            self._take(source, surgery)
        self._shapes = self._all_shapes()

    def _take(self, source: Source, surgery: Surgery | None) -> None:
        for name, shape in source.tuned.changed(self.slices).items():
            here = name if surgery is None else surgery.rename(name)
            if here is None:
                continue  # its layer left
            cut = surgery.cuts.get(name.removesuffix(".weight")) if surgery is not None else None
            place = Place(name, shape, cut.rows if cut else None, cut.columns if cut else None)
            found = self.slices.shape(here)
            if found is None:
                raise UnsupportedModelError(f"{source.tuned.folder} changes {here}, which {self.base} does not have")
            if found != place.kept_shape:
                advice = (
                    "is this the base it was trained on? If the base was pruned, name its plan with --plan"
                    if surgery is None
                    else "the plan is not the one by which this base was pruned"
                )
                raise PlanMismatchError(
                    f"{source.tuned.folder} changes {here} of shape {place.kept_shape}, and in {self.base} it is "
                    f"{found}: {advice}"
                )
            self._deltas.setdefault(here, []).append((source, place))
        for name, build in source.tuned.replaced(self.slices).items():
            here = name if surgery is None else surgery.rename(name)
            if here is not None:
                self._replaced.setdefault(here, []).append((source, build))

    def _all_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that is written. A head that was tied and is changed alone stands on its own from now on."""
        shapes = {name: entry.shape for name, entry in self._reader.entries.items()}
        if self.slices.tied and self._tears_the_tie():
            shapes[HEAD] = shapes[EMBEDDING]
        for name, parts in self._replaced.items():
            shapes[name] = tuple(parts[-1][1]().shape)
            if len(parts) > 1 and shapes[name] != self.slices.shape(name):
                warn(f"{name} has other than the base's rows in several sources; the last one's is taken")
        return shapes

    def _tears_the_tie(self) -> bool:
        """Whether embedding and head, one tensor in the base, become two."""
        if HEAD in self._deltas or HEAD in self._replaced:
            return True
        alone = any(not source.tuned.moves_tied_head for source, _ in self._deltas.get(EMBEDDING, ()))
        # A whole new embedding of another size brings its head with it.
        parts = self._replaced.get(EMBEDDING)
        return alone or (parts is not None and tuple(parts[-1][1]().shape) == self.slices.shape(EMBEDDING))

    def write(self, folder: Path, metadata: Mapping[str, Any], *, replace: bool = False) -> None:
        """Writes the merged model folder; goes on where an interrupted merge of the same kind stopped.

        Args:
            folder: takes its content when everything is there.
            metadata: JSON values that say what was merged how; a working folder of another merge is not continued.
            replace: overwrite a former merge there.

        Raises:
            ExportError: the folder exists, or the disk is full; finished shards are kept for the next try.
            FolderInUseError: another process merges into the same folder.
        """
        with only_one(folder):
            self._write(folder, metadata, replace=replace)

    def _write(self, folder: Path, metadata: Mapping[str, Any], *, replace: bool) -> None:
        recover(folder)
        if folder.exists() and not (replace and (folder / MERGE_FILE).is_file()):
            raise ExportError(f"{folder} exists; name another folder, or replace a former merge there with --overwrite")
        shards = self._shards()
        needed = sum(self._bytes(name) for name in self._shapes)
        work = folder.with_name(f".{folder.name}.merging")
        done = work.is_dir() and (work / MERGE_FILE).is_file() and read_json(work / MERGE_FILE) == dict(metadata)
        if not done:
            shutil.rmtree(work, ignore_errors=True)
            if free_bytes(folder) < needed:
                raise ExportError(
                    f"the merge to {folder} needs {format_bytes(needed)}, but the disk has "
                    f"{format_bytes(free_bytes(folder))} free; free some space or choose another disk"
                )
            work.mkdir(parents=True)
            write_json(work / MERGE_FILE, dict(metadata))
        sweep(work)
        try:
            for number, names in enumerate(shards):
                self._write_shard(work / _shard_name(number, len(shards)), names)
            self._write_beside(work, shards)
        except (OSError, SafetensorError) as error:
            raise ExportError(
                f"the merge to {folder} stopped: {error}. Finished shards are in {work}; the same command goes on"
            ) from error
        take_place(work, folder)

    def _shards(self) -> list[list[str]]:
        """Names of the tensors of each file, in the base's order."""
        shards: list[list[str]] = [[]]
        size = 0
        for name in self._shapes:
            if shards[-1] and size + self._bytes(name) > self.settings.shard_size:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += self._bytes(name)
        return shards

    def _bytes(self, name: str) -> int:
        entry = self._reader.entries.get(self.slices.name(name))
        stored = entry.size_bytes // max(1, math.prod(entry.shape)) if entry is not None else 4
        return math.prod(self._shapes[name]) * (self.settings.dtype.itemsize if self.settings.dtype else stored)

    def _write_shard(self, path: Path, names: Sequence[str]) -> None:
        if path.is_file():
            return
        with new_file(path) as temporary:
            save_file({name: self.tensor(name) for name in names}, temporary, metadata={"format": "pt"})
            temporary.chmod(0o644)
        note(f"{path.name}: {len(names)} tensors")

    @torch.no_grad()
    def tensor(self, name: str) -> Tensor:
        """One merged tensor: the sum in float32, block by block, cast once.

        Raises:
            ExportError: numbers that are not finite came out.
        """
        if name in self._replaced:
            return self._finite(name, self._whole(name)).contiguous()
        if name not in self._deltas:
            return self._cast(self._reader.read(self.slices.name(name))).contiguous()
        pruned = [part.pruned() for part in self.parts(name)]
        weights = [source.weight_of(name) for source, _ in self._deltas[name]]
        base = self.slices.rows(name)
        m, n = pruned[0].shape
        step = max(1, self.settings.block_bytes // (n * (_SUM_BYTES + _DELTA_BYTES * len(pruned))))
        merged: Tensor | None = None
        for start in range(0, m, step):
            stop = min(start + step, m)
            blocks = [delta.rows(start, stop) for delta in pruned]
            total = combine(blocks, weights, consensus=self.settings.consensus, normalise=self.settings.normalise)
            rows = base(start, stop)
            if self.settings.keep_zeros:
                total = total * (rows != 0)
            found = self._finite(name, self._cast(rows.float() + self.settings.scale * total, rows.dtype))
            if merged is None:
                merged = torch.empty(m, n, dtype=found.dtype)
            merged[start:stop] = found
        assert merged is not None
        return merged

    def _whole(self, name: str) -> Tensor:
        """A tensor that sources trained whole: the only one's, or the weighted sum of their changes, unpruned."""
        parts, settings = self._replaced[name], self.settings
        found = [build() for _, build in parts]
        weights = [source.weight_of(name) for source, _ in parts]
        if self.slices.shape(name) != tuple(found[-1].shape) or not found[-1].is_floating_point():
            return self._cast(found[-1])
        if len(self.sources) == 1 and weights == [1.0] and settings.scale == 1:
            return self._cast(found[0], self.slices.rows(name)(0, 1).dtype)
        base = self._reader.read(self.slices.name(name))
        changes = [(tensor.float() - base.float()).flatten()[None] for tensor in found]
        total = combine(changes, weights, consensus=settings.consensus, normalise=settings.normalise)
        return self._cast(base.float() + settings.scale * total.reshape(base.shape), base.dtype)

    def parts(self, name: str) -> list[Part]:
        """What each source adds to a tensor."""
        return [self._part(name, source, place) for source, place in self._deltas.get(name, ())]

    def _part(self, name: str, source: Source, place: Place) -> Part:
        ranks = self._ranks(source).get(name)
        return Part(
            source,
            source.tuned.delta(place, self.slices),
            source.method_of(name),
            source.context(name, self.settings.seed, ranks),
        )

    def _ranks(self, source: Source) -> Mapping[str, tuple[int, int]]:
        if source.name not in self._ranked:
            places = {name: place for name, parts in self._deltas.items() for own, place in parts if own is source}
            self._ranked[source.name] = ranks_of(
                source, places, lambda name: source.tuned.delta(places[name], self.slices)
            )
        return self._ranked[source.name]

    def base_norm(self, name: str) -> float:
        """Norm of the base's own matrix."""
        m, rows = self._shapes[name][0], self.slices.rows(name)
        step = max(1, self.settings.block_bytes // (4 * self._shapes[name][1]))
        squares = (float(rows(i, min(i + step, m)).double().square().sum()) for i in range(0, m, step))
        return math.sqrt(sum(squares))

    @property
    def names(self) -> list[str]:
        """Every tensor that is written."""
        return list(self._shapes)

    @property
    def calibrated(self) -> bool:
        """Whether a method needs rows: to see inputs, or to search an option."""
        methods = [source.method for source in self.sources]
        methods += [special.method for source in self.sources for special in source.special if special.method]
        return any(method.calibrated or method.search for method in methods)

    @property
    def replaced(self) -> Mapping[str, Callable[[], Tensor]]:
        """Tensors that sources trained whole."""
        return {name: partial(self._whole, name) for name in self._replaced}

    @property
    def changed(self) -> list[str]:
        """Names of the matrices that get a delta, in the base's order."""
        return [name for name in self._shapes if name in self._deltas]

    def _finite(self, name: str, tensor: Tensor) -> Tensor:
        if not bool(torch.isfinite(tensor).all()):
            raise ExportError(
                f"{name}: the merged weights are not finite. Look whether the source's are; if so, lower --scale, or "
                "keep more of the delta"
            )
        return tensor

    def _cast(self, tensor: Tensor, stored: torch.dtype | None = None) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return tensor.to(self.settings.dtype or stored or tensor.dtype)

    def _write_beside(self, work: Path, shards: Sequence[Sequence[str]]) -> None:
        """Index, config, tokenizer: what the base has beside its weights, with the changes that the merge makes."""
        if len(shards) > 1:
            places = {name: _shard_name(number, len(shards)) for number, names in enumerate(shards) for name in names}
            total = sum(self._bytes(name) for name in self._shapes)
            write_json(
                work / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
            )
        for file in self.base.iterdir():
            if file.is_file() and not file.name.endswith(_WEIGHTS) and file.name != "config.json":
                shutil.copyfile(file, work / file.name)
        write_json(work / "config.json", self.out_config())

    def out_config(self) -> dict[str, Any]:
        """config.json of what is written: the base's, with the changes that the merge makes."""
        config = {key: value for key, value in self.config.items() if key != "quantization_config"}
        if self.slices.tied and HEAD in self._shapes:
            config["tie_word_embeddings"] = False
        if EMBEDDING in self._shapes and "vocab_size" in config:
            config["vocab_size"] = self._shapes[EMBEDDING][0]
        if self.settings.dtype is not None:
            config.pop("torch_dtype", None)
            config["dtype"] = str(self.settings.dtype).removeprefix("torch.")
        return config


def _shard_name(number: int, count: int) -> str:
    return SINGLE_FILE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"

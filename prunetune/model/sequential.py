"""Sequential calibration: one pass over the calibration tokens, layer after layer, kept in a folder.

Every layer sees what the dense layers before it produced, so all scores are about the unpruned model and may be ranked
together. Another score or another size reads the folder instead of running the model. A pass that was stopped goes on
at the layer where it was, from the hidden states that the last finished layer left.
Legend: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from prunetune.core.console import console
from prunetune.core.errors import DataError
from prunetune.core.files import disk_is_full, free_bytes, new_file, read_json, write_json
from prunetune.core.sizes import format_bytes
from prunetune.model.architecture import Architecture
from prunetune.model.layer_statistics import LayerCollector, LayerStatistics
from prunetune.model.layer_stream import LayerStream

FACTS_FILE = "calibration.json"


class Calibration:
    """Statistics of a model's layers in a folder.

    Args:
        folder: of this calibration alone; made if it is not there.
        arch: the dense model.
        facts: what the numbers depend on (model, rows, dtype); JSON values. A folder with other facts is refused.

    Raises:
        DataError: the folder belongs to another calibration.
    """

    def __init__(self, folder: Path, arch: Architecture, facts: Mapping[str, Any]):
        self.folder, self.arch = Path(folder), arch
        known = self.folder / FACTS_FILE
        if known.is_file() and read_json(known) != dict(facts):
            raise DataError(f"{folder} holds another calibration; name another folder or delete it")
        if not known.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(known, dict(facts))

    def missing(self, *, products: Collection[str] = ()) -> int | None:
        """The first layer without statistics, or without products of one of these consumers; None: all are there."""
        names = ("layer", *map(_products, products))
        return next((i for i in range(self.arch.layers) if not all(self._file(n, i).is_file() for n in names)), None)

    def run(
        self, make_stream: Callable[[], LayerStream], batches: Sequence[Tensor], *, products: Collection[str] = ()
    ) -> None:
        """Runs the layers that are missing.

        Args:
            make_stream: the model; called only if there is something to run.
            batches: token ids (B, S), no padding.
            products: consumers of whose inputs x x^T is kept too, which compensations fit weights to.

        Raises:
            DataError: the disk is full.
        """
        start = self.missing(products=products)
        if start is None:
            return
        self._require_space(sum(ids.numel() for ids in batches), products)
        stream = make_stream()
        start, hidden = self._hidden(start, stream, batches)
        shown = f"calibrating on {sum(ids.numel() for ids in batches)} tokens, layer by layer"
        for index in track(range(start, self.arch.layers), shown, console=console(), transient=True):
            hidden = self._one(stream, index, hidden, products)

    def _one(self, stream: LayerStream, index: int, hidden: list[Tensor], products: Collection[str]) -> list[Tensor]:
        """Runs one layer; the hidden states are replaced batch by batch, so that they exist once."""
        with stream.layer(index) as module:
            collector = LayerCollector(self.arch, module, products=products)
            with collector.listening():
                for place, before_BSD in enumerate(hidden):
                    after_BSD = stream.forward(before_BSD.to(stream.device))
                    collector.add_change(before_BSD.to(stream.device), after_BSD)
                    hidden[place] = after_BSD.cpu()
        tensors = collector.result().tensors()
        for role in products:
            name = f"{role}.products"
            self._write(_products(role), index, {name: tensors.pop(name)})
        if index + 1 < self.arch.layers:
            self._write("hidden", index + 1, {str(place): h_BSD for place, h_BSD in enumerate(hidden)})
        # Last, because its presence says that the layer is done.
        self._write("layer", index, tensors)
        self._file("hidden", index).unlink(missing_ok=True)
        return hidden

    def _hidden(self, start: int, stream: LayerStream, batches: Sequence[Tensor]) -> tuple[int, list[Tensor]]:
        """(layer to go on with, its inputs): those that a stopped pass left, or the embeddings."""
        left = self._file("hidden", start)
        try:
            tensors = load_file(left)
            return start, [tensors[str(place)] for place in range(len(batches))]
        except FileNotFoundError:
            return 0, [h_BSD.cpu() for h_BSD in stream.embed(batches)]
        except (SafetensorError, KeyError) as error:
            raise _damaged(left, error) from error

    def statistics(self, layer: int) -> LayerStatistics:
        """What was found for a layer, without products.

        Raises:
            DataError: the file is damaged.
        """
        path = self._file("layer", layer)
        try:
            return LayerStatistics.from_tensors(load_file(path))
        except (SafetensorError, KeyError, ValueError) as error:
            raise _damaged(path, error) from error

    def products(self, layer: int, role: str) -> Tensor:
        """(F, F) float32 sum of x x^T of a consumer's inputs.

        Raises:
            DataError: the file is damaged.
        """
        path = self._file(_products(role), layer)
        try:
            with safe_open(path, framework="pt") as file:
                found: Tensor = file.get_tensor(f"{role}.products")
                return found
        except SafetensorError as error:
            raise _damaged(path, error) from error

    def _file(self, kind: str, layer: int) -> Path:
        return self.folder / f"{kind}-{layer:05d}.safetensors"

    def _write(self, kind: str, layer: int, tensors: Mapping[str, Tensor]) -> None:
        # Another process may be writing the same file: both have the same numbers, and each a file of its own.
        try:
            with new_file(self._file(kind, layer)) as temporary:
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        except (OSError, SafetensorError) as error:
            advice = "make room" if disk_is_full(error) else "look at its disk and rights"
            raise DataError(
                f"calibration stopped at layer {layer}: {error}. What is finished is in {self.folder}; {advice} and "
                "run the same command again to go on"
            ) from error

    def _require_space(self, tokens: int, products: Collection[str]) -> None:
        arch = self.arch
        widths = {"o": arch.query_heads * arch.head_dim, "down": arch.mlp_channels}
        needed = 2 * 4 * tokens * arch.hidden_size
        needed += arch.layers * sum(4 * widths[role] ** 2 for role in products)
        free = free_bytes(self.folder)
        if needed > free:
            raise DataError(
                f"the calibration needs about {format_bytes(needed)} at {self.folder} and {format_bytes(free)} is "
                "free; make room, name another folder with --cache, take fewer --tokens, or --compensation none"
            )


def _products(role: str) -> str:
    """Kind of the files of one consumer's products."""
    return f"products-{role}"


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is damaged ({error}); delete it and run again")


def batches_of(rows: Sequence[Sequence[int]], most_tokens: int) -> list[Tensor]:
    """Token ids (B, S) of rows that are equally long, so that nothing is padded; at most ``most_tokens`` together."""
    found: list[list[list[int]]] = []
    for row in sorted((list(row) for row in rows if row), key=len):
        last = found[-1] if found else []
        if last and len(last[0]) == len(row) and (len(last) + 1) * len(row) <= most_tokens:
            last.append(row)
        else:
            found.append([row])
    return [torch.tensor(batch) for batch in found]

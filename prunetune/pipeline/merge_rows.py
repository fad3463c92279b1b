"""Calibration of a merge: the base in memory, its inputs measured, and open options searched on real rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from prunetune.core.errors import DataError
from prunetune.core.records import PreparedModel
from prunetune.data import prepare, sources
from prunetune.export.stream_merge import StreamMerge
from prunetune.methods.deltas import By, build_delta
from prunetune.model.delta_inputs import Inputs, measure_inputs
from prunetune.model.shards import ShardReader
from prunetune.model.token_rows import TokenRow, token_rows
from prunetune.model.tuned import EMBEDDING, HEAD
from prunetune.pipeline.delta_search import Judge, search
from prunetune.pipeline.loading import load_tokenizer
from prunetune.pipeline.merge_quantized import plain_model

_TOKENS, _MAX_LENGTH = 8192, 512


class MergeRows:
    """Rows that a merge is calibrated on, and the base model that sees them.

    Args:
        prepared: the base. reader: of the numbers that the sources saw. name: of the rows, as ``data.train`` takes it.

    Raises:
        DataError: no usable row.
    """

    def __init__(self, prepared: PreparedModel, reader: ShardReader, name: str):
        self._tokenizer = load_tokenizer(prepared)
        state = {tensor: reader.read(tensor).float() for tensor in reader.names()}
        self._model = plain_model(prepared.config, state)
        rows = sources.training_rows(sources.read(name, "--calibration"))
        part, _ = prepare.convert(rows, "auto", bool(self._tokenizer.chat_template))
        self._rows: list[TokenRow] = []
        for row in token_rows(self._tokenizer, part.examples, _MAX_LENGTH):
            if sum(len(taken.input_ids) for taken in self._rows) < _TOKENS:
                self._rows.append(row)
        if not self._rows:
            raise DataError(f"--calibration {name} has no usable row")

    def measure(self, merge: StreamMerge) -> dict[str, dict[str, Inputs]]:
        """Source name -> tensor -> what its linear sees in the base."""
        batches = []
        for row in self._rows:
            ids = torch.tensor([row.input_ids])
            batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        found = {}
        for source in merge.sources:
            parts = [(name, part) for name in merge.changed for part in merge.parts(name) if part.source is source]
            found[source.name] = measure_inputs(self._model, {name: part.delta for name, part in parts}, batches)
        return found

    def settle(
        self,
        method: str,
        options: Mapping[str, Any],
        by: By,
        attempt: Callable[[dict[str, Any] | None], StreamMerge],
    ) -> dict[str, Any]:
        """The options with what they leave open searched.

        Args:
            method: the delta method. options: its options. by: what the search goes by.
            attempt: the merge with other options; None: with all of every delta.
        """
        if build_delta(method, options).search is None:
            return dict(options)
        install(self._model, attempt(None))
        judge = Judge(self._model, self._tokenizer, self._rows, by)

        def score(tried: dict[str, Any]) -> float:
            install(self._model, attempt(tried))
            return judge(self._model)

        return search(method, options, score).options


@torch.no_grad()
def install(model: Any, merge: StreamMerge) -> None:
    """Puts every merged tensor into a live model of the base, in the model's dtype."""
    for name in (*merge.changed, *merge.replaced):
        path, _, leaf = name.rpartition(".")
        tensor = merge.tensor(name).to(model.device, model.dtype)
        setattr(model.get_submodule(path), leaf, nn.Parameter(tensor, requires_grad=False))
    if merge.slices.tied and HEAD not in (*merge.changed, *merge.replaced):
        model.get_submodule("lm_head").weight = model.get_submodule(EMBEDDING.rpartition(".")[0]).weight

"""Rows of a step's micro-batches: taken out of the collated tensors, named by their content, dealt out again.

Legend: B rows of a micro-batch, S its padded length, L tokens of one row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunetune.core.errors import DataError
from prunetune.model.token_rows import IGNORED_LABEL

# What TRL's collator returns, padded or padding-free; anything else would be lost when rows are collated again.
_KNOWN = {
    *("input_ids", "labels", "attention_mask", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k"),
    *("max_length_q", "max_length_k", "seq_idx"),
}


@dataclass(frozen=True)
class Row:
    """One row without padding.

    Args:
        input_ids: (L,) int64.
        labels: (L,) int64, -100 where there is no target; the first position never is one.
    """

    input_ids: np.ndarray
    labels: np.ndarray

    @cached_property
    def id(self) -> str:
        """Hash of the content, so that neither place, batch, padding nor process matter."""
        content = self.input_ids.astype("<i8").tobytes() + self.labels.astype("<i8").tobytes()
        return hashlib.sha256(content).hexdigest()[:32]

    @property
    def positions(self) -> np.ndarray:
        """(T,) positions of the target tokens."""
        return np.flatnonzero(self.labels != IGNORED_LABEL)

    def __len__(self) -> int:
        return len(self.input_ids)

    def example(self, kept_T: np.ndarray | None = None) -> dict[str, list[int]]:
        """What the collator takes; ``kept_T`` (T,) bool: the other targets lose their label."""
        labels = self.labels.copy()
        if kept_T is not None:
            labels[self.positions[~kept_T]] = IGNORED_LABEL
        return {"input_ids": self.input_ids.tolist(), "labels": labels.tolist()}


def rows_of(batch: Mapping[str, Any]) -> list[Row]:
    """The rows of a collated micro-batch, padded on either side or laid end to end.

    Raises:
        DataError: it holds something that rows of text do not have.
    """
    unknown = sorted(set(batch) - _KNOWN)
    if unknown:
        raise DataError(
            f"rows are chosen among batches of text, but the collator also returns {', '.join(unknown)}; use TRL's own "
            "collator for text, or train without `select`"
        )
    ids, labels = (_numpy(batch[name]) for name in ("input_ids", "labels"))
    if batch.get("attention_mask") is not None:
        masks = _numpy(batch["attention_mask"]).astype(bool)
        pieces = [(ids[row, mask], labels[row, mask]) for row, mask in enumerate(masks)]
    elif batch.get("position_ids") is not None:
        starts = np.flatnonzero(_numpy(batch["position_ids"])[0] == 0)
        ends = [*starts[1:], ids.shape[1]]
        pieces = [(ids[0, start:end], labels[0, start:end]) for start, end in zip(starts, ends)]
        # Padding to a multiple has position 0 everywhere: rows of one token, which have no target.
        pieces = [piece for piece in pieces if len(piece[0]) > 1]
    else:
        pieces = list(zip(ids, labels))
    return [Row(row_ids, _no_first(row_labels)) for row_ids, row_labels in pieces]


def _numpy(tensor: Tensor) -> np.ndarray:
    found: np.ndarray = tensor.detach().cpu().numpy()
    return found


def _no_first(labels: np.ndarray) -> np.ndarray:
    """Nothing predicts a row's first token."""
    labels = labels.copy()
    labels[:1] = IGNORED_LABEL
    return labels


def deal(lengths: Sequence[int], names: Sequence[str], processes: int) -> list[list[int]]:
    """Which process trains on which rows: about as many tokens each, and never more than its share of the rows.

    Args:
        lengths: tokens of each row.
        names: ids of the rows; rows of one length go by their ids, so that the order of the rows does not matter.
        processes: how many there are.

    Returns:
        Indices of the rows of each process, longest first, so that rows of similar length share a micro-batch.
    """
    most = -(-len(lengths) // processes)
    hands: list[list[int]] = [[] for _ in range(processes)]
    loads = [0] * processes
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], names[row])):
        able = [rank for rank in range(processes) if len(hands[rank]) < most]
        rank = min(able, key=lambda rank: (loads[rank], rank))
        hands[rank].append(row)
        loads[rank] += lengths[row]
    return hands


def in_batches(rows: Sequence[Any], size: int) -> list[list[Any]]:
    """Neighbouring rows in micro-batches of at most ``size``."""
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


def nothing_in_it() -> dict[str, Tensor]:
    """A micro-batch that is passed over: Trainer counts micro-batches, so none may be missing."""
    return {name: torch.empty((1, 0), dtype=torch.int64) for name in ("input_ids", "labels", "attention_mask")}


def stand_in(row: Row) -> dict[str, list[int]]:
    """A short row without targets, for a process that has none while others train."""
    return {"input_ids": row.input_ids[:2].tolist(), "labels": [IGNORED_LABEL] * len(row.input_ids[:2])}

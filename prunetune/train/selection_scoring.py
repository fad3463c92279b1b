"""Statistics of rows under the model as it is in the middle of training, and the table that methods choose from.

Legend: B rows of a scoring batch, S its padded length, T target tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunetune.methods.online import REFERENCE, SCORED_TOKENS
from prunetune.model.score_table import ScoreTable
from prunetune.model.sharded import readable
from prunetune.model.surgery import base_model
from prunetune.model.token_rows import IGNORED_LABEL
from prunetune.model.token_stats import (
    TokenStats,
    evaluating,
    head_statistics,
    hidden_states,
    logit_softcap,
    output_head,
)
from prunetune.train.selection_rows import Row


@dataclass(frozen=True)
class RowScores:
    """What one pass found about a row.

    Args:
        tokens: column -> (T,) array.
        rows: column -> number.
    """

    tokens: dict[str, np.ndarray]
    rows: dict[str, float]


class Scorer:
    """Scores rows without gradients, dropout off, adapters and gates as they are.

    Args:
        trainer: holds model and accelerator.
        columns: what the methods need, of ``methods.online.COLUMNS``.
    """

    def __init__(self, trainer: Any, columns: frozenset[str]):
        self._trainer, self._columns = trainer, columns
        self.softcap = logit_softcap(base_model(trainer.model).config)
        self.head = output_head(base_model(trainer.model))

    def score(self, shares: Sequence[Sequence[Row]], most_tokens: int) -> dict[str, RowScores]:
        """id -> statistics of this process's rows; a collective call.

        Args:
            shares: every process's rows, with different ids.
            most_tokens: a scoring batch has at most so many tokens, padding included, unless one row alone has more.
        """
        trainer = self._trainer
        by_process = [list(_batches(rows, most_tokens)) for rows in shares]
        own = by_process[trainer.accelerator.process_index]
        found: dict[str, RowScores] = {}
        with evaluating(trainer.model), torch.no_grad():
            for batch in own:
                found |= self._score(batch)
            if trainer.engine.shards_weights:
                # Weights are gathered by all processes together, so those with fewer batches run along.
                for number in range(len(own), max(map(len, by_process))):
                    self._score(next(batches[number] for batches in by_process if len(batches) > number))
        return found

    def weight_norm(self) -> float:
        """Norm of the output layer's weight; a collective call."""

        def norm() -> float:
            with readable(self.head) as head:
                return float(torch.linalg.vector_norm(head.weight.detach().float()))

        return float(self._trainer.engine.inside(norm))

    def _score(self, rows: list[Row]) -> dict[str, RowScores]:
        ids_BS, labels_BS, mask_BS = (part.to(self._trainer.args.device) for part in _padded(rows))
        columns, by_row = self._statistics(ids_BS, labels_BS, mask_BS)
        if REFERENCE in self._columns:
            with self._trainer.model.disable_adapter():
                columns[REFERENCE] = self._statistics(ids_BS, labels_BS, mask_BS)[0]["nll"]
        ends = np.cumsum([len(row.positions) for row in rows])
        parts = {name: np.split(column, ends[:-1]) for name, column in columns.items()}
        return {
            row.id: RowScores(
                {name: part[number] for name, part in parts.items()},
                {name: float(column[number]) for name, column in by_row.items()},
            )
            for number, row in enumerate(rows)
        }

    def _statistics(
        self, ids_BS: Tensor, labels_BS: Tensor, mask_BS: Tensor
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        trainer = self._trainer
        labels = labels_BS[:, 1:]
        targets = labels != IGNORED_LABEL
        sizes = targets.sum(1).tolist() if "grad_norm" in self._columns else None

        def statistics() -> TokenStats:
            # The decoder in training's own arithmetic; the statistics of its output always in float32.
            with trainer.accelerator.autocast():
                causal, hidden_BSD = hidden_states(trainer.accelerator.unwrap_model(trainer.model), ids_BS, mask_BS)
            hidden_TD = hidden_BSD[:, :-1][targets]
            with readable(output_head(causal)) as head, torch.autocast(hidden_TD.device.type, enabled=False):
                return head_statistics(head, hidden_TD, labels[targets], softcap=self.softcap, row_sizes=sizes)

        found = trainer.engine.inside(statistics)
        rows = torch.nonzero(targets)[:, 0]
        counts = targets.sum(1).clamp(min=1)
        residual = torch.zeros(len(ids_BS), device=ids_BS.device).index_add_(0, rows, found.residual) / counts
        by_row = {"residual": residual.cpu().numpy()}
        if found.grad_norm is not None:
            by_row["grad_norm"] = found.grad_norm.float().cpu().numpy()
        return {name: getattr(found, name).cpu().numpy() for name in SCORED_TOKENS}, by_row


def make_table(
    rows: Mapping[str, Row],
    scores: Mapping[str, RowScores],
    protection: Callable[[np.ndarray], np.ndarray],
    facts: Mapping[str, Any],
) -> ScoreTable:
    """The table of a step, its rows sorted by id so that batching cannot matter.

    Args:
        rows: id -> row. scores: id -> statistics; empty for methods that need none.
        protection: a row's target ids -> which of them no method may drop.
        facts: numbers about the whole model.
    """
    ids = sorted(rows)
    positions = [rows[name].positions for name in ids]
    targets = [rows[name].labels[position] for name, position in zip(ids, positions)]
    tokens = {
        "token": _joined(targets, np.int64),
        "position": _joined(positions, np.int64),
        "protected": _joined([protection(part) for part in targets], bool),
    }
    by_row: dict[str, np.ndarray] = {"length": np.array([len(rows[name]) for name in ids], dtype=np.int64)}
    if scores and ids:
        first = scores[ids[0]]
        tokens |= {name: np.concatenate([scores[row].tokens[name] for row in ids]) for name in first.tokens}
        by_row |= {name: np.array([scores[row].rows[name] for row in ids]) for name in first.rows}
    offsets = np.concatenate([[0], np.cumsum([len(position) for position in positions])]).astype(np.int64)
    return ScoreTable(ids, offsets, by_row, tokens, facts)


def _joined(parts: list[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype=dtype)


def _batches(rows: Sequence[Row], most_tokens: int) -> Iterator[list[Row]]:
    """Rows of similar length together."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: (-len(row), row.id)):
        if batch and (len(batch) + 1) * len(batch[0]) > most_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _padded(rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """(B, S) ids, labels and attention mask, padded on the right."""
    width = max(len(row) for row in rows)
    ids, labels, mask = (np.full((len(rows), width), value, dtype=np.int64) for value in (0, IGNORED_LABEL, 0))
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row.input_ids
        labels[number, : len(row)] = row.labels
        mask[number, : len(row)] = 1
    return torch.from_numpy(ids), torch.from_numpy(labels), torch.from_numpy(mask)

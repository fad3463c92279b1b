"""InfoBatch in the trainer: losses per row taken from the training forward itself, and a choice once an epoch.

Weights multiply each row's sum of token losses, inside the fused output that the loss is made of, so autograd sees
nothing unusual; the loss is then divided by the target tokens of all rows, the dropped ones included. Its expectation
over the draw is the loss on all rows. Legend: B rows of a micro-batch, S its length.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from prunetune.config.schema import SelectionConfig
from prunetune.core.files import read_json, write_json
from prunetune.methods.samples import build_samples
from prunetune.model.score_table import ScoreTable
from prunetune.train.checkpoint import LOSSES_FILE
from prunetune.train.selection_choice import FLOOR, RowChoice, StepChoice, step_seed
from prunetune.train.selection_rows import Row


class EpochLosses:
    """Mean token loss of every row when it was last trained on, and what this epoch does with the row.

    Args:
        config: names the method.
    """

    def __init__(self, config: SelectionConfig):
        self._config = config
        self.clear()

    def clear(self) -> None:
        """Forgets everything: until rows are seen again, all are trained on."""
        self._losses: dict[str, float] = {}
        self._epoch: int | None = None
        self._verdicts: dict[str, RowChoice] = {}
        self._threshold: float | None = None
        self._seen: list[tuple[list[str], Tensor]] = []

    # ---- the choice

    def choose(self, ids: Sequence[str], epoch: int) -> StepChoice:
        """What happens to these rows in this epoch; rows that were never seen are kept."""
        if epoch != self._epoch:
            self._decide(epoch)
        rows = {name: self._verdicts.get(name, RowChoice(True, "unseen")) for name in ids}
        if not any(row.keep for row in rows.values()):
            first = min(rows)
            rows[first] = RowChoice(True, FLOOR, rows[first].value)
        return StepChoice(rows, self._threshold)

    def _decide(self, epoch: int) -> None:
        self._epoch, self._verdicts, self._threshold = epoch, {}, None
        ids = sorted(self._losses)
        if not ids:
            return
        samples = self._config.samples
        method = build_samples(str(samples.method), samples.options(), step_seed(self._config.seed, epoch))
        # A row's mean loss as the loss of its only token.
        nll = np.array([self._losses[name] for name in ids], dtype=np.float64)
        table = ScoreTable(ids, np.arange(len(ids) + 1), {}, {"nll": nll})
        chosen = method.choose(table, len(ids))
        self._threshold = chosen.threshold
        weight = np.ones(len(ids)) if chosen.weight is None else chosen.weight
        for number, name in enumerate(ids):
            keep = bool(chosen.keep[number])
            value, reason = float(chosen.value[number]), str(chosen.reason[number])
            self._verdicts[name] = RowChoice(keep, reason, value, weight=float(weight[number]) if keep else 1.0)

    # ---- the losses

    @contextlib.contextmanager
    def listening(self, model: Any, rows: Sequence[Row], weights: Mapping[str, float]) -> Iterator[None]:
        """Takes down the rows' losses in the next forward pass, and multiplies them by their weights.

        Args:
            model: whose forward TRL calls with ``fused_lm_head``.
            rows: the micro-batch's rows in order; fewer than its rows if it holds a stand-in.
            weights: id -> weight of the rows that do not weigh 1.
        """

        handles = [
            # First of all, before others mix something else into the losses; last of all, what they made weighs too.
            model.register_forward_hook(lambda module, inputs, output: self._take(output, rows), prepend=True),
            model.register_forward_hook(lambda module, inputs, output: _weighed(output, rows, weights)),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _take(self, output: Any, rows: Sequence[Row]) -> None:
        losses_BS, mask_BS = -output.log_probs, output.label_mask
        row_BS = _row_of_place(rows, losses_BS)
        counted = torch.stack([losses_BS.detach().float(), mask_BS.float()])
        sums = torch.zeros(2, len(rows) + 1, device=losses_BS.device)
        sums.index_add_(1, row_BS.flatten(), counted.flatten(1))
        self._seen.append(([row.id for row in rows], sums[:, :-1]))

    def flush(self) -> None:
        """Brings what all processes saw into the table; a collective call."""
        found = []
        for ids, sums in self._seen:
            losses, counts = sums.tolist()
            found += [(name, loss / count) for name, loss, count in zip(ids, losses, counts) if count]
        self._seen = []
        gathered = gather_object(found)
        self._losses |= dict(sorted(gathered))

    # ---- checkpoints

    def save(self, folder: Path) -> None:
        """Writes the table and this epoch's choice."""
        verdicts = {name: [row.keep, row.reason, row.value, row.weight] for name, row in self._verdicts.items()}
        state = {"losses": self._losses, "epoch": self._epoch, "threshold": self._threshold, "verdicts": verdicts}
        write_json(folder / LOSSES_FILE, state)

    def load(self, folder: Path) -> None:
        """Replaces everything by what a checkpoint holds: nothing, if it has no such file."""
        self.clear()
        if not (folder / LOSSES_FILE).exists():
            return
        state = read_json(folder / LOSSES_FILE)
        self._losses, self._epoch, self._threshold = state["losses"], state["epoch"], state["threshold"]
        self._verdicts = {
            name: RowChoice(keep, reason, value, weight=weight)
            for name, (keep, reason, value, weight) in state["verdicts"].items()
        }


def _weighed(output: Any, rows: Sequence[Row], weights: Mapping[str, float]) -> Any:
    """The output with every row's losses times the row's weight."""
    if not any(row.id in weights for row in rows):
        return output
    weight = torch.tensor([*(weights.get(row.id, 1.0) for row in rows), 1.0], device=output.log_probs.device)
    return dataclasses.replace(output, log_probs=output.log_probs * weight[_row_of_place(rows, output.log_probs)])


def _row_of_place(rows: Sequence[Row], losses_BS: Tensor) -> Tensor:
    """(B, S-1) index of the row that each predicted token belongs to; ``len(rows)`` where there is none."""
    shape, device = losses_BS.shape, losses_BS.device
    if shape[0] > 1 or len(rows) <= 1:
        first_B = torch.arange(shape[0], device=device).clamp(max=len(rows))
        return first_B[:, None].expand(shape)
    # Rows laid end to end: column t is about token t + 1, and a row's first token is never a target.
    place = torch.full((shape[1] + 1,), len(rows), device=device)
    ends = torch.tensor(np.cumsum([len(row) for row in rows]), device=device)
    place[: int(ends[-1])] = torch.bucketize(torch.arange(int(ends[-1]), device=device), ends, right=True)
    return place[1:][None]

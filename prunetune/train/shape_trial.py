"""Plans of different shapes, each tried on the same training rows with its gates closed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from prunetune.core.errors import DataError
from prunetune.model.gates import GateSet
from prunetune.model.plan import Plan
from prunetune.model.planner import Planner
from prunetune.train.calibration import drawn_rows
from prunetune.train.joint import hard_gates
from prunetune.train.selection_rows import deal, rows_of
from prunetune.train.selection_scoring import Scorer

# Of rows, padding aside. All plans see the same ones, and shapes differ by tenths of a nat.
TOKENS = 2048


def trial_losses(trainer: Any, gate_set: GateSet, planner: Planner, plans: Sequence[Plan], seed: int) -> list[float]:
    """Mean negative log-likelihood in nats of the target tokens: of the open model, then of each plan; collective.

    Args:
        trainer: holds model, rows and collator. gate_set: on the model; left with the last plan's gates.
        planner: of the plans. seed: of the run.

    Raises:
        DataError, UnsupportedModelError: rows or the output layer are of a kind that cannot be scored.
    """
    drawn = drawn_rows(trainer, TOKENS, seed, "shape trial")
    rows = {row.id: row for example in drawn for row in rows_of(trainer.data_collator([example]))}
    ids = sorted(name for name, row in rows.items() if len(row.positions))
    if not ids:
        raise DataError("the rows that were drawn have no target tokens")
    hands = deal([len(rows[name]) for name in ids], ids, trainer.accelerator.num_processes)
    shares = [[rows[ids[number]] for number in hand] for hand in hands]
    scorer, sums = Scorer(trainer, frozenset()), []
    most = trainer.args.per_device_train_batch_size * max(map(len, rows.values()))
    open_ = {site.name: torch.ones(site.size) for site in planner.sites}
    for gates in (open_, *(hard_gates(planner, plan) for plan in plans)):
        gate_set.set(gates)
        found = scorer.score(shares, most)
        sums.append(sum(float(row.tokens["nll"].sum()) for row in found.values()))
    total = trainer.accelerator.reduce(torch.tensor(sums, device=trainer.args.device), "sum")
    return [float(part) / sum(len(rows[name].positions) for name in ids) for part in total]

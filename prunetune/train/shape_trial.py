"""Plans of different shapes, each tried on the same training rows with its gates closed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prunetune.core.console import note
from prunetune.core.errors import DataError, UnsupportedModelError
from prunetune.core.files import write_json
from prunetune.model.budget import Shape, plan_shape
from prunetune.model.gates import GateSet
from prunetune.model.plan import Plan
from prunetune.model.planner import Planner
from prunetune.train.calibration import shuffled_rows
from prunetune.train.joint import hard_gates
from prunetune.train.selection_rows import Row, deal, rows_of
from prunetune.train.selection_scoring import Scorer

# Target tokens decide, and shapes differ by tenths of a nat; rows that have few are drawn until there are so many
# tokens in all. All plans see the same rows.
TARGETS, TOKENS = 1024, 8192
RECORD = "shape_trial.json"


@dataclass(frozen=True)
class TrialLosses:
    """Mean negative log-likelihood in nats of the same target tokens: of the open model, and of each plan."""

    targets: int
    whole: float
    plans: tuple[float, ...]

    def best(self, vocab_size: int) -> int | None:
        """Number of the best plan; None where even that one says little.

        Models that are cut beyond recognition differ by chance: the best has to be nearer to the open model than to
        guessing.
        """
        losses = [loss if math.isfinite(loss) else math.inf for loss in self.plans]
        best = losses.index(min(losses))
        return best if losses[best] < (self.whole + math.log(vocab_size)) / 2 else None


def try_shapes(trainer: Any, gate_set: GateSet, planner: Planner, plans: Sequence[Plan], seed: int) -> Shape | None:
    """The shape of the plan that does best on training rows; collective.

    What was found is said, and written to ``shape_trial.json`` in the trainer's folder.

    Args:
        trainer: holds model, rows and collator. gate_set: on the model; left with the last plan's gates.
        planner: of the plans. seed: of the run.

    Returns:
        None where nothing can be tried or the losses say little, so that the scores decide.
    """
    shapes = [plan_shape(planner.arch, plan) for plan in plans]
    if len(shapes) < 2:
        return None
    if not hasattr(trainer.train_dataset, "__len__"):
        note("the scores decide the shape: trying shapes draws rows by lot, which streamed rows do not allow")
        return None
    try:
        losses = trial_losses(trainer, gate_set, planner, plans, seed)
    except (DataError, UnsupportedModelError) as error:
        note(f"the scores decide the shape: shapes cannot be tried, {error}")
        return None
    best = losses.best(planner.arch.vocab_size)
    found = {str(shape): loss for shape, loss in zip(shapes, losses.plans)}
    said = ", ".join(f"{shape} {loss:.2f}" for shape, loss in found.items())
    end = "all are nearer to guessing, or no numbers: the scores decide" if best is None else f"taken: {shapes[best]}"
    note(
        f"shapes tried on {losses.targets} targets in training rows: {said} (loss in nats a token, before a refit and "
        f"further training; whole: {losses.whole:.2f}); {end}"
    )
    if trainer.accelerator.is_main_process:
        settled = None if best is None else str(shapes[best])
        facts = {"step": trainer.state.global_step, "targets": losses.targets, "whole": losses.whole}
        folder = Path(trainer.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RECORD, {**facts, "shapes": found, "settled": settled})
    return None if best is None else shapes[best]


def trial_losses(trainer: Any, gate_set: GateSet, planner: Planner, plans: Sequence[Plan], seed: int) -> TrialLosses:
    """Runs the open model and each plan; collective. Arguments as in ``try_shapes``.

    Raises:
        DataError, UnsupportedModelError: rows or the output layer are of a kind that cannot be scored.
    """
    rows = drawn_rows(trainer, seed)
    if not rows:
        raise DataError("the rows that were drawn have no target tokens")
    ids = sorted(rows)
    hands = deal([len(rows[name]) for name in ids], ids, trainer.accelerator.num_processes)
    shares = [[rows[ids[number]] for number in hand] for hand in hands]
    scorer, sums = Scorer(trainer, frozenset()), []
    most = trainer.args.per_device_train_batch_size * max(map(len, rows.values()))
    open_ = {site.name: torch.ones(site.size) for site in planner.sites}
    for gates in (open_, *(hard_gates(planner, plan) for plan in plans)):
        gate_set.set(gates)
        found = scorer.score(shares, most)
        sums.append(sum(float(row.tokens["nll"].sum()) for row in found.values()))
    # A process may have no row: its sums are integers then.
    mine = torch.tensor(sums, dtype=torch.float32, device=trainer.args.device)
    targets = sum(len(row.positions) for row in rows.values())
    whole, *losses = (float(part) / targets for part in trainer.accelerator.reduce(mine, "sum"))
    return TrialLosses(targets, whole, tuple(losses))


def drawn_rows(trainer: Any, seed: int) -> dict[str, Row]:
    """id -> training row with targets, by lot; the same on all processes."""
    rows: dict[str, Row] = {}
    targets = tokens = 0
    for example in shuffled_rows(trainer, seed, "shape trial"):
        if targets >= TARGETS or tokens >= TOKENS:
            break
        for row in rows_of(trainer.data_collator([example])):
            tokens += len(row)
            if row.id not in rows and len(row.positions):
                rows[row.id] = row
                targets += len(row.positions)
    return rows

"""SelectingTrainer: chooses rows and target tokens of every optimizer step, before the loss's denominator is counted.

The hook is ``get_batch_samples``, where all micro-batches of a step are known on every process: the rows are gathered,
all processes decide the same, and the rows that stay are dealt out again. What is decided is in selection_choice.py.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from prunetune.config.schema import SelectionConfig
from prunetune.config.selection_rules import active_steps, selection_faults
from prunetune.core.errors import ConfigError, DataError, Problem
from prunetune.methods.online import SCORED, check_online, needed_columns
from prunetune.methods.samples import build_samples
from prunetune.model.marks import Protection
from prunetune.model.score_table import ScoreTable
from prunetune.train import compat
from prunetune.train.checkpoint import global_step
from prunetune.train.quantized import QuantizedTrainer
from prunetune.train.selection_choice import BAD, EMPTY, StepChoice, choose_rows
from prunetune.train.selection_epoch import EpochLosses
from prunetune.train.selection_file import SelectionFile
from prunetune.train.selection_memory import Memory
from prunetune.train.selection_rows import Row, deal, in_batches, nothing_in_it, rows_of, stand_in
from prunetune.train.selection_scoring import RowScores, Scorer, make_table

# The reason of rows that a method adds because its own rule kept too few.
TOPUP = "topup"
# All processes' micro-batches of a step: [process][micro-batch][row].
World = list[list[list[Row]]]


class SelectingTrainer(QuantizedTrainer):
    """QuantizedTrainer that may train on a part of each step's rows and target tokens.

    Args:
        select: what chooses; None: everything is trained on.
        selection_file: where ``selection.jsonl`` goes; default: in ``args.output_dir``.

    Raises:
        ConfigError: settings or methods that cannot be combined with it, all at once.
    """

    def __init__(
        self, *args: Any, select: SelectionConfig | None = None, selection_file: Path | None = None, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self.select = select
        self._losses: EpochLosses | None = None
        self._micro_batches: deque[tuple[list[Row], dict[str, float]]] = deque()
        if select is None:
            return
        faults = [Problem(message, field) for field, message in selection_faults(select)]
        compat.raise_if_any([*faults, *check_online(select)])
        sample = build_samples(select.samples.method, select.samples.options()) if select.samples.method else None
        per_epoch = sample is not None and sample.per_epoch
        self._columns = needed_columns(select)
        self._weighted = per_epoch and bool(sample and sample.options.model_dump().get("weighted"))
        refusals = compat.selection_refusals(self, self._columns, per_epoch=per_epoch, weighted=self._weighted)
        compat.raise_if_any(refusals)
        self._scorer = Scorer(self, self._columns) if self._columns & SCORED else None
        self._protection = Protection(self.processing_class, select.tokens.final_answer)
        self._memory = Memory(select.online.rescore_after)
        if per_epoch:
            self._losses = EpochLosses(select)
        path = selection_file or Path(self.args.output_dir) / "selection.jsonl"
        self._selection_file = SelectionFile(path, self.accelerator.is_main_process)

    def begin_step(self, step: int) -> None:
        """What has to be set before the model is asked in optimizer step ``step``: gates, in a joint run."""

    # ---- a step

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """As in Trainer, with fewer rows and labels where that was chosen, and these counted."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._micro_batches.clear()
        if self.select is None or not batches:
            return batches, count
        chooses = self.state.global_step in active_steps(self.select.online, self.state.max_steps)
        chooses = chooses and not self._replaces_rows()
        if not chooses and self._losses is None:
            return batches, count
        own = [rows_of(batch) for batch in batches]
        self._micro_batches.extend((rows, {}) for rows in own)
        if self._losses is not None:
            self._losses.flush()
        if not chooses:
            return batches, count
        if count is None:
            raise ConfigError([Problem("this model's loss takes no token count, so rows cannot be left out", "model")])
        world: World = gather_object([own])
        choice = self._choose(world)
        if choice.keeps_everything():
            return batches, count
        weights = {name: row.weight for name, row in choice.rows.items() if row.keep and row.weight != 1}
        groups = self._groups(world, choice)
        self._micro_batches.clear()
        self._micro_batches.extend((group or [], weights) for group in groups)
        batches = [self._collated(group, choice, world) for group in groups]
        # Weighted losses stand for all rows, so all rows' targets are what they are divided by.
        return batches, count if self._weighted else self._get_num_items_in_batch(batches, device)

    def _replaces_rows(self) -> bool:
        """Whether this step runs on other rows than the sampler's, so that there is nothing to choose."""
        return False

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """As in SFTTrainer; micro-batches that lost all their rows on all processes cost nothing."""
        self._now = self._micro_batches.popleft() if self._micro_batches else ([], {})
        if not inputs["input_ids"].numel():
            return torch.zeros((), device=self.args.device)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As in SFTTrainer; a per-epoch method takes the rows' losses from this very forward pass."""
        listening: Any = contextlib.nullcontext()
        if self._losses is not None and self.model.training:
            listening = self._losses.listening(self.model, *self._now)
        with listening:
            return super().compute_loss(model, inputs, *args, **kwargs)

    # ---- the choice

    def _choose(self, world: World) -> StepChoice:
        assert self.select is not None
        step = self.state.global_step
        rows = {row.id: row for batches in world for batch in batches for row in batch}
        scored = 0
        if self._losses is None:
            scores, scored = self._scores(rows, world)
            choice = self._decide(rows, scores)
        else:
            choice = self._losses.choose(sorted(rows), int(self.state.epoch or 0))
            if self.select.tokens.method is not None:
                kept = {name: row for name, row in rows.items() if choice.rows[name].keep}
                scores, scored = self._scores(kept, world)
                choice = choice.with_tokens(self._decide(kept, scores, all_rows=True))
        facts = _fractions(rows, choice)
        for name, (part, whole) in facts.items():
            self._metrics["train"][f"{name}_kept"].append(part / whole if whole else 1.0)
        filled = [row.reason == TOPUP for row in choice.rows.values() if row.keep]
        self._metrics["train"]["rows_topped_up"].append(sum(filled) / len(filled))
        self._selection_file.add(step + 1, choice, {**facts, "scored": scored})
        return choice

    def _scores(self, rows: Mapping[str, Row], world: World) -> tuple[dict[str, RowScores], int]:
        """(id -> statistics of all rows with a target, how many were scored now); a collective call."""
        if self._scorer is None:
            return {}, 0
        step = self.state.global_step
        with_targets = {name: row for name, row in rows.items() if len(row.positions)}
        found = self._memory.recall(with_targets, step)
        fresh = sorted(set(with_targets) - set(found))
        most = max(len(batch) * max(map(len, batch)) for batches in world for batch in batches if batch)
        shares = deal([len(rows[name]) for name in fresh], fresh, self.accelerator.num_processes)
        self.begin_step(step)
        found_here = self._scorer.score([[rows[fresh[number]] for number in share] for share in shares], most)
        gathered = dict(gather_object(list(found_here.items())))
        self._memory.remember(gathered, step)
        return found | gathered, len(fresh)

    def _decide(
        self, rows: Mapping[str, Row], scores: Mapping[str, RowScores], *, all_rows: bool = False
    ) -> StepChoice:
        """``all_rows``: choose tokens only."""
        assert self.select is not None
        select = self.select.model_copy(update={"samples": SelectionConfig().samples}) if all_rows else self.select
        unusable = {name: EMPTY for name, row in rows.items() if not len(row.positions)}
        unusable |= {name: BAD for name, found in scores.items() if name in rows and not _finite(found)}
        usable = {name: row for name, row in rows.items() if name not in unusable}
        return choose_rows(select, self._table(usable, scores), unusable, self.state.global_step)

    def _table(self, rows: Mapping[str, Row], scores: Mapping[str, RowScores]) -> ScoreTable:
        facts = {"weight_norm": self._scorer.weight_norm()} if self._scorer and "grad_norm" in self._columns else {}
        return make_table(rows, scores, self._protection, facts)

    # ---- the micro-batches

    def _groups(self, world: World, choice: StepChoice) -> list[list[Row] | None]:
        """The rows of this process's micro-batches; None: no process has rows there, []: only others have."""
        rank = self.accelerator.process_index
        own, size = world[rank], max(len(batch) for batches in world for batch in batches)
        rows = [row for batches in world for batch in batches for row in batch]
        kept = [row for row in rows if choice.rows[row.id].keep]
        if len(kept) == len(rows):
            return list(own)
        hands = deal([len(row) for row in kept], [row.id for row in kept], len(world))
        filled = max(-(-len(hand) // size) for hand in hands)
        groups: list[list[Row] | None] = list(in_batches([kept[number] for number in hands[rank]], size))
        groups += [[]] * (filled - len(groups))
        # The last micro-batch is the one after which gradients are averaged, so the empty ones come first.
        return [None] * (len(own) - filled) + groups

    def _collated(self, group: list[Row] | None, choice: StepChoice, world: World) -> dict[str, Any]:
        if group is None:
            return nothing_in_it()
        examples = [row.example(choice.rows[row.id].tokens) for row in group]
        if not group:
            examples = [stand_in(next(row for batches in world for batch in batches for row in batch if len(row) > 1))]
        batch: dict[str, Any] = self.data_collator(examples)
        wanted = sum(label != -100 for example in examples for label in example["labels"][1:])
        found = int((batch["labels"][..., 1:] != -100).sum())
        if found != wanted:
            raise DataError(
                f"the collator made {found} targets of the {wanted} that were chosen; use one that keeps the rows' "
                "labels, such as TRL's own, or train without `select`"
            )
        return batch

    # ---- from run to run

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As in SFTTrainer; goes on with what the checkpoint knows about rows."""
        if self.select is not None:
            checkpoint = Path(resume_from_checkpoint) if isinstance(resume_from_checkpoint, str) else None
            self._micro_batches.clear()
            for known in (self._memory, self._losses):
                if known is not None and checkpoint is None:
                    known.clear()
                elif known is not None and checkpoint is not None:
                    known.load(checkpoint)
            self._selection_file.go_on_from(global_step(checkpoint) if checkpoint else 0)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As in QuantizedTrainer, with the losses of all processes."""
        if self._losses is not None:
            self._losses.flush()
        super()._save_checkpoint(model, trial)

    def add_to_checkpoint(self, folder: Path) -> dict[str, Any]:
        """What is known about rows."""
        if self.select is not None:
            self._memory.save(folder)
            if self._losses is not None:
                self._losses.save(folder)
        return super().add_to_checkpoint(folder)


def _finite(scores: RowScores) -> bool:
    tokens = all(bool(np.isfinite(column).all()) for column in scores.tokens.values())
    return tokens and all(np.isfinite(value) for value in scores.rows.values())


def _fractions(rows: Mapping[str, Row], choice: StepChoice) -> dict[str, list[int]]:
    """[kept, all] of a step's rows, target tokens and tokens that go through the model; copies of a row count once."""
    kept = {name: chosen for name, chosen in choice.rows.items() if chosen.keep}
    targets = {name: len(row.positions) for name, row in rows.items()}
    left = [targets[name] if row.tokens is None else int(row.tokens.sum()) for name, row in kept.items()]
    return {
        "rows": [len(kept), len(rows)],
        "target_tokens": [sum(left), sum(targets.values())],
        "forward_tokens": [sum(len(rows[name]) for name in kept), sum(map(len, rows.values()))],
    }

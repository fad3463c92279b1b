"""PruneTuneTrainer: the joint trainer and the export behind one name, for people with a TRL script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from transformers.trainer_utils import TrainOutput

from prunetune.core.records import ExportedModel
from prunetune.export.changed import with_deltas
from prunetune.export.write import export_model
from prunetune.model.deltas import Delta
from prunetune.model.sharded import has_parts
from prunetune.model.surgery import Surgery
from prunetune.model.token_rows import TokenRow
from prunetune.model.whole import loading_whole, whole_copy
from prunetune.pipeline.delta_stage import SEARCH_ROWS, DeltaStage
from prunetune.train.delta_training import DeltaTrainer


class PruneTuneTrainer(DeltaTrainer):
    """``trl.SFTTrainer`` that fine-tunes and shrinks in the same run.

    It takes what SFTTrainer takes, plus ``prune=PruneConfig(...)`` and, to train on a part of every step's rows and
    target tokens, ``select=SelectionConfig(...)``; see JointTrainer and SelectingTrainer for the rest.

    Example:
        >>> from datasets import Dataset
        >>> from peft import LoraConfig
        >>> from trl import SFTConfig
        >>> from prunetune import PruneConfig, PruneTuneTrainer
        >>> trainer = PruneTuneTrainer(
        ...     model="Qwen/Qwen3-0.6B",
        ...     args=SFTConfig(output_dir="runs/medicine", max_steps=400),
        ...     train_dataset=Dataset.from_json("train.jsonl"),
        ...     peft_config=LoraConfig(r=16, target_modules="all-linear"),
        ...     prune=PruneConfig(target="60%"),
        ... )  # doctest: +SKIP
        >>> trainer.train(); trainer.export("compact/")  # doctest: +SKIP
    """

    _copies: tuple[Any, ...] = ()

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in JointTrainer."""
        self._copies = ()
        return super().train(*args, **kwargs)

    def whole_model(self) -> Any:
        """The live model; where weights are spread, a whole copy on the first process, else None. Collective."""
        model = self.accelerator.unwrap_model(self.model)
        if has_parts(model) and not self._copies:
            self._copies = (whole_copy(model, wanted=self.accelerator.is_main_process),)
        return self._copies[0] if self._copies else model

    def export(
        self,
        folder: str | Path,
        *,
        dtype: str | None = None,
        deltas: Mapping[str, Delta] | None = None,
        base: Literal["trained", "source"] = "trained",
        **kwargs: Any,
    ) -> ExportedModel | None:
        """Merges the adapters and writes an ordinary model folder; see ``export_model`` for the other arguments.

        Args:
            folder: where to; must not exist unless ``replace=True``.
            dtype: of the weights; default: the base's.
            deltas: what is merged instead of the adapters, by weight; default: what ``prune.delta`` leaves of them, its
                open options searched on training rows.
            base: what a quantised model's adapters are merged onto: the dequantised weights that they were trained
                with, or the original ones (see export/merge_base.py).

        Returns:
            The export and its verification; None on processes other than the first.

        Raises:
            ExportError: it could not be written, or did not verify; nothing was left behind.
        """
        exported = None
        model = self.whole_model()
        if self.accelerator.is_main_process:
            metadata = {"plan": self.plan.digest()} if self.plan else {}
            dtype = dtype or str(next(model.parameters()).dtype).removeprefix("torch.")
            kwargs |= {"metadata": metadata, "source": self.source_weights() if base == "source" else None}
            with loading_whole(), with_deltas(model, self._pruned() if deltas is None else deltas):
                exported = export_model(
                    model, self.processing_class, Path(folder), dtype=dtype, plan=self.plan, **kwargs
                )
        self.accelerator.wait_for_everyone()
        return exported

    def delta_stage(self, rows: Sequence[TokenRow]) -> DeltaStage:
        """What the live adapters learnt, and what ``prune.delta`` leaves of it, measured on these rows.

        On the first process, and after ``whole_model`` where weights are spread over processes.
        """
        assert self.prune is not None
        model = self._copies[0] if self._copies else self.accelerator.unwrap_model(self.model)
        surgery = Surgery(self.dense, self.plan) if self.plan else None
        return DeltaStage(model, self.processing_class, surgery, self.prune.delta, self.prune.seed, rows)

    def _pruned(self) -> Mapping[str, Delta]:
        if self.prune is None or self.prune.delta.keeps_all:
            return {}
        rows = [
            TokenRow(list(row["input_ids"]), list(row["labels"])) for row in islice(self.train_dataset, SEARCH_ROWS)
        ]
        stage = self.delta_stage(rows)
        return stage.pruned(stage.build(stage.settle().options))

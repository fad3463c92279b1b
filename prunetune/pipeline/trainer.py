"""PruneTuneTrainer: the joint trainer and the export behind one name, for people with a TRL script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunetune.core.records import ExportedModel
from prunetune.export.write import export_model
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

    def export(self, folder: str | Path, *, dtype: str | None = None, **kwargs: Any) -> ExportedModel | None:
        """Merges the adapters and writes an ordinary model folder; see ``export_model`` for the other arguments.

        Args:
            folder: where to; must not exist unless ``replace=True``.
            dtype: of the weights; default: the base's.

        Returns:
            The export and its verification; None on processes other than the first.

        Raises:
            ExportError: it could not be written, or did not verify; nothing was left behind.
        """
        exported = None
        if self.accelerator.is_main_process:
            model = self.accelerator.unwrap_model(self.model)
            metadata = {"plan": self.plan.digest()} if self.plan else {}
            dtype = dtype or str(next(model.parameters()).dtype).removeprefix("torch.")
            exported = export_model(
                model, self.processing_class, Path(folder), dtype=dtype, plan=self.plan, metadata=metadata, **kwargs
            )
        self.accelerator.wait_for_everyone()
        return exported

"""GuardedTrainer: what every run gets, pruned or not: no step on a bad loss, and whole checkpoints."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from prunetune.core.errors import DataError, DiskFullError, DivergedError
from prunetune.core.files import disk_is_full
from prunetune.train import compat
from prunetune.train.callbacks import Interruption
from prunetune.train.checkpoint import MARKER, newest, rotate, write_marker
from prunetune.train.freeze import FREEZE
from prunetune.train.portable import PortableTrainer


class GuardedTrainer(PortableTrainer):
    """PortableTrainer that stops before it does harm and whose checkpoints are complete or not there.

    Raises:
        DataError: no row is left to train on.
    """

    control: Any  # Trainer's own

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._not_finite: Tensor | None = None
        self._grad_norm: Any = 0.0
        self._interruption = Interruption()
        if self.train_dataset is not None and hasattr(self.train_dataset, "__len__") and not len(self.train_dataset):
            raise DataError(
                "no training row is left: none of them has a token with a label within max_length "
                f"({self.args.max_length}). Set a larger max_length, or check completions, completion_only_loss and "
                "assistant_only_loss"
            )

    @property
    def freeze_dir(self) -> Path:
        """Where a freeze leaves its folder."""
        return Path(self.args.output_dir) / FREEZE

    def add_to_checkpoint(self, folder: Path) -> dict[str, Any]:
        """Writes further files into a checkpoint (first process only); returns facts for its marker."""
        return {}

    # ---- a loss that is not finite

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As in SFTTrainer; remembers whether a training loss was not finite, without waiting for the device."""
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.model.training:
            bad = ~torch.isfinite((result[0] if return_outputs else result).detach())
            self._not_finite = bad if self._not_finite is None else self._not_finite | bad
        return result

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """As in Trainer; remembered, because a finite loss can have a gradient that is not."""
        self._grad_norm = super()._get_grad_norm(model, grad_norm)
        return self._grad_norm

    def check_finite(self, step: int) -> None:
        bad, self._not_finite = self._not_finite, None
        what = "loss" if bad is not None and bool(bad) else ""
        # A gradient scaler looks for infinite gradients by itself, and leaves such a step out.
        if not what and self.accelerator.scaler is None and not math.isfinite(self._grad_norm):
            what = "loss's gradient"
        if not self._any_process(bool(what)):
            return
        last = newest(Path(self.args.output_dir), self.freeze_dir)
        kept = f"the last good checkpoint is {last}" if last else "no checkpoint had been written yet"
        # DeepSpeed takes its step within the backward pass.
        updated = "nothing" if compat.zero_stage(self) is None else "only the model in memory"
        raise DivergedError(
            f"the {what or 'loss'} became NaN or infinite in step {step + 1}; {updated} was updated with it, and "
            f"{kept}. Set a lower learning rate, a longer warm-up, or max_grad_norm, and check the rows of this step."
        )

    def _any_process(self, flag: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.args.device), "sum") > 0)

    # ---- saving

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As in Trainer, plus ``add_to_checkpoint`` and a marker; older checkpoints go only once this one is whole.

        Raises:
            DiskFullError: there is no room; what was written of this one is removed.
        """
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            self._write_checkpoint(folder, model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            if not disk_is_full(error):
                raise
            shutil.rmtree(folder, ignore_errors=True)
            last = newest(Path(self.args.output_dir), self.freeze_dir)
            kept = f"{last} is whole" if last else "no checkpoint had been written yet"
            raise DiskFullError(
                f"the disk is full: {folder} could not be written and was removed; {kept}. Free some space and go on "
                "with --resume (in Python: resume_from_checkpoint=True), or set fewer checkpoints to keep"
            ) from error

    def _write_checkpoint(self, folder: Path, model: Any, trial: Any) -> None:
        if self.args.should_save:
            # A folder of that name from before must not pass for whole while it is written over.
            (folder / MARKER).unlink(missing_ok=True)
        with self._no_rotation() as limit:
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if not self.args.should_save:
            return
        facts = self.add_to_checkpoint(folder)
        write_marker(folder, {**facts, "train_tokens": self._total_train_tokens})
        rotate(Path(self.args.output_dir), limit, self.state.global_step, self.state.best_model_checkpoint)

    @contextlib.contextmanager
    def _no_rotation(self) -> Iterator[int | None]:
        limit = self.args.save_total_limit
        self.args.save_total_limit = None
        try:
            yield limit
        finally:
            self.args.save_total_limit = limit

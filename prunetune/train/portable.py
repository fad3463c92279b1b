"""PortableTrainer: SFTTrainer whose checkpoints are the same files under every engine, and go on under any other.

The adapters are saved whole and in float32 where PEFT looks for them, the optimizer's state by name (moments.py). What
differs between engines is in engine.py and zero.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from trl import SFTTrainer

from prunetune.core.errors import DataError
from prunetune.model.sharded import computing
from prunetune.model.surgery import base_model
from prunetune.train import compat
from prunetune.train.checkpoint import ADAPTER_FILE
from prunetune.train.engine import Engine
from prunetune.train.fsdp import Fsdp2
from prunetune.train.launched import engine_name
from prunetune.train.moments import MOMENTS_FILE, Moments
from prunetune.train.zero import Zero, ZeroThree


class PortableTrainer(SFTTrainer):
    """SFTTrainer with one kind of checkpoint for all engines and numbers of processes."""

    deepspeed: Any  # Trainer's own: the engine that runs, or None
    _optimizer_names: list[list[str]]

    @property
    def engine(self) -> Engine:
        """What knows how this run's tensors are spread over processes."""
        kinds: dict[str, type[Engine]] = {"zero2": Zero, "zero3": ZeroThree, "fsdp2": Fsdp2}
        return kinds.get(engine_name(self), Engine)(self)

    # ---- saving

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer; remembers which parameters stand in which group, because engines regroup them."""
        optimizer = super().create_optimizer(*args, **kwargs)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        groups = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
        self._optimizer_names = [group for group in groups if group]
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in Trainer; adapters that are spread over processes are gathered, the base's weights are not."""
        if not self.engine.shards_trained or not compat.is_peft(self.model):
            super().save_model(output_dir, _internal_call)
            return
        values = self.engine.values()
        if self.args.should_save:
            self._save(output_dir or self.args.output_dir, state_dict=values)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Writes the file of moments.py in place of the engine's own files."""
        tensors = self.engine.moments()
        if self.args.should_save:
            found = zip(self.engine.groups(), self._optimizer_names, strict=True)
            groups = [{**settings, "params": names} for settings, names in found]
            Moments(tensors, groups, self.lr_scheduler.state_dict()).save(Path(output_dir))

    # ---- going on

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """As in Trainer, but the checkpoint is read here and not by the engine, which knows only its own files."""
        if resume_from_checkpoint is not None and self.engine.shards_trained:
            self._load_from_checkpoint(resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            self._load_scaler(resume_from_checkpoint)
        return prepared

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Reads the file of moments.py; of plain TRL's checkpoints, which have none, what Trainer reads."""
        if checkpoint is None:
            return
        folder, engine = Path(checkpoint), self.engine
        if not (folder / MOMENTS_FILE).exists():
            if engine.shards_trained:
                raise DataError(
                    f"{folder} has no {MOMENTS_FILE}: plain TRL wrote it. Go on with it in one process, or DDP"
                )
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        kept = Moments.load(folder)
        engine.load(self._saved_values(folder) if engine.shards_trained else {}, kept.tensors)
        for group, saved in zip(engine.groups(), kept.groups, strict=True):
            restored = {key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()}
            group.update({key: value for key, value in restored.items() if key != "params"})
        now = self.optimizer.param_groups
        per_group = {
            "base_lrs": [group["initial_lr"] for group in now],
            "_last_lr": [group["lr"] for group in now],
            "lr_lambdas": [None] * len(now),
        }
        state = kept.scheduler
        self.lr_scheduler.load_state_dict(state | {key: per_group[key] for key in per_group.keys() & state.keys()})

    def _saved_values(self, checkpoint: Path) -> dict[str, Tensor]:
        """A checkpoint's adapters by parameter name."""
        saved, names = load_file(checkpoint / ADAPTER_FILE), compat.adapter_names(self.model, self.engine.trained())
        return {name: saved[label] for name, label in names.items()}

    # ---- between engines

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in SFTTrainer, also before an engine was made and after it was ended."""
        if self.engine.runs:
            return super().evaluate(*args, **kwargs)
        with compat.without_engine(self), computing(base_model(self.model)):
            return super().evaluate(*args, **kwargs)

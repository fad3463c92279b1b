"""JointTrainer: TRL's SFTTrainer with trainable structural masks, a freeze in the middle, and one run around both.

What the phases mean is in joint.py, the freeze in freezing.py, what is saved in checkpoint.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import TrainOutput

from prunetune.config.presets import phase_steps
from prunetune.core.console import note
from prunetune.core.files import read_json
from prunetune.core.lock import only_one
from prunetune.model.budget import kept_fractions
from prunetune.train import compat
from prunetune.train.callbacks import JointCallback, MetricsFile, ProgressBar
from prunetune.train.checkpoint import (
    STATE_FILE,
    find_checkpoint,
    global_step,
    load_mask,
    read_marker,
    save_mask,
)
from prunetune.train.distilling import DistillingTrainer
from prunetune.train.joint import JointSearch, reducer
from prunetune.train.launched import all_alive
from prunetune.train.legs import joined


class JointTrainer(DistillingTrainer):
    """SFTTrainer that also decides which structures stay, and slices the model while training goes on.

    Args:
        model: as in SFTTrainer; a dense model of a supported family.
        args: ``trl.SFTConfig``.
        metrics_file: where ``metrics.jsonl`` goes; default: in ``args.output_dir``.
        **kwargs: everything else that SFTTrainer takes, ``peft_config`` above all; ``prune``, ``dtype`` and
            ``evaluate_at_freeze`` of FreezingTrainer; ``select`` and ``selection_file`` of SelectingTrainer.
    """

    _tag_names = ["trl", "sft", "prunetune"]  # noqa: RUF012 - a class attribute of TRL's trainers

    def __init__(self, model: Any, args: Any = None, *, metrics_file: Path | None = None, **kwargs: Any):
        super().__init__(model, args, **kwargs)
        self._resumed_from: Path | None = None
        self._legs: list[tuple[int, dict[str, float]]] = []
        self._leg_began = 0
        self._stopped_early = False
        compat.quiet_progress(self)
        self._bar = ProgressBar(self.facts)
        file = metrics_file or Path(self.args.output_dir) / "metrics.jsonl"
        for callback in (JointCallback(self), MetricsFile(file, self.facts), self._bar):
            self.add_callback(callback)

    def add_to_checkpoint(self, folder: Path) -> dict[str, Any]:
        """The mask's state before the freeze, the plan's digest after it."""
        if self._search is not None:
            save_mask(folder, self._search.state_dict())
        facts = {"frozen": self.plan is not None, "plan": self.plan.digest() if self.plan else None}
        return super().add_to_checkpoint(folder) | facts

    def facts(self) -> dict[str, Any]:
        """Phase and kept fraction now, for logs and the progress bar."""
        if self.prune is None:
            return {"phase": "train"}
        if self.plan is not None:
            return {"phase": "recover", "kept_fraction": kept_fractions(self.dense, self.shape)["decoder"]}
        if self._search is None:
            return {"phase": "warmup", "kept_fraction": 1.0}
        phase = self._search.phase(max(0, self.state.global_step - 1))
        return {"phase": phase, "kept_fraction": self._search.kept_fraction()}

    # ---- the run

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Trains through warm-up, search, freeze and recover.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the newest complete one of ``output_dir``.
            **kwargs: as in ``Trainer.train``.

        Raises:
            KeyboardInterrupt: after Ctrl-C, once everything is saved; after SIGTERM it is a TerminatedError.
            FolderInUseError: another process trains into the same folder.
            ProcessLostError: another process of the run is gone.
            DivergedError: the loss or its gradient was not finite; the last checkpoint is from before.
        """
        output_dir = Path(self.args.output_dir)
        checkpoint = find_checkpoint(resume_from_checkpoint, output_dir, self.freeze_dir, plain=self.prune is None)
        if checkpoint is not None:
            note(f"going on from step {global_step(checkpoint)} ({checkpoint})")
        self._legs, self._stopped_early, result = [], False, None
        try:
            main = self.accelerator.is_main_process
            with self._interruption, only_one(output_dir, when=main), all_alive(self):
                if self.prune is not None and checkpoint is not None:
                    self._adopt(checkpoint)
                if self.prune is not None and self.plan is None:
                    if checkpoint is None or not self._is_due(checkpoint):
                        result = self._leg(checkpoint, **kwargs)
                        # Not the newest: a former run, or a branch of this one, may have left later ones.
                        checkpoint = output_dir / f"checkpoint-{self.state.global_step}"
                    if self._freeze_is_due() and not self._stopped_early:
                        self._freeze(checkpoint)
                        checkpoint = self.freeze_dir / "checkpoint"
                # A search that is still there was ended by a callback before its freeze.
                if self._search is None and not self._stopped_early:
                    result = self._leg(checkpoint, **kwargs)
        finally:
            self._bar.close()
        if self._stopped_early:
            # Launchers end the other processes as soon as one is gone, and the first may still be writing.
            self.accelerator.wait_for_everyone()
            raise self._interruption.error(
                f"stopped at step {self.state.global_step} of {self.state.max_steps}; everything is saved in "
                f"{self.args.output_dir}. Go on with `prunetune train ... --resume`, or in Python with "
                "trainer.train(resume_from_checkpoint=True)"
            )
        self._interruption.pass_on()
        assert result is not None
        return TrainOutput(result.global_step, result.metrics["train_loss"], result.metrics)

    def _adopt(self, checkpoint: Path) -> None:
        super()._adopt(checkpoint)
        if checkpoint.resolve() == (self.freeze_dir / "checkpoint").resolve():
            # The run may have ended before this was logged; a second time is told apart in the metrics file.
            self._take_up(checkpoint)
            self._validate("eval_after_cut")

    def _is_due(self, checkpoint: Path) -> bool:
        """Whether the run was stopped between its last search step and its freeze; makes everything ready for it."""
        assert self.prune is not None
        state = read_json(checkpoint / STATE_FILE)
        if state["global_step"] < phase_steps(self.prune.phases, self._total_steps(state)).freeze:
            return False
        self._take_up(checkpoint)
        self.begin_leg(self.state)
        return True

    def _freeze_is_due(self) -> bool:
        return self._search is not None and self.state.global_step >= self._search.phases.freeze

    def _total_steps(self, state: Mapping[str, Any]) -> int:
        """Steps of the whole run: as the checkpoint says, unless this run was set to more or fewer."""
        return self.args.max_steps if self.args.max_steps > 0 else int(state["max_steps"])

    def _take_up(self, checkpoint: Path) -> None:
        """Adapters, step count and token count as a checkpoint has them, for what happens outside a leg."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
        self.state.max_steps = self._total_steps({"max_steps": self.state.max_steps})
        self._resumed_from = checkpoint
        self._total_train_tokens = (read_marker(checkpoint) or {}).get("train_tokens", 0)

    def _leg(self, checkpoint: Path | None, **kwargs: Any) -> TrainOutput:
        self._resumed_from, self._leg_began = checkpoint, 0
        if checkpoint is not None:
            state = read_json(checkpoint / STATE_FILE)
            self._leg_began = state["global_step"]
            if self._leg_began >= self._total_steps(state):
                return self._finished(checkpoint)
            self._total_train_tokens = (read_marker(checkpoint) or {}).get("train_tokens", 0)
        self.engine.release()
        if self.accelerator.num_processes > 1:
            compat.unprepare(self.model)
        with compat.one_run(self.callback_handler, lambda: self._stopped_early or not self._freeze_is_due()):
            return super().train(resume_from_checkpoint=str(checkpoint) if checkpoint else None, **kwargs)

    def _finished(self, checkpoint: Path) -> TrainOutput:
        """The state after the last step, without training: Trainer would take one step too many."""
        self._take_up(checkpoint)
        losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        metrics = joined(self._legs) or {"train_loss": sum(losses) / max(1, len(losses))}
        if self._legs:
            super().log(metrics)
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        return TrainOutput(self.state.global_step, metrics["train_loss"], metrics)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in SFTTrainer; a leg's own summary is held back, the last leg's becomes that of the whole run."""
        if "train_runtime" in logs:
            self._legs.append((self.state.global_step - self._leg_began, dict(logs)))
            if self._stopped_early or self._freeze_is_due():
                return
            logs.update(joined(self._legs))
        kept = self.facts().get("kept_fraction")
        if kept is not None:
            logs["kept_fraction"] = kept
        super().log(logs, start_time)

    # ---- steps, called by JointCallback

    def begin_leg(self, state: Any) -> None:
        """Makes the gates and the mask when a leg before the freeze begins."""
        if self.prune is None or self.plan is not None:
            return
        phases = phase_steps(self.prune.phases, state.max_steps)
        self._end_search()
        again = not compat.hooks_saved_tensors(self)
        self._search = JointSearch(
            self.model, self.prune, self.planner, phases, changing=self.engine.opened, recompute=again
        )
        self.engine.before_step(lambda: self._end_step(self.state.global_step), gradients=self._search.reads_adapters)
        if self._resumed_from is not None:
            self._search.load_state_dict(load_mask(self._resumed_from))
        self._search.begin_step(state.global_step)

    def begin_step(self, step: int) -> None:
        """Sets the gates of an optimizer step, and before the search's first one the shape that they move to."""
        if self._search is not None:
            self._try_shapes(self._search, step)
            self._search.begin_step(step)

    def before_optimizer_step(self, step: int) -> None:
        """Hands the gates' gradients to the mask; refuses to step on a loss that is not finite."""
        self.check_finite(step)
        if not self.engine.steps_in_backward:
            self._end_step(step)

    def _end_step(self, step: int) -> None:
        if self._search is not None:
            scaled = bool(self.args.average_tokens_across_devices)
            metrics = self._search.end_step(step, reducer(self.accelerator, scaled))
            for name, value in metrics.items():
                self._metrics["train"][name].append(value)

    def after_optimizer_step(self, step: int, learning_rate: float) -> None:
        """Lets the mask act on the adapters that have just moved."""
        if self._search is not None:
            self._search.after_step(step, learning_rate)

    def stop_after(self, step: int) -> bool:
        """Whether the leg ends after ``step`` optimizer steps: the freeze is due, or a stop was asked for."""
        self._stopped_early = self._any_process(self._interruption.requested) and step < self.state.max_steps
        due = self._search is not None and step >= self._search.phases.freeze
        return due or self._stopped_early

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in SFTTrainer, with deterministic gates before the freeze."""
        if self._search is not None:
            self._search.use_eval_gates(self.state.global_step)
        return super().evaluate(*args, **kwargs)

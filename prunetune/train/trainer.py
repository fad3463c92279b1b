"""JointTrainer: TRL's SFTTrainer with trainable structural masks, a freeze in the middle, and one run around both.

What the phases mean is in joint.py, the freeze in freeze.py, what is saved in checkpoint.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import TrainOutput

from prunetune.config.presets import phase_steps
from prunetune.config.schema import PruneConfig
from prunetune.core.console import note
from prunetune.core.errors import ConfigError, PlanMismatchError, Problem
from prunetune.core.files import read_json
from prunetune.methods.compensation import build_compensation
from prunetune.methods.masks import check_mask
from prunetune.model.architecture import Architecture, describe
from prunetune.model.budget import Shape, describe_kept, full_shape, kept_fractions, plan_shape, total_params
from prunetune.model.gates import GateSet
from prunetune.model.plan import Plan
from prunetune.model.planner import Planner
from prunetune.model.statistics import SecondMoments
from prunetune.model.surgery import Surgery, base_model, slice_model
from prunetune.train import compat
from prunetune.train.calibration import calibration_batches, collect_moments
from prunetune.train.callbacks import JointCallback, MetricsFile, ProgressBar
from prunetune.train.checkpoint import (
    STATE_FILE,
    find_checkpoint,
    global_step,
    load_mask,
    read_marker,
    save_mask,
)
from prunetune.train.freeze import (
    adopt_freeze,
    apply_updates,
    compensated_weights,
    load_updates,
    write_freeze,
)
from prunetune.train.joint import JointSearch, hard_gates, reducer
from prunetune.train.legs import joined
from prunetune.train.probe import EXACT_LIMIT_PARAMETERS, probe_logits, require_equal
from prunetune.train.selecting import SelectingTrainer


class JointTrainer(SelectingTrainer):
    """SFTTrainer that also decides which structures stay, and slices the model while training goes on.

    Args:
        model: as in SFTTrainer; a dense model of a supported family.
        args: ``trl.SFTConfig``.
        prune: the joint settings; without them this is plain SFTTrainer.
        metrics_file: where ``metrics.jsonl`` goes; default: in ``args.output_dir``.
        dtype: dtype of the export, for budgets in bytes.
        evaluate_at_freeze: validate right before and right after the cut.
        **kwargs: everything else that SFTTrainer takes, ``peft_config`` above all, and ``select`` and
            ``selection_file`` of SelectingTrainer.

    Raises:
        ConfigError: settings that cannot be combined with joint pruning, all at once.
        BudgetError: the target cannot be met by any legal shape.
        UnsupportedModelError: the architecture has no unit table.
    """

    _tag_names = ["trl", "sft", "prunetune"]  # noqa: RUF012 - a class attribute of TRL's trainers

    def __init__(
        self,
        model: Any,
        args: Any = None,
        *,
        prune: PruneConfig | None = None,
        metrics_file: Path | None = None,
        dtype: str = "bfloat16",
        evaluate_at_freeze: bool = False,
        **kwargs: Any,
    ):
        optimizer = (kwargs.get("optimizers") or (None, None))[0]
        super().__init__(model, args, **kwargs)
        self.prune = prune
        self.plan: Plan | None = None
        self._search: JointSearch | None = None
        self._resumed_from: Path | None = None
        self._legs: list[tuple[int, dict[str, float]]] = []
        self._leg_began = 0
        self._evaluate_at_freeze = evaluate_at_freeze
        self._stopped_early = False
        if prune is not None:
            self.dense: Architecture = describe(base_model(self.model).config)
            self._refuse(optimizer)
            self.planner = Planner(self.dense, prune.target, dtype)
            self.compensation = build_compensation(prune.compensation.method, prune.compensation.options())
            if self.compensation.tokens and not hasattr(self.train_dataset, "__len__"):
                why = "calibration rows are drawn by lot, which streamed rows do not allow; load them, or set none"
                raise ConfigError([Problem(why, "compensation.method")])
        compat.quiet_progress(self)
        self._bar = ProgressBar(self.facts)
        file = metrics_file or Path(self.args.output_dir) / "metrics.jsonl"
        for callback in (JointCallback(self), MetricsFile(file, self.facts), self._bar):
            self.add_callback(callback)

    def _refuse(self, optimizer: Any) -> None:
        assert self.prune is not None
        problems = compat.refusals(self, optimizer)
        linears = {module.rpartition(".")[2] for module in self.dense.family.modules.values()}
        problems += compat.adapter_refusals(self.model, linears)
        problems += check_mask(self.prune.mask.method, self.prune.mask.options())
        compat.raise_if_any(problems)

    def add_to_checkpoint(self, folder: Path) -> dict[str, Any]:
        """The mask's state before the freeze, the plan's digest after it."""
        if self._search is not None:
            save_mask(folder, self._search.mask.state_dict())
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

    @property
    def shape(self) -> Shape:
        """The model's uniform widths now."""
        return full_shape(self.dense) if self.plan is None else plan_shape(self.dense, self.plan)

    # ---- the run

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Trains through warm-up, search, freeze and recover.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the newest complete one of ``output_dir``.
            **kwargs: as in ``Trainer.train``.

        Raises:
            KeyboardInterrupt: after Ctrl-C or SIGTERM, once everything is saved.
            DivergedError: the loss or its gradient was not finite; the last checkpoint is from before.
        """
        output_dir = Path(self.args.output_dir)
        checkpoint = find_checkpoint(resume_from_checkpoint, output_dir, self.freeze_dir, plain=self.prune is None)
        if checkpoint is not None:
            note(f"going on from step {global_step(checkpoint)} ({checkpoint})")
        self._legs, self._stopped_early, result = [], False, None
        try:
            with self._interruption:
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
            raise KeyboardInterrupt(
                f"stopped at step {self.state.global_step} of {self.state.max_steps}; everything is saved in "
                f"{self.args.output_dir}. Go on with `prunetune train ... --resume`, or in Python with "
                "trainer.train(resume_from_checkpoint=True)"
            )
        assert result is not None
        return TrainOutput(result.global_step, result.metrics["train_loss"], result.metrics)

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
        self._search = JointSearch(self.model, self.prune, self.planner, phases, recompute=again)
        if self._resumed_from is not None:
            self._search.mask.load_state_dict(load_mask(self._resumed_from))
        self._search.begin_step(state.global_step)

    def begin_step(self, step: int) -> None:
        """Sets the gates of an optimizer step."""
        if self._search is not None:
            self._search.begin_step(step)

    def before_optimizer_step(self, step: int) -> None:
        """Hands the gates' gradients to the mask; refuses to step on a loss that is not finite."""
        self.check_finite(step)
        if self._search is not None:
            scaled = bool(self.args.average_tokens_across_devices)
            metrics = self._search.end_step(step, reducer(self.accelerator, scaled))
            for name, value in metrics.items():
                self._metrics["train"][name].append(value)

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

    # ---- the freeze

    def _adopt(self, checkpoint: Path) -> None:
        """Brings the live model into the shape that a checkpoint has."""
        marker = read_marker(checkpoint) or {}
        if not marker.get("frozen"):
            if self.plan is not None:
                raise PlanMismatchError(
                    f"{checkpoint} is from before the freeze, but this model is sliced already; make a new trainer "
                    "with the dense model to go back to it"
                )
            return
        if self.plan is None and not self.freeze_dir.is_dir():
            raise PlanMismatchError(
                f"the checkpoint is from after the freeze, but {self.freeze_dir} is missing; resume from a checkpoint "
                "from before it, or restore the folder"
            )
        if self.plan is None:
            self.plan = adopt_freeze(self.model, self.freeze_dir)
        if marker["plan"] != self.plan.digest():
            raise PlanMismatchError(
                f"{checkpoint} follows another plan than the one in {self.freeze_dir}; the folder holds more than one "
                "run. Resume from a checkpoint of the run that made the freeze, or from one before it"
            )
        if checkpoint.resolve() == (self.freeze_dir / "checkpoint").resolve():
            # The run may have ended before this was logged; a second time is told apart in the metrics file.
            self._take_up(checkpoint)
            self._validate("eval_after_cut")

    def _freeze(self, checkpoint: Path) -> None:
        """Decides, slices the checkpoint and the live model, and clears what belonged to the dense one."""
        assert self._search is not None
        step, scores = global_step(checkpoint), self._search.mask.scores()
        plan = self._search.decide(step)
        self._require_same_plan(plan)
        names = self.optimizer_names()
        self._validate("eval_before_cut")
        surgery, updates = self.cut(plan)
        if self.accelerator.is_main_process:
            write_freeze(self.freeze_dir, checkpoint, plan, surgery, scores, updates, names)
        self.accelerator.wait_for_everyone()
        apply_updates(self.model, surgery, load_updates(self.freeze_dir))
        self._validate("eval_after_cut")
        note(f"step {step}: frozen and sliced to {self.shape}; kept {describe_kept(self.dense, self.shape)}")
        # Whatever holds the dense parameters goes; the next leg makes its own from the sliced checkpoint.
        self.optimizer = self.lr_scheduler = None
        self.model_wrapped = self.model

    def cut(self, plan: Plan) -> tuple[Surgery, dict[str, Tensor]]:
        """Slices the live model as the plan says, checks that nothing changed, and ends the search.

        Returns:
            The surgery, and the compensated base weights that ``apply_updates`` would put in.
        """
        self._end_search()
        gates = GateSet(base_model(self.model), self.planner.sites)
        gates.attach()
        gates.set(hard_gates(self.planner, plan))
        self.model.eval()
        surgery = Surgery(self.dense, plan)
        updates = compensated_weights(self.model, surgery, self.compensation, self._collect)
        exact = total_params(self.dense, full_shape(self.dense)) <= EXACT_LIMIT_PARAMETERS
        masked = probe_logits(self.model, self.dense.vocab_size, self.args.device, exact=exact)
        gates.detach()
        slice_model(self.model, plan)
        sliced = probe_logits(self.model, self.dense.vocab_size, self.args.device, exact=exact)
        require_equal(masked, sliced, self.model, exact=exact)
        self.plan = plan
        return surgery, updates

    def cut_from_scores(self, scores: Mapping[str, Tensor]) -> Plan:
        """Slices the live dense model to this trainer's target by the scores of an earlier search.

        Args:
            scores: site -> (U,), as a freeze folder has them.

        Returns:
            The plan; there is no recover phase behind it unless the model is trained on.
        """
        plan = self.planner.plan(scores, origin={"method": "scores of an earlier search"})
        surgery, updates = self.cut(plan)
        apply_updates(self.model, surgery, updates)
        return plan

    def _end_search(self) -> None:
        if self._search is not None:
            self._search.gate_set.detach()
            self._search = None

    def _collect(self, moments: SecondMoments) -> None:
        seed = self.prune.seed if self.prune else 0
        batches = calibration_batches(self, self.compensation.tokens, seed)
        collect_moments(self, moments, batches)

    def _validate(self, prefix: str) -> None:
        if self._evaluate_at_freeze and self.eval_dataset is not None:
            if self._search is not None:
                self._search.use_eval_gates(self.state.global_step)
            super().evaluate(metric_key_prefix=prefix)

    def _require_same_plan(self, plan: Plan) -> None:
        if self.accelerator.num_processes == 1:
            return
        number = int(plan.digest()[:12], 16)
        mine = torch.tensor([number], dtype=torch.int64, device=self.args.device)
        if len(set(self.accelerator.gather(mine).tolist())) != 1:
            raise PlanMismatchError(
                "the processes decided on different plans, so their gate scores differ; check that all of them run the "
                "same versions on the same data"
            )

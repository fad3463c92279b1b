"""FreezingTrainer: what is pruned, and the cut: a plan is decided, the checkpoint and the live model are sliced.

The files of a freeze are in freeze.py; when it is due, and what comes before and after it, in trainer.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunetune.config.schema import PruneConfig
from prunetune.core.console import note
from prunetune.core.errors import ConfigError, PlanMismatchError, Problem
from prunetune.methods.compensation import build_compensation
from prunetune.methods.masks import MASKS
from prunetune.model.architecture import Architecture, describe
from prunetune.model.budget import Shape, describe_kept, full_shape, plan_shape, total_params
from prunetune.model.divergence import mean_kl
from prunetune.model.fold import Fold, fold_model
from prunetune.model.gates import GateSet
from prunetune.model.plan import Plan
from prunetune.model.planner import Planner
from prunetune.model.quantized import float_linears
from prunetune.model.sharded import computing, is_sharded
from prunetune.model.source import SourceWeights, requantize, require_cuttable
from prunetune.model.statistics import SecondMoments
from prunetune.model.stream import round_stream
from prunetune.model.surgery import Surgery, base_model, slice_model
from prunetune.train import compat
from prunetune.train.calibration import calibration_batches, collect_moments
from prunetune.train.checkpoint import global_step, read_marker
from prunetune.train.freeze import (
    adopt_freeze,
    apply_updates,
    compensated_weights,
    load_ranks,
    load_updates,
    write_freeze,
)
from prunetune.train.held_out import HeldOutRows
from prunetune.train.joint import JointSearch, hard_gates, hidden_refusals, mask_refusals
from prunetune.train.probe import EXACT_LIMIT_PARAMETERS, probe_logits, require_equal
from prunetune.train.ranks import rank_refusals
from prunetune.train.selecting import SelectingTrainer
from prunetune.train.shape_trial import try_shapes


class FreezingTrainer(SelectingTrainer):
    """SelectingTrainer with a model that can be cut down to its target, once.

    Args:
        model: as in SFTTrainer; a dense model of a supported family.
        args: ``trl.SFTConfig``.
        prune: the joint settings; without them this is plain SFTTrainer.
        dtype: dtype of the export, for budgets in bytes.
        evaluate_at_freeze: validate right before and right after the cut.
        **kwargs: as in SelectingTrainer.

    Raises:
        ConfigError: settings that cannot be combined with joint pruning, all at once.
        BudgetError: the target cannot be met by any legal shape.
        UnsupportedModelError: the architecture has no unit table.
    """

    def __init__(
        self,
        model: Any,
        args: Any = None,
        *,
        prune: PruneConfig | None = None,
        dtype: str = "bfloat16",
        evaluate_at_freeze: bool = False,
        **kwargs: Any,
    ):
        optimizer = (kwargs.get("optimizers") or (None, None))[0]
        super().__init__(model, args, **kwargs)
        self.prune = prune
        self.plan: Plan | None = None
        self._updates: dict[str, Tensor] | None = None  # of a cut that has no freeze folder
        self._search: JointSearch | None = None
        self._held_out: HeldOutRows | None = None
        self._evaluate_at_freeze = evaluate_at_freeze
        if prune is None:
            return
        self.dense: Architecture = describe(base_model(self.model).config)
        self._refuse(optimizer)
        self.planner = Planner(self.dense, prune.target, dtype)
        require_cuttable(self.model, self.planner.candidates)
        share = MASKS.get(prune.mask.method).held_out(prune.mask.options())
        self._held_out = HeldOutRows(self, share, prune.seed) if share else None
        self.compensation = build_compensation(prune.compensation.method, prune.compensation.options())
        if self.compensation.tokens and not hasattr(self.train_dataset, "__len__"):
            why = "calibration rows are drawn by lot, which streamed rows do not allow; load them, or set none"
            raise ConfigError([Problem(why, "compensation.method")])

    def _refuse(self, optimizer: Any) -> None:
        assert self.prune is not None
        problems = compat.refusals(self, optimizer)
        linears = {module.rpartition(".")[2] for module in self.dense.family.modules.values()}
        problems += compat.adapter_refusals(self.model, linears)
        problems += mask_refusals(self, self.prune)
        problems += hidden_refusals(self, self.prune)
        problems += rank_refusals(self, self.prune)
        compat.raise_if_any(problems)

    @property
    def shape(self) -> Shape:
        """The model's uniform widths now."""
        return full_shape(self.dense) if self.plan is None else plan_shape(self.dense, self.plan)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """As in SelectingTrainer; steps in which the mask learns alone are made of the rows held out for it."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._held_out and batches and self._replaces_rows():
            batches = self._held_out.batches(self.state.global_step, len(batches))
            self._micro_batches.clear()
            count = self._get_num_items_in_batch(batches, device)
        return batches, count

    def _replaces_rows(self) -> bool:
        return self._search is not None and self._search.mask.on_held_out(self.state.global_step)

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

    def _try_shapes(self, search: JointSearch, step: int) -> None:
        """Tries the plans that the mask has for this moment, and lets it settle on the best shape."""
        plans = search.trial(step)
        if plans and (shape := self._best_shape(plans, search.gate_set)):
            search.mask.settle(shape)

    def _best_shape(self, plans: Sequence[Plan], gate_set: GateSet) -> Shape | None:
        assert self.prune is not None
        return try_shapes(self, gate_set, self.planner, plans, self.prune.seed)

    def _freeze(self, checkpoint: Path) -> None:
        """Decides, slices the checkpoint and the live model, and clears what belonged to the dense one."""
        assert self._search is not None
        step, scores, folds = global_step(checkpoint), self._search.mask.scores(), self._search.mask.folds()
        plan, ranking = self._search.decide(step), self._search.ranks
        self._require_same_plan(plan)
        self._validate("eval_before_cut")
        self.engine.release()
        surgery, updates = self.cut(plan, folds)
        ranks = ranking.decide(self.model, surgery)
        if self.accelerator.is_main_process:
            write_freeze(self.freeze_dir, checkpoint, plan, surgery, scores, updates, folds, ranks)
        self.accelerator.wait_for_everyone()
        self._settle(surgery, load_updates(self.freeze_dir))
        self._change_ranks()
        self._validate("eval_after_cut")
        note(f"step {step}: frozen and sliced to {self.shape}; kept {describe_kept(self.dense, self.shape)}")
        # Whatever holds the dense parameters goes; the next leg makes its own from the sliced checkpoint.
        self.optimizer = self.lr_scheduler = None
        self.model_wrapped = self.model

    def cut(self, plan: Plan, folds: Mapping[str, Fold] | None = None) -> tuple[Surgery, dict[str, Tensor]]:
        """Slices the live model as the plan says, checks that nothing changed, and ends the search.

        Args:
            plan: what stays. folds: maps behind linears that the mask has learnt; they become part of the weights.

        Returns:
            The surgery, and the compensated base weights that ``apply_updates`` would put in.
        """
        wanted = None
        if folds and self._search is not None:
            self._search.gate_set.set(hard_gates(self.planner, plan))
            wanted = self._probe()
        self._end_search()
        fold_model(base_model(self.model), folds or {})
        gates = GateSet(base_model(self.model), self.planner.sites)
        gates.attach()
        gates.set(hard_gates(self.planner, plan))
        self.model.eval()
        surgery = Surgery(self.dense, plan)
        # What a linear gave before anything was removed is the aim: behind layers that are cut and not refitted yet
        # the inputs are far from those of the model to come (at 60% kept 2.81 against 2.73 nats after the cut).
        with gates.opened():
            updates = compensated_weights(self.model, surgery, self.compensation, self._collect)
        masked = self._probe()
        if wanted is not None:
            moved = mean_kl(wanted, masked)
            note(f"maps folded into the weights, which moves the output distribution by {moved:.2g} nats")
        gates.detach()
        slice_model(self.model, plan, rounded=not self._exact)
        require_equal(masked, self._probe(), self.model, exact=self._exact)
        self.plan = plan
        return surgery, updates

    def _settle(self, surgery: Surgery, updates: dict[str, Tensor]) -> None:
        """Puts the compensated weights in and rounds what a narrower residual stream rescaled; then a quantised base is
        quantised again, which is measured and said."""
        round_stream(base_model(self.model))
        apply_updates(self.model, surgery, updates)
        if not float_linears(self.model):
            return
        wanted = self._probe()
        error = requantize(self.model, surgery, updates)
        moved = mean_kl(wanted, self._probe())
        note(f"quantised again: weights within {error:.1%}, which moves the output distribution by {moved:.2g} nats")

    def _change_ranks(self) -> None:
        """Gives the adapters the ranks that the freeze folder says, which is measured and said."""
        ranks = load_ranks(self.freeze_dir)  # the first process's decision, for all
        if ranks is None:
            return
        wanted = self._probe()
        ranks.change(self.model)
        note(f"{ranks}, which moves the output distribution by {mean_kl(wanted, self._probe()):.2g} nats")

    @property
    def _exact(self) -> bool:
        small = total_params(self.dense, full_shape(self.dense)) <= EXACT_LIMIT_PARAMETERS
        return small and not is_sharded(self.model)

    def _probe(self) -> Tensor:
        with computing(base_model(self.model)):
            return probe_logits(self.model, self.dense.vocab_size, self.args.device, exact=self._exact)

    def source_weights(self) -> SourceWeights:
        """The original weights of a quantised base, cut as the live model is."""
        if self.plan is None:
            return SourceWeights(self.model)
        updates = self._updates if self._updates is not None else load_updates(self.freeze_dir)
        return SourceWeights(self.model, Surgery(self.dense, self.plan), updates)

    def cut_from_scores(self, scores: Mapping[str, Tensor], folds: Mapping[str, Fold] | None = None) -> Plan:
        """Slices the live dense model to this trainer's target by the scores of an earlier search.

        Args:
            scores: site -> (U,), as a freeze folder has them. folds: as there, if its mask had learnt any.

        Returns:
            The plan; there is no recover phase behind it unless the model is trained on.
        """
        plan = self.planner.plan(scores, shape=self._shape_of(scores), origin={"method": "scores of an earlier search"})
        surgery, self._updates = self.cut(plan, folds)
        self._settle(surgery, self._updates)
        return plan

    def _shape_of(self, scores: Mapping[str, Tensor]) -> Shape | None:
        """The shape to be cut to, if the run's mask has shapes tried and that says anything."""
        assert self.prune is not None
        if not MASKS.get(self.prune.mask.method).tries_shapes(self.prune.mask.options()):
            return None
        gates = GateSet(base_model(self.model), self.planner.sites)
        gates.attach()
        try:
            return self._best_shape(self.planner.alternatives(scores), gates)
        finally:
            gates.detach()

    def _end_search(self) -> None:
        if self._search is not None:
            self._search.detach()
            self._search = None

    def _collect(self, moments: SecondMoments) -> None:
        seed = self.prune.seed if self.prune else 0
        batches = calibration_batches(self, self.compensation.tokens, seed)
        with computing(base_model(self.model)):
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

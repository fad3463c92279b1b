"""The joint part of a run, apart from any trainer: gates, mask and phases from one step to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from prunetune.config.presets import PhaseSteps
from prunetune.config.schema import PruneConfig
from prunetune.core.console import warn
from prunetune.core.errors import Problem
from prunetune.methods.masks import MASKS, MaskContext, build_mask, check_hidden, check_mask, kept_fraction
from prunetune.model.adapters import AdapterView
from prunetune.model.gates import GateSet, GateStatistics
from prunetune.model.plan import Plan
from prunetune.model.planner import Planner
from prunetune.model.quantized import quantized_linears
from prunetune.model.sharded import Changing, changing
from prunetune.model.surgery import base_model
from prunetune.model.units import HIDDEN, sites
from prunetune.train.launched import engine_problems
from prunetune.train.ranks import RankSearch


class JointSearch:
    """Gates, mask and planner of one run, until the freeze.

    Args:
        model: the PeftModel or plain model that is trained.
        prune: the user's settings.
        planner: what finds plans for this model and target.
        phases: the run's phases in optimizer steps.
        changing: see AdapterView.
        recompute: see GateSet.
    """

    def __init__(
        self,
        model: nn.Module,
        prune: PruneConfig,
        planner: Planner,
        phases: PhaseSteps,
        *,
        changing: Changing = changing,
        recompute: bool = False,
    ):
        self.planner, self.phases, self._prune = planner, phases, prune
        method = prune.mask.method
        reads = MASKS.get(method).reads_adapters
        adapters = AdapterView(model, planner.arch, planner.sites, changing) if reads else None
        self.mask = build_mask(method, prune.mask.options(), MaskContext(planner, phases, prune.seed, adapters))
        least = self.mask.least_search
        if phases.search < least:
            warn(
                f"mask.method {method} needs some {least} search steps for its gates to settle, and this "
                f"run has {phases.search}: set train.max_steps or phases.search higher, or mask: saliency"
            )
        self.gate_set = GateSet(
            base_model(model), planner.sites, record_squares=self.mask.record_squares, recompute=recompute
        )
        self.gate_set.attach()
        self._asked = -1  # the step before which plans were asked for last
        self.ranks = RankSearch(model, planner.arch, prune, phases)

    @property
    def reads_adapters(self) -> bool:
        """Whether ``end_step`` reads the adapters and their gradients."""
        return self.mask.reads_adapters or self.ranks.method.observes

    def phase(self, step: int) -> str:
        """``warmup`` or ``search``: what optimizer step ``step`` (0-based) belongs to."""
        return "warmup" if step < self.phases.warmup_end else "search"

    def trial(self, step: int) -> list[Plan]:
        """Plans of different shapes to be tried before step ``step``; there are none when asked again."""
        plans, self._asked = [] if self._asked == step else self.mask.trial(step), step
        return plans

    def begin_step(self, step: int) -> None:
        """Sets the gates for all micro-batches of optimizer step ``step``."""
        self.gate_set.set(self.mask.gates(step))
        self.ranks.begin_step(step)

    def end_step(self, step: int, reduce: Callable[[GateStatistics], GateStatistics]) -> dict[str, float]:
        """Hands what the gates saw to the mask; ``reduce`` makes it the same on all processes."""
        seen, heard = self.gate_set.collect(), self.ranks.collect()
        seen = reduce(GateStatistics({**seen.grad, **self.mask.own_gradients(), **heard}, seen.square))
        self.ranks.learn({path: seen.grad.pop(path) for path in heard})
        return self.mask.after_backward(step, seen)

    def after_step(self, step: int, learning_rate: float) -> None:
        """Lets the mask act on the adapters that the optimizer has just moved."""
        if step >= self.phases.warmup_end:
            self.mask.after_step(step, learning_rate)

    def detach(self) -> None:
        """Takes gates and whatever belongs to the mask off the model."""
        self.gate_set.detach()
        self.mask.detach()
        self.ranks.detach()

    def state_dict(self) -> dict[str, Tensor]:
        """The mask's state, and what was seen of the adapters."""
        return {**self.mask.state_dict(), **self.ranks.state_dict()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores ``state_dict()`` exactly."""
        self.mask.load_state_dict(state)
        self.ranks.load_state_dict(state)

    def use_eval_gates(self, step: int) -> None:
        """Sets deterministic gates for an evaluation."""
        self.gate_set.set(self.mask.eval_gates(step))

    def kept_fraction(self) -> float:
        """Decoder parameters that the gates in force let through, as a fraction of all; soft gates count in part."""
        return float(kept_fraction(self.planner, {name: t.cpu() for name, t in self.gate_set.values().items()}))

    def decide(self, step: int) -> Plan:
        """The plan at the freeze."""
        origin = {"method": self._prune.mask.method, "seed": self._prune.seed, "step": step}
        return self.mask.plan(origin)


def mask_refusals(trainer: Any, prune: PruneConfig) -> list[Problem]:
    """What is wrong with the mask's settings for this trainer, each with what to set instead."""
    method = prune.mask.method
    found = check_mask(method, prune.mask.options())
    if found or not MASKS.get(method).reads_adapters:
        return found
    found += engine_problems(trainer, "masks that read the adapters", "mask.method")
    view = AdapterView(trainer.model, trainer.dense, sites(trainer.dense, prune.target.units))
    factors = {id(factor) for linear in view.linears if linear.adapted for factor in linear.factors()[:2]}
    beside = any(p.requires_grad and id(p) not in factors for p in trainer.model.parameters())
    if beside and MASKS.get(method).takes_gradients:
        feature = "masks that leave the adapters alone in some steps, beside modules trained whole"
        found += engine_problems(trainer, feature, "mask.method")
    bare = sorted({owner.site for linear in view.linears for owner in linear.owners} - _heard(view))
    if bare:
        found.append(
            Problem(
                f"{method} ranks units by the adapters on them, and {bare[0]} has none; set lora.targets: all-linear "
                "(target_modules in LoraConfig), or mask: saliency",
                "lora.targets",
            )
        )
    return found


def hidden_refusals(trainer: Any, prune: PruneConfig) -> list[Problem]:
    """What cannot be combined with pruning the hidden width, each with what to set instead."""
    if HIDDEN not in prune.target.units:
        return []
    found = engine_problems(trainer, "pruning the hidden width", "target.units")
    found += check_hidden(prune.mask.method)
    base = base_model(trainer.model)
    if quantized_linears(base):
        why = "every linear of a quantised base would lose a side; load it in bfloat16, or leave hidden out"
        found.append(Problem(why, "target.units"))
    family = trainer.dense.family
    linears = tuple(f".{module}" for module in family.modules.values())
    beyond = [
        path
        for path, module in base.named_modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not path.endswith(linears)
    ]
    if beyond:
        why = (
            f"{beyond[0]} is trained, and what is learnt beside the decoder's linears does not follow a narrower stream"
        )
        found.append(Problem(f"{why}; leave it out of the adapters, or leave hidden out", "target.units"))
    return found


def _heard(view: AdapterView) -> set[str]:
    """Sites that some adapter acts on."""
    return {owner.site for linear in view.linears if linear.adapted for owner in linear.owners}


def hard_gates(planner: Planner, plan: Plan) -> dict[str, Tensor]:
    """site -> (U,) gates of 0 and 1 that close exactly what the plan removes."""
    gates = {}
    for site in planner.sites:
        gate = torch.zeros(site.size)
        gate[list(plan.kept_units(planner.arch, site.layer, site.kind))] = 1.0
        gates[site.name] = gate
    return gates


def reducer(accelerator: Any, scaled_by_world: bool) -> Callable[[GateStatistics], GateStatistics]:
    """What makes gate statistics those of the whole step on every process.

    Args:
        accelerator: the trainer's.
        scaled_by_world: whether each process multiplied its loss by the number of processes, as TRL does when
            the token count is global, so that averaging gradients gives the gradient of the global loss.
    """
    world = accelerator.num_processes
    scale = 1.0 / accelerator.scaler.get_scale() if getattr(accelerator, "scaler", None) else 1.0
    factor = world if scaled_by_world else 1

    def reduce(statistics: GateStatistics) -> GateStatistics:
        if world == 1 and scale == 1.0:
            return statistics
        grad = [t * scale for t in statistics.grad.values()]
        square = [t * (scale / factor) ** 2 for t in statistics.square.values()]
        sums = iter(_summed(accelerator, [*grad, *square]))
        return GateStatistics(
            {name: next(sums) / world for name in statistics.grad}, {name: next(sums) for name in statistics.square}
        )

    return reduce


def _summed(accelerator: Any, tensors: list[Tensor]) -> list[Tensor]:
    """Each tensor's sum over the processes; in one message per device and dtype, because many small ones are slow."""
    sums = list(tensors)
    for kind in dict.fromkeys((t.device, t.dtype) for t in tensors):
        numbers = [number for number, t in enumerate(tensors) if (t.device, t.dtype) == kind]
        flat = accelerator.reduce(torch.cat([tensors[number].flatten() for number in numbers]), "sum")
        pieces = flat.split([tensors[number].numel() for number in numbers])
        for number, piece in zip(numbers, pieces, strict=True):
            sums[number] = piece.view_as(tensors[number])
    return sums

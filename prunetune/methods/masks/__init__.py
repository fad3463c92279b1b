"""Masks: methods that rank units while the adapters learn. One file is one method; none touches weights.

Per optimizer step the trainer asks for the gates once, runs forward and backward, hands over what the gates
saw, and at the freeze asks for the plan. Shapes: U units of a site; everything float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from prunetune.config.presets import PhaseSteps
from prunetune.core.errors import Problem
from prunetune.core.registry import Registry
from prunetune.methods.options import MethodOptions, parse_options, problems_of
from prunetune.model.adapters import AdapterView
from prunetune.model.budget import Shape, decoder_params, full_shape
from prunetune.model.fold import Fold
from prunetune.model.gates import GateStatistics
from prunetune.model.plan import Plan
from prunetune.model.planner import Planner
from prunetune.model.units import HIDDEN, LAYERS_SITE, site_name


@dataclass(frozen=True)
class MaskContext:
    """What a mask may know.

    Args:
        planner: model, sites and budget.
        phases: in optimizer steps.
        seed: the run's.
        adapters: the model's linears with their adapters; only for masks that set ``reads_adapters``.
    """

    planner: Planner
    phases: PhaseSteps
    seed: int
    adapters: AdapterView | None = None


class Mask(ABC):
    """A method that decides which units stay.

    Args:
        context: the planner, phases and seed.
        options: the method's own options.
    """

    Options: ClassVar[type[MethodOptions]] = MethodOptions
    paper: ClassVar[str] = ""
    # For `prunetune list masks`: what it looks at, and what that adds to a step of the search.
    needs: ClassVar[str] = "gate gradients"
    cost: ClassVar[str] = "none to speak of"
    # Whether it looks at adapters or base weights; without, the context has none.
    reads_adapters: ClassVar[bool] = False
    # Whether it takes the adapters' gradients away in some steps, so that these leave them alone.
    takes_gradients: ClassVar[bool] = False
    # Whether its scores mean something for the dimensions of the residual stream, whose gate acts in every layer.
    ranks_hidden: ClassVar[bool] = False
    record_squares: ClassVar[bool] = False
    # Search steps that it needs to be worth anything; with fewer a run warns.
    least_search: int = 0

    def __init__(self, context: MaskContext, options: MethodOptions):
        self.context = context
        self.sites = context.planner.sites

    @abstractmethod
    def gates(self, step: int) -> dict[str, Tensor]:
        """site -> (U,) gates in [0, 1] for optimizer step ``step`` (0-based); drawn once per step."""

    def eval_gates(self, step: int) -> dict[str, Tensor]:
        """site -> (U,) deterministic gates for evaluation at this point."""
        return self.gates(step)

    @abstractmethod
    def after_backward(self, step: int, statistics: GateStatistics) -> dict[str, float]:
        """Takes what the step's backward passes saw (already the same on all ranks); returns metrics to log.

        Statistics that are not finite must leave the state unchanged.
        """

    @abstractmethod
    def scores(self) -> dict[str, Tensor]:
        """site -> (U,) finite scores, higher = keep, in one unit of measure over all kinds."""

    def after_step(self, step: int, learning_rate: float) -> None:  # noqa: B027 - most masks have nothing to do
        """Called after the optimizer's step; the one moment where a mask with ``reads_adapters`` may change them.

        Args:
            step: as in ``gates``. learning_rate: of the adapters in that step.
        """

    def trial(self, step: int) -> list[Plan]:
        """Plans of different shapes that are to be tried on training rows before step ``step``; mostly none."""
        return []

    @classmethod
    def tries_shapes(cls, options: Mapping[str, Any]) -> bool:
        """Whether the widths are settled by a trial of legal shapes, with these options; mostly not."""
        return False

    def settle(self, shape: Shape) -> None:  # noqa: B027 - for masks that have a trial
        """Takes the shape that did best in the trial."""

    @classmethod
    def held_out(cls, options: Mapping[str, Any]) -> float:
        """Share of the training rows that the adapters never see, with these options; mostly 0."""
        return 0.0

    def on_held_out(self, step: int) -> bool:
        """Whether step ``step`` runs on such rows."""
        return False

    def own_gradients(self) -> dict[str, Tensor]:
        """name -> gradient, since the last call, of tensors that the mask has put on the model's path; they come back
        in ``statistics.grad``, the same on all ranks."""
        return {}

    def folds(self) -> dict[str, Fold]:
        """Path of a linear -> the map that the mask has learnt behind it, to be folded in at the freeze."""
        return {}

    def detach(self) -> None:  # noqa: B027 - most masks put nothing on the model
        """Takes off whatever the mask has put on the model."""

    def parameters(self) -> Iterable[Tensor]:
        """Trainable tensors of the method itself."""
        return ()

    def penalty(self, step: int) -> Tensor:
        """Scalar that pulls the gates toward the budget; differentiable in ``parameters()``."""
        return torch.zeros(())

    def plan(self, origin: Mapping[str, Any]) -> Plan:
        """The decision at the freeze: aligned, legal, inside the budget."""
        return self.context.planner.plan(self.scores(), origin=origin)

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, as flat tensors."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores ``state_dict()`` exactly."""


MASKS: Registry[type[Mask]] = Registry("mask", "prunetune.methods.masks")


def build_mask(method: str, options: Mapping[str, Any], context: MaskContext) -> Mask:
    """The mask called ``method``; raises ConfigError for unknown names, options and values."""
    kind = MASKS.get(method)
    return kind(context, parse_options("mask", method, kind.Options, options))


def check_hidden(method: str) -> list[Problem]:
    """What is wrong with a mask for the hidden width, with what to set instead."""
    if MASKS.get(method).ranks_hidden:
        return []
    able = ", ".join(name for name, kind in MASKS.items() if kind.ranks_hidden)
    why = f"{method} cannot rank hidden dimensions, which belong to all layers; set one of {able}"
    return [Problem(why, "mask.method")]


def check_mask(method: str, options: Mapping[str, Any]) -> list[Problem]:
    """The problems that ``build_mask`` would raise, without building anything."""
    return problems_of(lambda: parse_options("mask", method, MASKS.get(method).Options, options))


def finite(statistics: GateStatistics) -> bool:
    """Whether every number in the statistics is finite."""
    return all(bool(torch.isfinite(t).all()) for part in (statistics.grad, statistics.square) for t in part.values())


def weighed(shares: Mapping[str, Tensor], masses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scores that rank the units of a site by ``shares``, sites and kinds by ``masses``.

    Args:
        shares: site -> (U,) not negative, in any unit of measure. masses: site -> what they are to add up to, in one
            unit of measure over all sites.
    """
    return {
        name: (share / share.sum().clamp(min=1e-30) * masses[name]).detach().float() for name, share in shares.items()
    }


def kept_fraction(planner: Planner, gates: Mapping[str, Tensor]) -> Tensor:
    """Decoder weights that the gates let through, as a fraction of all; soft gates count in part, differentiably.

    Args:
        planner: of the model. gates: site -> (U,) gates on the CPU; kinds without gates are open.
    """
    arch, costs = planner.arch, unit_params(planner)

    def gates_of(kind: str, size: int) -> Tensor:
        names = [site_name(layer, kind) for layer in range(arch.layers)]
        return torch.stack([gates[name] for name in names]) if names[0] in gates else torch.ones(arch.layers, size)

    groups_LK = gates_of("kv_groups", arch.kv_groups)
    heads_LH = gates_of("query_heads", arch.query_heads) * groups_LK.repeat_interleave(arch.queries_per_group, dim=1)
    channels_LF = gates_of("mlp_channels", arch.mlp_channels)
    of_group = costs["kv_groups"] - arch.queries_per_group * costs["query_heads"]  # its key and value head
    kept_L = of_group * groups_LK.sum(1) + costs["query_heads"] * heads_LH.sum(1)
    kept_L = kept_L + costs["mlp_channels"] * channels_LF.sum(1)
    if LAYERS_SITE in gates:
        kept_L = kept_L * gates[LAYERS_SITE]
    open_ = gates[HIDDEN].mean() if HIDDEN in gates else 1.0
    return open_ * kept_L.sum() / (arch.layers * costs["layers"])


def budget_fraction(planner: Planner) -> float:
    """The decoder fraction that the largest shape inside the budget keeps."""
    arch = planner.arch
    return max(decoder_params(arch, shape) for shape in planner.candidates) / decoder_params(arch, full_shape(arch))


def unit_params(planner: Planner) -> dict[str, float]:
    """kind -> decoder parameters that one unit carries; the exchange rate between kinds without a loss."""
    arch = planner.arch
    head = 2 * arch.head_dim * arch.hidden_size
    group = head * (1 + arch.queries_per_group)
    channel = 3 * arch.hidden_size
    layer = arch.kv_groups * group + arch.mlp_channels * channel
    hidden = arch.layers * layer / arch.hidden_size
    return {"mlp_channels": channel, "kv_groups": group, "query_heads": head, "layers": layer, HIDDEN: hidden}

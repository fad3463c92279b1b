"""PAT: one trainable mask over the residual stream, with low-rank maps behind everything that writes to it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from prunetune.core.errors import ConfigError, Problem
from prunetune.methods.masks import MASKS, Mask, MaskContext, finite, unit_params
from prunetune.methods.masks._hybrid import HybridModules
from prunetune.methods.masks._start import Beginning, steady_rate
from prunetune.methods.options import MethodOptions
from prunetune.model.fold import Fold
from prunetune.model.gates import GateStatistics
from prunetune.model.units import HIDDEN

# Steps of the published schedule, which the search is stretched or squeezed to: with its logarithm of plain steps, the
# gates of a short search would still be half open when the mask is fixed.
PUBLISHED = 10_000
# Published runs move a number by at most this much (8000 steps of Adam at 5e-5), and no step is longer than FASTEST.
PATH, SLOWEST, FASTEST = 0.4, 5e-5, 5e-2
# The mask is fixed after this share of its schedule, and gates are not closed further than sigmoid(-STEEPEST).
FIXED, STEEPEST = 0.8, 10.0
# Scores are exponentials of the numbers; beyond this nothing changes any more.
LARGEST = 20.0


class PatOptions(MethodOptions):
    """Options of the pat mask."""

    learning_rate: float = Field(
        0.0,
        ge=0,
        description="of the mask's numbers (Adam); 0: as far as published runs go, if the start outlasts noise",
    )
    active: float = Field(10.0, ge=0, description="weight of |open units - wanted| / wanted")
    identity: float = Field(1.0, ge=0, description="weight of the identity loss of all maps")
    rank: int = Field(0, ge=0, description="of the maps; 0: 5% of the hidden size")
    start: Literal["saliency", "equal"] = Field(
        "saliency", description="first numbers: a little apart, from the warm-up's gradients, or all 0 as published"
    )
    spread: float = Field(0.1, gt=0, lt=1, description="how far from 0 the least and the most salient unit start")


@MASKS.register("pat")
class PatMask(Mask):
    """PAT: an annealed sigmoid mask over the hidden width, with low-rank maps that are folded in at the freeze.

    Made for ``target.units: [hidden]``. With t steps of T = 10,000, to which the search is scaled, and numbers theta,
    gates are sigmoid(tau theta) + max(1/2 - t/T, 0), tau = 1 / (1 - ln t / ln T): about 1 at first, ever steeper. The
    mask's loss is the model's plus ``active`` |sum 1[theta >= 0] - wanted| / wanted, straight-through, and the mean
    squared distance of positive numbers from 1/2 and of the others from -1/2. Behind o and down of every layer stands
    I + L diag(v) R, which learns at the adapters' rate under an identity loss that keeps L and R orthonormal
    (arXiv 2408.14721).

    Differences: the identity loss is that of all maps, not of the last layer's; the scale v stands in the map and is
    folded with it; gates stay within [0, 1], with the gradient of the formula; from 0.8 T on the mask is the plan's,
    exactly 0 and 1. The schedule is the search phase: maps are folded at the freeze and the adapters learn on. No map
    behind the embedding, which would untie it from the head. Of other kinds of units (all sites apart) the mask is
    learnt the same way, without maps. Numbers that start equal are first told apart by the noise of a few gradients;
    ``start: saliency`` sets them ``spread`` apart by the warm-up's (see the mask ``saliency``).
    """

    Options = PatOptions
    paper = "arXiv 2408.14721"
    needs = "gate gradients per token; hidden: the outputs of o and down"
    cost = "a low-rank product behind o and down; a planner's decision a step"
    reads_adapters = True
    ranks_hidden = True
    record_squares = True

    def __init__(self, context: MaskContext, options: PatOptions):
        super().__init__(context, options)
        self.options = options
        self._beginning = Beginning(context, options.start == "saliency")
        self._steps = max(2, context.phases.search)
        if options.rank > context.planner.arch.hidden_size:
            why = (
                f"a map of the {context.planner.arch.hidden_size} hidden dimensions has no rank of {options.rank}; "
                f"set it to 0 (5% of them), or to {context.planner.arch.hidden_size} at most"
            )
            raise ConfigError([Problem(why, "mask.rank")])
        rate = options.learning_rate or min(max(SLOWEST, PATH / (FIXED * self._steps)), FASTEST)
        if not options.learning_rate and not self._beginning.over:
            rate = min(rate, steady_rate(options.spread, self._steps))
        self._theta = {site.name: torch.zeros(site.size, requires_grad=True) for site in self.sites}
        self._adam = torch.optim.Adam(list(self._theta.values()), lr=rate)
        self._stays = {site.name: torch.ones(site.size) for site in self.sites}
        self._fixed = torch.tensor(False)
        costs = unit_params(context.planner)
        self._costs = {site.name: costs[site.kind] for site in self.sites}
        self._gradients: dict[str, Tensor] = {}
        writers, arch = [], context.planner.arch
        if any(site.kind == HIDDEN for site in self.sites):
            assert context.adapters is not None
            writers = [linear for linear in context.adapters.linears if linear.role in ("o", "down")]
        self.hybrid = HybridModules(writers, options.rank or max(1, round(0.05 * arch.hidden_size)), context.seed)

    def parameters(self) -> Iterable[Tensor]:
        return [*self._theta.values(), *self.hybrid.named().values()]

    def _kept(self) -> dict[str, int]:
        """site -> units that the planner would keep now."""
        kept = self.context.planner.plan(self.scores()).kept
        return {site.name: len(kept.get(site.name, range(site.size))) for site in self.sites}

    def _formula(self, step: int) -> dict[str, Tensor]:
        """site -> (U,) the mask's formula, differentiable."""
        way = (step - self.context.phases.warmup_end) / self._steps
        steepness = 1.0 / (1.0 - math.log(max(1.0, way * PUBLISHED)) / math.log(PUBLISHED) + 1e-6)
        offset = max(0.5 - way, 0.0)
        return {
            name: torch.sigmoid((steepness * theta).clamp(min=-STEEPEST)) + offset
            for name, theta in self._theta.items()
        }

    @torch.no_grad()
    def gates(self, step: int) -> dict[str, Tensor]:
        if step < self.context.phases.warmup_end:
            return {site.name: torch.ones(site.size) for site in self.sites}
        if self._fixed:
            return dict(self._stays)
        kept = self._kept()
        return {
            # Where nothing is to go, nothing closes.
            name: torch.ones_like(gate) if kept[name] == gate.numel() else gate.clamp(max=1.0)
            for name, gate in self._formula(step).items()
        }

    def penalty(self, step: int) -> Tensor:
        kept, total = self._kept(), torch.zeros(())
        for name, theta in self._theta.items():
            if kept[name] == theta.numel():
                continue
            open_ = (theta >= 0).float()
            count = (open_ + theta - theta.detach()).sum()
            total = total + self.options.active * (count - kept[name]).abs() / kept[name]
            for side, centre in ((theta[theta > 0], 0.5), (theta[theta <= 0], -0.5)):
                if side.numel():
                    total = total + (side - centre).square().mean()
        return total

    def after_backward(self, step: int, statistics: GateStatistics) -> dict[str, float]:
        if not finite(statistics):
            return {}
        above = self._beginning.observe(step, statistics)
        if above is not None:
            with torch.no_grad():
                for name, theta in self._theta.items():
                    theta.copy_(self.options.spread * above[name].clamp(-1.0, 1.0))
        if step < self.context.phases.warmup_end:
            return {}
        self._gradients = {name: grad for name, grad in statistics.grad.items() if name not in self._theta}
        if self._fixed:
            return {"mask_open": self._open()}
        penalty, formula, kept = self.penalty(step), self._formula(step), self._kept()
        moving = [name for name, theta in self._theta.items() if kept[name] < theta.numel()]
        self._adam.zero_grad()
        if moving:
            grads = [statistics.grad[name].cpu() for name in moving]
            torch.autograd.backward([*(formula[name] for name in moving), penalty], [*grads, torch.ones(())])
            self._adam.step()
        if step + 1 - self.context.phases.warmup_end >= FIXED * self._steps:
            self._fix()
        return {"mask_open": self._open()}

    def _open(self) -> float:
        """Share of the units whose numbers are not negative."""
        theta = torch.cat(list(self._theta.values()))
        return float((theta >= 0).float().mean())

    def _fix(self) -> None:
        plan, arch = self.context.planner.plan(self.scores()), self.context.planner.arch
        for site in self.sites:
            stays = torch.zeros(site.size)
            stays[list(plan.kept_units(arch, site.layer, site.kind))] = 1.0
            self._stays[site.name] = stays
        self._fixed.fill_(True)

    def own_gradients(self) -> dict[str, Tensor]:
        return self.hybrid.take_gradients()

    def after_step(self, step: int, learning_rate: float) -> None:
        if self._gradients:
            self.hybrid.learn(self._gradients, learning_rate, self.options.identity)
            self._gradients = {}

    def folds(self) -> dict[str, Fold]:
        return self.hybrid.folds()

    def detach(self) -> None:
        self.hybrid.detach()

    @torch.no_grad()
    def scores(self) -> dict[str, Tensor]:
        return {name: self._costs[name] * theta.clamp(-LARGEST, LARGEST).exp() for name, theta in self._theta.items()}

    def state_dict(self) -> dict[str, Tensor]:
        # Clones, because Adam changes these tensors in place.
        state = {f"theta.{name}": theta.detach().clone() for name, theta in self._theta.items()}
        for name, theta in self._theta.items():
            for key, value in self._adam.state[theta].items():
                state[f"adam.{key}.{name}"] = value.clone()
            state[f"stays.{name}"] = self._stays[name].clone()
        state |= {"fixed": self._fixed.clone(), **self._beginning.state_dict()}
        return {**state, **self.hybrid.state_dict()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._fixed.copy_(state["fixed"])
        self._beginning.load_state_dict(state)
        self.hybrid.load_state_dict(state)
        with torch.no_grad():
            for name, theta in self._theta.items():
                theta.copy_(state[f"theta.{name}"])
                self._stays[name] = state[f"stays.{name}"].clone()
                keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"adam.{key}.{name}" in state]
                self._adam.state[theta] = {key: state[f"adam.{key}.{name}"].clone() for key in keys}

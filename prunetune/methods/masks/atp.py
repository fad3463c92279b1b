"""ATP: a small network over the layers makes all gates, and learns from the loss that they cause."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from prunetune.config.schema import Fraction
from prunetune.core.streams import stream
from prunetune.methods.masks import (
    MASKS,
    Mask,
    MaskContext,
    budget_fraction,
    finite,
    kept_fraction,
    unit_params,
)
from prunetune.methods.masks._generators import LargeGenerator, SmallGenerator
from prunetune.methods.masks._proximal import shrink
from prunetune.methods.options import MethodOptions
from prunetune.model.gates import GateStatistics
from prunetune.model.units import LAYERS_SITE

# With logit a + offset, P(keep) = 1 - exp(-exp(a + offset)): above this the gate is more likely open than closed.
MEDIAN = math.log(math.log(2))
# Steps times learning rate: what the network needs to close as many gates as a budget asks for, against noise; and how
# far a shorter search is hurried. Going faster closes more and knows less of what it closes (90 steps on a real
# model: 13.3 with this, 16.5 with all of the way), while the freeze meets the budget by rank in any case.
SETTLED, HURRIED = 0.4, 0.15
# The published rate, and one beyond which a step of a few rows' gradients decides too much.
SLOWEST, FASTEST = 1e-3, 1e-2
# Beyond these exponents nothing changes any more, and float32 ends.
LOWEST, HIGHEST = -60.0, 40.0


class AtpOptions(MethodOptions):
    """Options of the atp mask; defaults are the first version's, in brackets the second's."""

    size: Literal["small", "large"] = Field("small", description="the network: the paper's, or its second version's")
    learning_rate: float = Field(
        0.0, ge=0, description="of the network (Adam); 0: 1e-3 as published [5e-5], more where the search is too short"
    )
    temperature: float = Field(0.4, gt=0, description="of the relaxed gates [0.2]")
    offset: float = Field(3.0, description="added to all logits, so that every gate starts open")
    ratio_weight: float = Field(5.0, ge=0, description="weight of the log-ratio between kept and wanted parameters")
    tolerance: float = Field(0.005, ge=0, description="log-ratio below which it does not pull")
    clip: float = Field(3.0, gt=0, description="largest norm of the network's gradient [1.0]")
    alternate: bool = Field(False, description="in turns: a step's rows teach the network alone, or the adapters alone")
    held_out: Fraction = Field(
        0.1, gt=0, lt=1, description="share of the training rows that teach the network alone; only with alternate"
    )
    shrink: float = Field(50000.0, ge=0, description="final strength of the pull on closed units' adapters; 0: none")


@MASKS.register("atp")
class AtpMask(Mask):
    """ATP: gates from a network over the layers, sampled with Gumbel noise, straight-through, log-ratio budget.

    With logits a = network(), Gumbel noise g and soft gates s = sigmoid((a + g + offset) / T), the model runs on
    1[s >= 1/2] and its gradient reaches the network as if it had run on s. The network's loss adds
    ``ratio_weight * log(max(P, p) / min(P, p))`` of kept and wanted parameters (arXiv 2412.14426). At the freeze
    the gates are those more likely open than not, adjusted by rank to the budget.

    Differences: units are whole KV groups and MLP channels (single Q/K dimensions do not commute with rotary
    embeddings); a gate closes base and adapter alike, so that nothing leaks and no lasso is needed for exactness; the
    ratio has a dead zone, where it would only chatter. By default one pass teaches network and adapters on the same
    rows, which costs nothing; with ``alternate`` each step teaches one of them: the network with soft gates, on rows
    that are held out from the adapters, then the adapters with hard gates. The second version's proximal step shrinks
    the adapters of closed units as one group by learning rate * strength * the site's share of all closed ones. Its
    smoothing over time is left out: weights that add up to 1.1 let all logits drift upward.
    """

    Options = AtpOptions
    paper = "arXiv 2412.14426"
    needs = "gate gradients, adapters"
    cost = "a small network's step on the CPU; alternate: twice the steps"
    reads_adapters = takes_gradients = True

    def __init__(self, context: MaskContext, options: AtpOptions):
        super().__init__(context, options)
        self.options = options
        turns = 2 if options.alternate else 1
        rate = options.learning_rate or min(max(SLOWEST, HURRIED * turns / max(1, context.phases.search)), FASTEST)
        self.least_search = turns * math.ceil(SETTLED / (options.learning_rate or SLOWEST))
        arch, planner = context.planner.arch, context.planner
        widths = {site.kind: 1 if site.kind == LAYERS_SITE else site.size for site in self.sites}
        ends = torch.tensor(list(widths.values())).cumsum(0).tolist()
        self._columns = {kind: slice(end - widths[kind], end) for kind, end in zip(widths, ends)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(stream(context.seed, "mask.atp", "network").integers(2**31)))
            network = SmallGenerator if options.size == "small" else LargeGenerator
            self._network = network(arch.layers, ends[-1])
        self._adam = torch.optim.Adam(self._network.parameters(), lr=rate)
        self._ran_on: dict[str, Tensor] = {}
        self._wanted, self._costs = budget_fraction(planner), unit_params(planner)

    @classmethod
    def held_out(cls, options: Mapping[str, Any]) -> float:
        found = cls.Options.model_validate(options)
        return found.held_out if found.alternate else 0.0

    def on_held_out(self, step: int) -> bool:
        return step >= self.context.phases.warmup_end and not self._teaches_adapters(step)

    def parameters(self) -> Iterable[Tensor]:
        return list(self._network.parameters())

    def _logits(self) -> dict[str, Tensor]:
        """site -> (U,) logits, offset included."""
        rows_LD = self._network() + self.options.offset
        return {
            site.name: rows_LD[:, self._columns[site.kind]][:, 0]
            if site.kind == LAYERS_SITE
            else rows_LD[site.layer, self._columns[site.kind]]
            for site in self.sites
        }

    def _soft(self, step: int) -> dict[str, Tensor]:
        """site -> (U,) relaxed gates of this step's noise."""
        soft = {}
        for name, logit in self._logits().items():
            uniform = stream(self.context.seed, "mask.atp", step, name).random(logit.numel())
            noise = -torch.log(-torch.log(torch.from_numpy(uniform).clamp(1e-12, 1 - 1e-12)))
            soft[name] = torch.sigmoid((logit + noise.float()) / self.options.temperature)
        return soft

    def _teaches_network(self, step: int) -> bool:
        return not self.options.alternate or (step - self.context.phases.warmup_end) % 2 == 0

    def _teaches_adapters(self, step: int) -> bool:
        return not self.options.alternate or not self._teaches_network(step)

    def gates(self, step: int) -> dict[str, Tensor]:
        if step < self.context.phases.warmup_end:
            return {site.name: torch.ones(site.size) for site in self.sites}
        with torch.no_grad():
            soft = self._soft(step)
        if not self._teaches_adapters(step):
            return soft
        self._ran_on = {name: _hard(gate) for name, gate in soft.items()}
        return dict(self._ran_on)

    @torch.no_grad()
    def eval_gates(self, step: int) -> dict[str, Tensor]:
        if step < self.context.phases.warmup_end:
            return self.gates(step)
        return {name: (logit > MEDIAN).float() for name, logit in self._logits().items()}

    def penalty(self, step: int) -> Tensor:
        return self._ratio_penalty(self._soft(step))

    def _ratio_penalty(self, soft: Mapping[str, Tensor]) -> Tensor:
        kept = kept_fraction(self.context.planner, {name: _straight(gate) for name, gate in soft.items()})
        off = (kept.clamp(min=1e-10) / self._wanted).log().abs()
        return self.options.ratio_weight * torch.where(off > self.options.tolerance, off, 0.0 * off)

    def after_backward(self, step: int, statistics: GateStatistics) -> dict[str, float]:
        if step < self.context.phases.warmup_end or not finite(statistics):
            return {}
        if not self._teaches_adapters(step):
            self._forget_gradients()
        soft = self._soft(step)
        penalty = self._ratio_penalty(soft)
        if self._teaches_network(step):
            self._adam.zero_grad()
            grads = [statistics.grad[name].cpu() for name in soft]
            torch.autograd.backward([*soft.values(), penalty], [*grads, torch.ones(())])
            torch.nn.utils.clip_grad_norm_(self._network.parameters(), self.options.clip)
            self._adam.step()
        return {"mask_ratio_penalty": float(penalty.detach())}

    def _forget_gradients(self) -> None:
        """The optimizer leaves out what has no gradient, moments included."""
        assert self.context.adapters is not None
        for parameter in self.context.adapters.trained:
            parameter.grad = None

    def after_step(self, step: int, learning_rate: float) -> None:
        phases = self.context.phases
        if self.options.shrink == 0 or step < phases.warmup_end or not self._teaches_adapters(step):
            return
        assert self.context.adapters is not None
        way = math.expm1((step + 1) / phases.total) / math.expm1(1.0)
        # The network has moved since: what was closed in the passes of this step.
        closed = {name: 1.0 - gate for name, gate in self._ran_on.items()}
        total = max(1.0, float(sum(gate.sum() for gate in closed.values())))
        pull = learning_rate * self.options.shrink * way
        shrink(self.context.adapters, {name: pull * float(t.sum()) / total * t for name, t in closed.items()})

    @torch.no_grad()
    def scores(self) -> dict[str, Tensor]:
        # Parameters times -log P(closed) = exp(logit), which tells units apart however certain the network is.
        return {
            site.name: self._costs[site.kind] * logit.clamp(LOWEST, HIGHEST).exp()
            for site, logit in zip(self.sites, self._logits().values())
        }

    def state_dict(self) -> dict[str, Tensor]:
        # Clones, because Adam changes these tensors in place.
        state = {f"network.{name}": tensor.clone() for name, tensor in self._network.state_dict().items()}
        for name, parameter in self._network.named_parameters():
            for key, value in self._adam.state[parameter].items():
                state[f"adam.{key}.{name}"] = value.clone()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        inside = {key.removeprefix("network."): value for key, value in state.items() if key.startswith("network.")}
        self._network.load_state_dict(inside)
        for name, parameter in self._network.named_parameters():
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"adam.{key}.{name}" in state]
            self._adam.state[parameter] = {key: state[f"adam.{key}.{name}"].clone() for key in keys}


def _hard(soft: Tensor) -> Tensor:
    return (soft >= 0.5).float()


def _straight(soft: Tensor) -> Tensor:
    """The hard gate, with the gradient of the soft one."""
    return (_hard(soft) - soft).detach() + soft

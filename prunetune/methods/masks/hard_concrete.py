"""L0 gates: stretched binary concrete noise on learnt logits, held to the budget step by step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from prunetune.core.streams import stream
from prunetune.methods.masks import MASKS, Mask, MaskContext, budget_fraction, finite, kept_fraction, unit_params
from prunetune.methods.masks._start import Beginning
from prunetune.methods.options import MethodOptions
from prunetune.model.gates import GateStatistics

# Stretch limits and temperature of Louizos et al. (arXiv 1712.01312).
LOW, HIGH, BETA = -0.1, 1.1, 2.0 / 3.0
# P(z > 0) = sigmoid(logit - SHIFT).
SHIFT = BETA * math.log(-LOW / HIGH)
# The common shift is looked for between these, to 2 * 100 / 2^40 = 2e-10.
WIDEST, BISECTIONS = 100.0, 40
# No unit starts further than this from its site's threshold, so that all can still be reached.
FARTHEST = 20.0


class HardConcreteOptions(MethodOptions):
    """Options of the hard concrete mask."""

    learning_rate: float = Field(0.1, gt=0, description="of the gate logits (Adam)")
    multiplier: Literal["solved", "learnt"] = Field("solved", description="how the budget is held")
    multiplier_rate: float = Field(2.0, gt=0, description="ascent of learnt multipliers")
    ramp_share: float = Field(0.6, gt=0, le=1, description="the budget is reached after this share of the search")
    start: Literal["saliency", "equal"] = Field(
        "saliency", description="first logits: from the warm-up's gradients, or all equal as published"
    )
    contrast: float = Field(4.0, gt=0, description="a unit with e times the saliency starts so much higher")
    init: float = Field(2.5, description="mean first logit; 2.5 keeps a gate open with probability 0.98")
    noise: bool = Field(True, description="sample gates while training; off: the median of each")


@MASKS.register("hard_concrete")
class HardConcreteMask(Mask):
    """Hard concrete L0 gates with a Lagrangian budget.

    z = clip(sigmoid((logit + ln u - ln(1 - u)) / beta) * 1.2 - 0.1, 0, 1) (Louizos et al., arXiv 1712.01312). Logits
    have their own Adam and are never decayed. ``multiplier: learnt`` holds the expected kept parameters to the budget
    on the way by lambda1 * gap + lambda2 * gap^2 with both multipliers ascending (Xia et al., arXiv 2310.06694), which
    takes thousands of steps to settle. ``solved`` takes, after each step, one number from all logits, so that the
    expected size is the budget's exactly: the multiplier of the constraint, solved for. (A common shift of logits is
    the nearest point inside the budget in the KL divergence weighted by parameters.)

    Published logits start equal: on the way to the budget every gate of the model is then sampled half open, and the
    loss is that of noise until thousands of steps have spread them. ``start: saliency`` spreads them beforehand: the
    warm-up's running second moment of the gate gradients (see the mask ``saliency``) ranks units, a logit begins at
    ``contrast`` times the log of its unit's saliency over that of the site's boundary, and only units near a boundary
    are left to chance and to learning. Without warm-up steps there is nothing to begin with, and logits start equal.
    """

    Options = HardConcreteOptions
    paper = "arXiv 1712.01312, 2310.06694"
    needs = "gate gradients per token"
    cost = "a reduction over each gated input"
    record_squares = True

    def __init__(self, context: MaskContext, options: HardConcreteOptions):
        super().__init__(context, options)
        self.options = options
        # Until equal logits have spread, gates are sampled half open all over the model and its loss is that of noise.
        self._beginning = Beginning(context, options.start == "saliency")
        self.least_search = 300 if self._beginning.over else 0
        self._logits = {site.name: torch.full((site.size,), options.init).requires_grad_() for site in self.sites}
        self._multipliers = torch.zeros(2, requires_grad=True)
        self._adam = torch.optim.Adam(list(self._logits.values()), lr=options.learning_rate, betas=(0.9, 0.99))
        costs = unit_params(context.planner)
        self._costs = {site.name: costs[site.kind] for site in self.sites}
        self._first_kept = float(self.expected_kept().detach())
        self._final_kept = budget_fraction(context.planner)

    def parameters(self) -> Iterable[Tensor]:
        return [*self._logits.values(), self._multipliers]

    def gates(self, step: int) -> dict[str, Tensor]:
        return {name: gate.detach() for name, gate in self._gates(step).items()}

    def eval_gates(self, step: int) -> dict[str, Tensor]:
        if step < self.context.phases.warmup_end or not self.options.noise:
            return self.gates(step)
        return {name: _stretch(torch.sigmoid(logit.detach())) for name, logit in self._logits.items()}

    def _gates(self, step: int) -> dict[str, Tensor]:
        if step < self.context.phases.warmup_end:
            return {name: torch.ones_like(logit) for name, logit in self._logits.items()}
        return {name: self._sample(step, name, logit) for name, logit in self._logits.items()}

    def _sample(self, step: int, name: str, logit: Tensor) -> Tensor:
        if not self.options.noise:
            return _stretch(torch.sigmoid(logit / BETA))
        uniform = stream(self.context.seed, "mask.hard_concrete", step, name).random(logit.numel())
        u = torch.from_numpy(uniform).float().clamp(1e-6, 1 - 1e-6)
        return _stretch(torch.sigmoid((logit + torch.log(u) - torch.log1p(-u)) / BETA))

    def _open_probability(self) -> dict[str, Tensor]:
        """site -> (U,): P(z > 0)."""
        return {name: torch.sigmoid(logit - SHIFT) for name, logit in self._logits.items()}

    def expected_kept(self) -> Tensor:
        """Expected fraction of the decoder's parameters that stays, in [0, 1]; gates are independent."""
        return kept_fraction(self.context.planner, self._open_probability())

    def target_kept(self, step: int) -> float:
        """Where the expected kept fraction should be at this step: a linear ramp."""
        phases = self.context.phases
        ramp = max(1.0, self.options.ramp_share * (phases.freeze - phases.warmup_end))
        progress = min(1.0, max(0.0, (step + 1 - phases.warmup_end) / ramp))
        return self._first_kept + (self._final_kept - self._first_kept) * progress

    def penalty(self, step: int) -> Tensor:
        gap = self.expected_kept() - self.target_kept(step)
        return self._multipliers[0] * gap + self._multipliers[1] * gap.square()

    def after_backward(self, step: int, statistics: GateStatistics) -> dict[str, float]:
        searching = step >= self.context.phases.warmup_end
        if finite(statistics):
            self._start(self._beginning.observe(step, statistics))
        if not searching or not finite(statistics):
            return {"mask_expected_kept": float(self.expected_kept().detach())}
        self._adam.zero_grad()
        # The model's gradient reaches the logits through the same sample that the forward used.
        gates = self._gates(step)
        torch.autograd.backward(list(gates.values()), [statistics.grad[name].cpu() for name in gates])
        if self.options.multiplier == "learnt":
            multiplier = self._ascend(step)
        else:
            self._adam.step()
            multiplier = self._hold(self.target_kept(step))
        return {"mask_expected_kept": float(self.expected_kept().detach()), "mask_multiplier": multiplier}

    @torch.no_grad()
    def _start(self, above: Mapping[str, Tensor] | None) -> None:
        """Spreads the logits by what the warm-up saw, and lifts them until as much is open as with equal ones."""
        if above is not None:
            for name, logit in self._logits.items():
                logit.copy_((self.options.contrast * above[name]).clamp(-FARTHEST, FARTHEST))
            self._hold(self._first_kept)

    def _ascend(self, step: int) -> float:
        """One step down for the logits and up for the multipliers; returns the first multiplier."""
        self._multipliers.grad = None
        self.penalty(step).backward()
        self._adam.step()
        with torch.no_grad():
            assert self._multipliers.grad is not None
            self._multipliers += self.options.multiplier_rate * self._multipliers.grad
            self._multipliers[1].clamp_(min=0.0)
        return float(self._multipliers[0].detach())

    @torch.no_grad()
    def _hold(self, target: float) -> float:
        """Takes one number from all logits so that the expected kept fraction is ``target``; returns it."""
        low, high = -WIDEST, WIDEST
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            open_ = {name: torch.sigmoid(logit.double() - middle - SHIFT) for name, logit in self._logits.items()}
            over = float(kept_fraction(self.context.planner, open_)) > target
            low, high = (middle, high) if over else (low, middle)
        for logit in self._logits.values():
            logit -= high
        return high

    def scores(self) -> dict[str, Tensor]:
        # Parameters times -log P(closed). Probabilities near 1 are equal in float32, and their order would be lost.
        closed = torch.nn.functional.softplus
        return {name: (self._costs[name] * closed(t - SHIFT)).detach() for name, t in self._logits.items()}

    def state_dict(self) -> dict[str, Tensor]:
        # Clones, because Adam changes these tensors in place.
        state = {f"logit.{name}": logit.detach().clone() for name, logit in self._logits.items()}
        for name, logit in self._logits.items():
            for key, value in self._adam.state[logit].items():
                state[f"adam.{key}.{name}"] = value.clone()
        return {**state, **self._beginning.state_dict(), "multipliers": self._multipliers.detach().clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            self._multipliers.copy_(state["multipliers"])
            self._beginning.load_state_dict(state)
            for name, logit in self._logits.items():
                logit.copy_(state[f"logit.{name}"])
                keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"adam.{key}.{name}" in state]
                self._adam.state[logit] = {key: state[f"adam.{key}.{name}"].clone() for key in keys}


def _stretch(s: Tensor) -> Tensor:
    return (s * (HIGH - LOW) + LOW).clamp(0.0, 1.0)

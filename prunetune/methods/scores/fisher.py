"""The gates' diagonal Fisher information: what closing one costs, to second order."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from prunetune.methods.options import MethodOptions
from prunetune.methods.scores import SCORES, ModelFacts, ModelScore, ScoreContext
from prunetune.methods.scores._gradients import target_losses
from prunetune.model.gates import GateSet


class FisherOptions(MethodOptions):
    """Options of fisher."""

    per: Literal["token", "row"] = Field(
        "token", description="square what each position adds to a row's gradient, or all of that"
    )


@SCORES.register("fisher")
class Fisher(ModelScore):
    """Half the mean squared gradient of a gate: the loss that closing it costs, to second order.

    Per row it is the published form: the square of the gradient of the row's mean loss, a mean over rows. Per token it
    is what the saliency mask keeps while training: what each position of a row adds to the gradient of its summed loss,
    squared, and the sum of these divided by the number of target tokens. A position adds to the losses of all tokens
    after it, so these are not the gradients of single tokens' losses; those would take a backward pass each.
    """

    Options = FisherOptions
    paper = "arXiv 2204.09656, 1801.05787"
    needs = frozenset({"gradients"})
    cost = "loads the whole model, forward and backward; no gradients of weights"
    measure = "loss"

    def __init__(self, context: ScoreContext, options: FisherOptions):
        super().__init__(context, options)
        self.options: FisherOptions = options

    def collect(self, facts: ModelFacts) -> None:
        by_token = self.options.per == "token"
        gates = GateSet(facts.model, self.context.sites, record_squares=by_token)
        sums = {site.name: torch.zeros(site.size) for site in self.context.sites}
        count = 0
        gates.attach()
        try:
            for row in facts.rows(0):
                if not row.targets:
                    continue
                gates.set({})
                losses_T = target_losses(facts.model, row)
                (losses_T.sum() if by_token else losses_T.mean()).backward()
                found = gates.collect()
                for name, total in sums.items():
                    total += found.square[name].cpu() if by_token else found.grad[name].square().cpu()
                count += row.targets if by_token else 1
        finally:
            gates.detach()
        self._found = {name: total / (2 * count) for name, total in sums.items()}

"""APT: the more salient half of the adapters grows, the other half pays for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

from pydantic import BeforeValidator, Field
from torch import Tensor

from prunetune.config.schema import Fraction
from prunetune.core.sizes import parse_fraction
from prunetune.methods.options import MethodOptions
from prunetune.methods.ranks import RANKS, RankMethod, SeenAdapter, without_least
from prunetune.model.ranks import RankChange


class AptRanksOptions(MethodOptions):
    """Options of apt."""

    kept: Annotated[float, BeforeValidator(parse_fraction)] = Field(
        1.0, gt=0, le=4, description="share of the sliced adapters' parameters that there is from then on; up to 400%"
    )
    moved: Fraction = Field(0.25, lt=1, description="share of these that is new ranks of the more salient half")
    most: float = Field(8, ge=1, description="an adapter grows to at most so many times its rank")


@RANKS.register("apt")
class AptRanks(RankMethod):
    """APT: adaptive ranks; salient adapters get new ranks, within a budget of parameters.

    The salience of rank i is |sum_in(A_i * gA_i)|, of an adapter the mean over its ranks, both averaged over the second
    half of the search (arXiv 2401.12200). Ranks are dropped, those of the less salient half first, until ``moved`` of
    the budget is free; then the other half gets it, one rank each in turn, the most salient first. For equal ranks that
    is the published floor(r (new - old) / selected + r), and what it leaves over. New ranks have B = 0 and the A that
    PEFT would draw, so they change nothing until they have learnt.

    Differences: the budget is met once, at the freeze, not event by event, and need not grow: then the less salient
    half shrinks, which the published one does not.
    """

    Options = AptRanksOptions
    paper = "arXiv 2401.12200"

    def __init__(self, options: AptRanksOptions):
        super().__init__(options)
        self.options: AptRanksOptions = options

    def importance(self, a_rI: Tensor, b_Or: Tensor, grad_a_rI: Tensor, grad_b_Or: Tensor) -> Tensor:
        return (a_rI * grad_a_rI).sum(1).abs()

    def ranks(self, adapters: Sequence[SeenAdapter]) -> dict[str, RankChange]:
        now = sum(adapter.params for adapter in adapters)
        budget = self.options.kept * now
        in_order = sorted(adapters, key=lambda adapter: -float(adapter.importance_r.mean()))
        salient = in_order[: math.ceil(len(in_order) / 2)]
        spared = {adapter.path for adapter in salient}
        changes = without_least(adapters, min(now, budget * (1 - self.options.moved)), last=spared)
        room = budget - sum(adapter.features * changes[adapter.path].rank for adapter in adapters)
        growing = [adapter for adapter in salient if changes[adapter.path].rank]
        while growing:
            grew = []
            for adapter in growing:
                change = changes[adapter.path]
                if adapter.features <= room and change.rank + 1 <= self.options.most * len(adapter.importance_r):
                    changes[adapter.path] = replace(change, added=change.added + 1)
                    room -= adapter.features
                    grew.append(adapter)
            growing = grew
        return changes

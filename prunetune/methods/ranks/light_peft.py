"""Light-PEFT: adapters that hardly move their linear leave, then the least important ranks of the others."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from prunetune.config.schema import Fraction
from prunetune.methods.options import MethodOptions
from prunetune.methods.ranks import RANKS, RankMethod, SeenAdapter, without_least
from prunetune.model.ranks import RankChange


class LightPeftRanksOptions(MethodOptions):
    """Options of light_peft."""

    kept: Fraction = Field(0.5, gt=0, description="share of the sliced adapters' parameters that stays")
    modules: Fraction = Field(0.75, description="at least this share of the adapters is spared when whole ones leave")


@RANKS.register("light_peft")
class LightPeftRanks(RankMethod):
    """Light-PEFT: whole adapters leave by |s B A x| / |W x|, then single ranks by weight times gradient.

    Importance of an adapter: the mean of that ratio over tokens and steps. Of rank i: |mean_in(A_i * gA_i)| +
    |mean_out(B_i * gB_i)|, averaged over steps; both over the second half of the search (arXiv 2406.03792, section 3).
    Adapters leave first, up to a share of them, then ranks of all others in one order; one that has lost all its ranks
    leaves, too.

    Differences: a budget of parameters is met in place of two quantiles, so that what whole adapters leave of it is
    spent on ranks; the released code's ratios keep about 25%. Padding counts as tokens. What the ranks that leave had
    learnt is lost, as published; the rest of the run relearns it.
    """

    Options = LightPeftRanksOptions
    paper = "arXiv 2406.03792"
    needs = "gradients of the adapters and outputs of their linears, in the second half of the search"
    cost = "two norms of each linear's output in each of these steps"
    reads_outputs = True

    def __init__(self, options: LightPeftRanksOptions):
        super().__init__(options)
        self.options: LightPeftRanksOptions = options

    def importance(self, a_rI: Tensor, b_Or: Tensor, grad_a_rI: Tensor, grad_b_Or: Tensor) -> Tensor:
        return (a_rI * grad_a_rI).mean(1).abs() + (b_Or * grad_b_Or).mean(0).abs()

    def ranks(self, adapters: Sequence[SeenAdapter]) -> dict[str, RankChange]:
        left = sum(adapter.params for adapter in adapters)
        budget = self.options.kept * left
        gone: dict[str, RankChange] = {}
        may_leave = int((1 - self.options.modules) * len(adapters))
        for adapter in sorted(adapters, key=lambda adapter: adapter.output_ratio)[:may_leave]:
            if left - adapter.params < budget:
                break
            gone[adapter.path] = RankChange(())
            left -= adapter.params
        return gone | without_least([adapter for adapter in adapters if adapter.path not in gone], budget)

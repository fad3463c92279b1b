"""What a unit adds to the residual stream, as the tokens saw it."""

from __future__ import annotations

from torch import Tensor

from prunetune.methods.scores import INNER, SCORES, LayerFacts, LayerScore


@SCORES.register("amp")
class Amp(LayerScore):
    """Mean L1 norm of what a head, a KV group, or an MLP channel adds to the residual stream.

    For a head that is |h W_o|_1 as published. The published score of a channel is its mean absolute activation alone,
    which does not look at the column that listens to it; here it is multiplied by that column's L1 norm, which makes it
    the same quantity as for heads.
    """

    paper = "arXiv 2504.21174"
    needs = frozenset({"weights", "activations"})
    cost = "forward passes, one layer in memory; head outputs take as much as the output projection"
    kinds = INNER

    def units(self, facts: LayerFacts, kind: str) -> Tensor:
        statistics = facts.statistics
        assert statistics is not None
        if kind == "mlp_channels":
            return statistics.inputs["down"].absolute * facts.weights["down"].abs().sum(0)
        return statistics.groups if kind == "kv_groups" else statistics.heads

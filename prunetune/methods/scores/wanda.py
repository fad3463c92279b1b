"""Weight times the norm of what reaches it."""

from __future__ import annotations

from torch import Tensor

from prunetune.methods.scores import SCORES, LayerFacts, LayerScore, consumer, per_unit


@SCORES.register("wanda")
class Wanda(LayerScore):
    """|W| times the root mean square of its input, summed over the consumer's columns of a unit (Wanda-sp).

    The mean over a column's rows is the criterion of Wanda's structured form. The activations are the dense model's,
    not those of the layers already pruned, so that sites can be ranked together.
    """

    paper = "arXiv 2306.11695"
    needs = frozenset({"weights", "activations"})
    cost = "forward passes, one layer in memory"

    def units(self, facts: LayerFacts, kind: str) -> Tensor:
        assert facts.statistics is not None
        arch = self.context.arch
        role = consumer(arch, kind)
        norm_F = facts.statistics.inputs[role].square.sqrt()
        return per_unit(arch, kind, facts.weights[role].abs().mean(0) * norm_F.to(facts.weights[role]))
